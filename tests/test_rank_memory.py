"""Device and KV size of a rank, as vLLM's own configuration has them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ghostserve.engine.rank_memory import rank_memory, weights_bytes


@pytest.mark.parametrize(("kind", "device"), [("cpu", "cpu"), ("cuda", "cuda:1")])
def test_device_and_kv_bytes(kind: str, device: str) -> None:
    tensors = [SimpleNamespace(size=100), SimpleNamespace(size=28)]
    executor = SimpleNamespace(
        vllm_config=SimpleNamespace(device_config=SimpleNamespace(device_type=kind)),
        kv_cache_configs=[SimpleNamespace(kv_cache_tensors=[]), SimpleNamespace(kv_cache_tensors=tensors)],
    )
    assert rank_memory(executor, 1) == {"device": device, "kv_bytes": 128}
    executor.kv_cache_configs = []
    assert rank_memory(executor, 1)["kv_bytes"] == 0


def test_weights_are_the_models_files() -> None:
    files = (("commit abc", 0, 0), ("a.safetensors", 10, 1), ("b.safetensors", 5, 1), ("config.json", 3, 1))
    assert weights_bytes(files) == 15
