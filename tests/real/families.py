"""Model families with random weights, built by transformers for the test and thrown away after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from real.kit import TINY

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def build(name: str, directory: Path) -> Path:
    """A small model of the family in `directory`, with the shipped tokenizer. Weights are wide enough apart
    that greedy decoding does not fall into a loop at once.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = MODELS[name](shape).float().eval()
    model.save_pretrained(directory)
    for file in TOKENIZER_FILES:
        shutil.copy(TINY / file, directory / file)
    return directory


def build_awq(directory: Path) -> Path:
    """A llama in AWQ's format, 4 bits in groups of 32: random integers, small scales."""
    build("llama", directory)
    file, config = directory / "model.safetensors", directory / "config.json"
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(file).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight.bfloat16()
            continue
        outputs, inputs = weight.shape
        packed = {"qweight": (inputs, outputs // 8), "qzeros": (inputs // 32, outputs // 8)}
        for part, size in packed.items():
            tensors[name.replace("weight", part)] = torch.randint(
                -(1 << 31), 1 << 31, size, generator=generator, dtype=torch.int64
            ).int()
        scales = torch.rand(inputs // 32, outputs, generator=generator) / 50
        tensors[name.replace("weight", "scales")] = scales.bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    described = json.loads(config.read_text())
    quantised = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    config.write_text(json.dumps({**described, "dtype": "bfloat16", "quantization_config": quantised}))
    return directory


def _llama(shape: dict[str, Any]) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


def _qwen3(shape: dict[str, Any]) -> Any:
    shape = {**shape, "num_hidden_layers": 2}  # it is compiled: time goes with the layers
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape))


def _mixtral(shape: dict[str, Any]) -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2)
    )


def _gemma3(shape: dict[str, Any]) -> Any:
    """Sliding-window and full attention: two KV cache groups over the same bytes."""
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **shape,
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention"] * 2,
            query_pre_attn_scalar=32,
        )
    )


def _mamba(shape: dict[str, Any]) -> Any:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=shape["vocab_size"], hidden_size=128, num_hidden_layers=2)
    )


MODELS = {"llama": _llama, "qwen3": _qwen3, "moe": _mixtral, "hybrid-kv": _gemma3, "mamba": _mamba}
