"""What the parameters of one rank follow from, beside the model's files: two loads for which all of it is equal fill them alike."""

from __future__ import annotations

import json
from typing import Any

import torch
import vllm
from torch import nn
from vllm import envs
from vllm.config import ModelConfig, ParallelConfig, VllmConfig
from vllm.distributed import (
    get_pcp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)


def made_of(model: nn.Module, vllm_config: VllmConfig, model_config: ModelConfig) -> dict[str, Any]:
    """For the image's name. What is too much in it costs a load; what is missing would be another model's numbers."""
    parallel, kind = vllm_config.parallel_config, type(model)
    described = json.loads(model_config.hf_config.to_json_string(use_diff=False))
    described.pop("_name_or_path", None)  # the same files may be reached by several names
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "config": described,
        "dtype": str(model_config.dtype),
        "quantization": str(model_config.quantization),
        "device": str(next(model.parameters()).device.type),
        "ranks": get_tensor_model_parallel_world_size(),
        "rank": get_tensor_model_parallel_rank(),
        "beyond": _beyond(parallel),
        "experts": [
            parallel.enable_expert_parallel,
            parallel.enable_eplb,
            str(parallel.expert_placement_strategy),
        ],
        "environment": envs.compile_factors(),
    }


def _beyond(parallel: ParallelConfig) -> list[int]:
    """Experts are divided over more than tensor parallelism: each rank of these has other ones, in parameters of the same names."""
    context = parallel.prefill_context_parallel_size
    return [
        parallel.data_parallel_size,
        parallel.data_parallel_rank,
        context,
        get_pcp_group().rank_in_group if context > 1 else 0,
    ]
