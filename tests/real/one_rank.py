"""One rank loads models as vLLM's workers do, without a server, and says what their parameters are: run by test_loader.

    python one_rank.py '{"rank": 0, "ranks": 2, "store": FILE, "loads": [{"model": DIR, "format": "ghostserve"}, ...]}'

`source` in a load: it is that of a replacement, whose server started with those files. Prints a line that is a JSON list, one object
per load.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

os.environ["GHOSTSERVE_PLATFORM"] = "1"  # before vLLM is imported

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader

from ghostserve.clock import monotonic_s
from ghostserve.engine import load_format


class Said(logging.Handler):
    """What the loader logs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(asked: dict[str, Any]) -> list[dict[str, Any]]:
    load_format.register()  # as vLLM does in its own workers
    gc.freeze()  # as our workers do: vLLM collects garbage twice in a load
    torch.set_num_threads(1)
    torch.accelerator.empty_cache = lambda: None  # as vLLM's runner for the CPU does
    ready = False
    found = []
    for load in asked["loads"]:
        config = config_of(load, asked)
        with set_current_vllm_config(config):
            if not ready:
                ready = True
                init_distributed_environment(
                    asked["ranks"], asked["rank"], f"file://{asked['store']}", asked["rank"], "gloo"
                )
                initialize_model_parallel(asked["ranks"])
            torch.distributed.barrier()  # ranks load together, and one after the other what comes next
            found.append(loaded(config))
    destroy_model_parallel()
    destroy_distributed_environment()
    return found


def config_of(load: dict[str, Any], asked: dict[str, Any]) -> Any:
    config = EngineArgs(
        model=load["model"],
        tensor_parallel_size=asked["ranks"],
        dtype=load.get("dtype", "float32"),
        quantization=load.get("quantization"),
        load_format=load["format"],
        enforce_eager=True,
        max_model_len=256,
        distributed_executor_backend="mp",
    ).create_engine_config()
    config.parallel_config.rank = asked["rank"]
    if "source" in load:
        config.load_config = load_format.for_newcomer(config.load_config, load["source"])
    return config


def loaded(config: Any) -> dict[str, Any]:
    """Parameters before vLLM processes them, what took how long, and what stays mapped of the pool's memory afterwards."""
    said, logger = Said(), logging.getLogger("ghostserve")
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    loader = get_model_loader(config.load_config)
    stock = loader.load_weights
    seen: dict[str, Any] = {}
    began_s = monotonic_s()

    def load_weights(model: torch.nn.Module, model_config: Any) -> None:
        built_s = monotonic_s()
        stock(model, model_config)
        seen["built_ms"], seen["loaded_ms"] = (built_s - began_s) * 1e3, (monotonic_s() - built_s) * 1e3
        seen["parameters"] = {
            name: [str(one.dtype), list(one.shape), digest(one)] for name, one in model.named_parameters()
        }
        seen["digested_s"] = monotonic_s()

    loader.load_weights = load_weights
    model = loader.load_model(vllm_config=config, model_config=config.model_config)
    seen["processed_ms"] = (monotonic_s() - seen.pop("digested_s")) * 1e3
    seen["memory"] = memory()
    seen["said"] = said.lines
    logger.removeHandler(said)
    del model
    return seen


def digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"").hexdigest()


def memory() -> dict[str, int]:
    """Of the pool's memory in this process: what is mapped, what of it is in use, and our part of that, in bytes."""
    found = {"Size": 0, "Rss": 0, "Pss": 0}
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            ours = "ghostserve-weights" in line
        elif ours and words[0][:-1] in found:
            found[words[0][:-1]] += int(words[1]) * 1024
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
