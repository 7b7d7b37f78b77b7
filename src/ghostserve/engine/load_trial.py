"""One trial of `ghostserve bench load`: a model built and loaded by vLLM's own code, in this process, with the clock running while weights load.

"Weights" is all that `load_model` does but build the modules and post-process the parameters: from the moment the modules stand until every
parameter has its values. What a loader prepares before, and what it does afterwards, counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

from ghostserve.clock import monotonic_s
from ghostserve.engine.load_meter import Meter
from ghostserve.engine.load_trial_raw import fastsafetensors_tensors
from ghostserve.native.checksum import crc32

FASTSAFETENSORS = "fastsafetensors-cpu"


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


def model_trial(
    task: dict[str, Any], rank: int, when_ready: Callable[[], None]
) -> tuple[Any, dict[str, Any]]:
    """Build, wait, load: the model, and the figures."""
    arguments = EngineArgs(
        model=task["model"],
        load_format=task["load_format"],
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
        phases = Phases(when_ready, config.load_config, digest=task["digest"])
        model = phases.load(config)
    return model, phases.figures()


class Phases:
    """A loader whose parts are timed: the same class as the given one, with the moments noted at which its steps begin and end."""

    def __init__(self, when_ready: Callable[[], None], load_config: Any, *, digest: bool) -> None:
        self._meter: Meter | None = None
        self._weights: dict[str, float] = {}
        self._after_s = 0.0
        self._digest = ""
        phases = self
        plain = type(get_model_loader(load_config))

        class Timed(plain):  # type: ignore[misc, valid-type]
            def create_model(self, *arguments: Any, **named: Any) -> Any:
                model = super().create_model(*arguments, **named)
                when_ready()
                phases._meter = Meter()
                return model

            def load_weights(self, model: Any, *arguments: Any, **named: Any) -> Any:
                answer = super().load_weights(model, *arguments, **named)
                assert phases._meter is not None
                phases._weights = phases._meter.stop()
                if digest:
                    phases._digest = digest_of(model)
                phases._after_s = monotonic_s()
                return answer

        self._loader = Timed(load_config)

    def load(self, config: Any) -> Any:
        model = self._loader.load_model(vllm_config=config, model_config=config.model_config)
        self._after_s = monotonic_s() - self._after_s
        return model

    def figures(self) -> dict[str, Any]:
        return {**self._weights, "post_s": self._after_s, "digest": self._digest}


def digest_of(model: Any) -> str:
    """One word for names, types, shapes and bytes of all parameters."""
    value = 0
    for name, parameter in sorted(model.named_parameters()):
        about = np.frombuffer(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode(), np.uint8)
        data = parameter.detach().contiguous().view(torch.uint8).reshape(-1)
        value = crc32(data.numpy(), crc32(about, value))
    return f"{value:08x}"
