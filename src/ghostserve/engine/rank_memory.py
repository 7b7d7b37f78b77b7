"""Where a rank computes and how much memory it has there, for the status; nobody is asked for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def rank_memory(executor: Any, rank: int) -> dict[str, Any]:
    """The device by vLLM's name, and the size of the rank's KV cache; 0 before vLLM has laid it out."""
    kind = str(executor.vllm_config.device_config.device_type)
    configs = executor.kv_cache_configs
    tensors = configs[rank].kv_cache_tensors if rank < len(configs) else ()
    return {
        "device": kind if kind == "cpu" else f"{kind}:{rank}",
        "kv_bytes": sum(tensor.size for tensor in tensors),
    }


def weights_bytes(identity: Iterable[tuple[str, int, int]]) -> int:
    """The size of the model's files (`weights_identity.identity`): what all ranks together hold of it, about."""
    return sum(size for name, size, _ in identity if not name.endswith(".json"))
