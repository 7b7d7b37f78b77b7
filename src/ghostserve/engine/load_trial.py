"""One trial of `ghostserve bench load`: a model built and loaded by vLLM's own code, in this process, with the clock running while weights load.

"Weights" is all that `load_model` does but build the modules and post-process the parameters: from the moment the modules stand until every
parameter has its values. What a loader prepares before, and what it does afterwards, counts.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

from ghostserve.clock import monotonic_s
from ghostserve.engine.load_meter import Meter, memory
from ghostserve.engine.load_trial_raw import fastsafetensors_tensors
from ghostserve.native.checksum import crc32

FASTSAFETENSORS = "fastsafetensors-cpu"


class Talk(Protocol):
    """Who decides when the trial goes on (load_trials.Line)."""

    def say(self, kind: str, **what: Any) -> None: ...

    def wait_for_go(self) -> None: ...


@register_model_loader(FASTSAFETENSORS)
class FastsafetensorsOnCpu(DefaultModelLoader):
    """vLLM's load format `fastsafetensors`, which names a CUDA device, with the CPU in its place."""

    def _prepare_weights(self, *arguments: Any, **named: Any) -> Any:
        self.load_config.load_format = (
            "safetensors"  # the files' names; the default loader knows no other name
        )
        return super()._prepare_weights(*arguments, **named)

    def _get_weights_iterator(self, source: Any) -> Generator[tuple[str, torch.Tensor], None, None]:
        _, files, _, _ = self._prepare_weights(source.model_or_path, None, source.revision, False, None)
        return ((source.prefix + name, tensor) for name, tensor in fastsafetensors_tensors(files))


def model_trial(line: Talk, task: dict[str, Any], rank: int) -> None:
    """Build, say `ready`, load, say `loaded`, give the figures."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // task["ranks"]))
    arguments = EngineArgs(
        model=task["model"],
        load_format=task["load_format"],
        model_loader_extra_config=task["extra"],
        safetensors_load_strategy=task["strategy"],
        tensor_parallel_size=task["ranks"],
        dtype="bfloat16",
        enforce_eager=True,
        skip_tokenizer_init=True,
        use_tqdm_on_load=False,
        disable_custom_all_reduce=True,
    )
    config = arguments.create_engine_config()
    meeting = task["meeting"]  # a file that is not there yet
    os.environ["VLLM_DIST_IDENT"] = Path(meeting).name  # of shared memory
    with set_current_vllm_config(config):
        init_worker_distributed_environment(config, rank, f"file://{meeting}", rank, "gloo")
        phases = Phases(line, config.load_config, digest=task["digest"])
        model = phases.load(config)
    line.say("loaded", rank=rank)
    line.wait_for_go()
    line.say(
        "figures", rank=rank, **phases.figures(), **memory(), digest=phases.digest, parameters=_count(model)
    )


class Phases:
    """A loader whose parts are timed: the same class as the given one, with the moments noted at which its steps begin and end."""

    def __init__(self, line: Talk, load_config: Any, *, digest: bool) -> None:
        self._meter: Meter | None = None
        self._weights: dict[str, float] = {}
        self._after_s = 0.0
        self.digest = ""
        phases = self
        plain = type(get_model_loader(load_config))

        class Timed(plain):  # type: ignore[misc, valid-type]
            def create_model(self, *arguments: Any, **named: Any) -> Any:
                model = super().create_model(*arguments, **named)
                line.say("ready")
                line.wait_for_go()
                phases._meter = Meter()
                return model

            def load_weights(self, model: Any, *arguments: Any, **named: Any) -> Any:
                answer = super().load_weights(model, *arguments, **named)
                assert phases._meter is not None
                phases._weights = phases._meter.stop()
                if digest:
                    phases.digest = digest_of(model)
                phases._after_s = monotonic_s()
                return answer

        self._loader = Timed(load_config)

    def load(self, config: Any) -> Any:
        model = self._loader.load_model(vllm_config=config, model_config=config.model_config)
        self._after_s = monotonic_s() - self._after_s
        return model

    def figures(self) -> dict[str, float]:
        return {**self._weights, "post_s": self._after_s}


def digest_of(model: Any) -> str:
    """One word for names, types, shapes and bytes of all parameters."""
    value = 0
    for name, parameter in sorted(model.named_parameters()):
        about = np.frombuffer(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode(), np.uint8)
        data = parameter.detach().contiguous().view(torch.uint8).reshape(-1)
        value = crc32(data.numpy(), crc32(about, value))
    return f"{value:08x}"


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
