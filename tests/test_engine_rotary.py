"""What a standby makes ahead is what the layers get, to the bit; and a model that has none is no reason to fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import rotary_embedding
from vllm.utils.torch_utils import set_default_torch_dtype

from ghostserve.engine import rotary
from real import kit


@pytest.fixture(scope="module")
def config() -> Any:
    return EngineArgs(model=str(kit.TINY), enforce_eager=True, max_model_len=512).create_engine_config()


@pytest.fixture(autouse=True)
def _nothing_made_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    yield
    torch.set_num_threads(threads)


def as_a_layer_asks(config: Any) -> Any:
    model = config.model_config
    hf = model.hf_config
    with set_current_vllm_config(config), set_default_torch_dtype(model.dtype):
        return rotary_embedding.get_rope(
            hf.hidden_size // hf.num_attention_heads,
            max_position=hf.max_position_embeddings,
            rope_parameters=hf.rope_parameters,
            is_neox_style=True,
        )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_layers_get_it(config: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    fresh = as_a_layer_asks(config)
    rotary_embedding._ROPE_DICT.clear()
    rotary.prepare(config)
    assert torch.get_num_threads() == threads
    (made,) = rotary_embedding._ROPE_DICT.values()
    assert as_a_layer_asks(config) is made
    assert made is not fresh
    assert torch.equal(made.cos_sin_cache, fresh.cos_sin_cache)


def test_one_for_each_type_of_layer(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {
        kind: {"rope_type": "default", "rope_theta": theta}
        for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
    }
    monkeypatch.setattr(config.model_config.hf_text_config, "rope_parameters", kinds)
    rotary.prepare(config)
    assert len(rotary_embedding._ROPE_DICT) == 2


@pytest.mark.parametrize("parameters", [None, {"rope_type": "unheard of"}])
def test_a_model_without_is_no_reason_to_fail(
    config: Any, parameters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config.model_config.hf_text_config, "rope_parameters", parameters)
    rotary.prepare(config)
    assert rotary_embedding._ROPE_DICT == {}
