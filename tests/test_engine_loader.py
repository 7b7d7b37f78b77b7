"""The loader, asked for a model's tensors as vLLM asks it, and what an image is known by. Needs vLLM, and no server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ghostserve.errors import MissingShardError
from weights_kit import write_weights

pytest.importorskip("vllm")

from torch import nn
from vllm.config import LoadConfig, ParallelConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ghostserve.engine import loader, rank_made_of


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loader, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number, name in enumerate(("keep.a", "drop.b", "keep.c"), 1):
        write_weights(tmp_path / f"model-{number:05}-of-00003.safetensors", {name: ("F32", [3])})
    return tmp_path


def names(folder: Path) -> list[str]:
    source = DefaultModelLoader.Source(
        str(folder), None, is_unused_weight=lambda name: name.startswith("drop")
    )
    load_config = LoadConfig(use_tqdm_on_load=False)
    return [name for name, _ in loader.GhostModelLoader(load_config)._get_weights_iterator(source)]


def test_a_shard_that_vllm_does_not_need_is_not_missing(shards: Path) -> None:
    assert names(shards) == ["keep.a", "keep.c"]


def test_a_shard_that_is_not_there_is(shards: Path) -> None:
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MissingShardError, match="model-00002-of-00003"):
        names(shards)


def made_of(monkeypatch: pytest.MonkeyPatch, **parallel: int) -> dict[str, Any]:
    monkeypatch.setattr(rank_made_of, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(rank_made_of, "get_tensor_model_parallel_rank", lambda: 0)
    config = ParallelConfig()
    for name, value in parallel.items():
        setattr(config, name, value)
    described = SimpleNamespace(to_json_string=lambda use_diff: "{}")
    model_config = SimpleNamespace(hf_config=described, dtype="bfloat16", quantization=None)
    return rank_made_of.made_of(nn.Linear(2, 2), SimpleNamespace(parallel_config=config), model_config)  # type: ignore[arg-type]


def test_replicas_of_a_mixture_have_other_experts_and_so_other_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone, first, second = (
        made_of(monkeypatch, data_parallel_size=size, data_parallel_rank=rank)
        for size, rank in ((1, 0), (2, 0), (2, 1))
    )
    assert alone != first != second != alone
    assert alone == made_of(monkeypatch)
