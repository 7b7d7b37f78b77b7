"""One rank loads a model as vLLM does, without a server, and says what its parameters are: run by test_loader.

    python one_rank.py '{"model": ..., "rank": 0, "ranks": 2, "store": FILE, "format": "ghostserve", ...}'

Prints a JSON object as its last line.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["GHOSTSERVE_PLATFORM"] = "1"  # before vLLM is imported

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.utils.torch_utils import set_default_torch_dtype

import ghostserve.engine.loader  # noqa: F401
from ghostserve.clock import monotonic_s
from ghostserve.engine import logs
from ghostserve.engine.load_format import for_newcomer


def main(asked: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    logs.join_vllm()
    torch.accelerator.empty_cache = lambda: None  # as vLLM's runner for the CPU does
    config = EngineArgs(
        model=asked["model"],
        tensor_parallel_size=asked["ranks"],
        dtype=asked.get("dtype", "float32"),
        load_format=asked["format"],
        enforce_eager=True,
        max_model_len=256,
        distributed_executor_backend="mp",
    ).create_engine_config()
    config.parallel_config.rank = asked["rank"]
    if "source" in asked:
        config.load_config = for_newcomer(config.load_config, asked["source"])
    init_distributed_environment(
        asked["ranks"], asked["rank"], f"file://{asked['store']}", asked["rank"], "gloo"
    )
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        initialize_model_parallel(asked["ranks"])
        began_s = monotonic_s()
        loader = get_model_loader(config.load_config)
        seen: dict[str, Any] = {}
        load_weights = loader.load_weights

        def watched(model: torch.nn.Module, model_config: Any) -> None:
            built_s = monotonic_s()
            load_weights(model, model_config)
            loaded_s = monotonic_s()
            seen["built_ms"], seen["loaded_ms"] = (built_s - began_s) * 1e3, (loaded_s - built_s) * 1e3
            seen["parameters"] = {
                name: [str(one.dtype), list(one.shape), digest(one)] for name, one in model.named_parameters()
            }
            seen["digested_s"] = monotonic_s()

        loader.load_weights = watched
        model = loader.load_model(vllm_config=config, model_config=config.model_config)
        seen["processed_ms"] = (monotonic_s() - seen.pop("digested_s")) * 1e3
    seen["memory"] = memory()
    return seen


def digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"").hexdigest()


def memory() -> dict[str, int]:
    """Of the pool's memory in this process: what is mapped, what of it is in use, and our part of that, in bytes."""
    found = {"Size": 0, "Rss": 0, "Pss": 0, "Private_Dirty": 0}
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            ours = "ghostserve-weights" in line
        elif ours and words[0][:-1] in found:
            found[words[0][:-1]] += int(words[1]) * 1024
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
