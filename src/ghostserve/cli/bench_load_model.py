"""Weights to load: a Llama of real shapes, bfloat16, in several files, all of it random, made on the spot.

The tensors have the names, shapes and order that Hugging Face gives them. Every value is finite. The files differ in length, and no
length is a multiple of a disk's sector: what reads in large aligned pieces has to deal with the rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ghostserve.errors import UnsupportedError

INDEX = "model.safetensors.index.json"
SECTOR_BYTES = 512
_PIECE_BYTES = 64 << 20
_SHARES = (0.45, 0.3, 0.25)  # of the files, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama's sizes; the defaults are those of TinyLlama-1.1B, 2.2 GB."""

    layers: int = 22
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32000

    @classmethod
    def of_bytes(cls, wanted: int) -> Shape:
        """The smallest with at least this many bytes of weights: as many layers as that takes."""
        one, two = cls(layers=1).nbytes, cls(layers=2).nbytes
        return cls(layers=max(1, -(-(wanted - one) // (two - one)) + 1))

    @classmethod
    def tiny(cls) -> Shape:
        """Some megabytes, to see that a bench works."""
        return cls(layers=2, hidden=256, intermediate=704, heads=8, kv_heads=4, vocabulary=2000)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each, in a checkpoint's order."""
        kv = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            yield f"{layer}.input_layernorm.weight", (self.hidden,)
            yield f"{layer}.mlp.down_proj.weight", (self.hidden, self.intermediate)
            yield f"{layer}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{layer}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{layer}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{layer}.self_attn.k_proj.weight", (kv, self.hidden)
            yield f"{layer}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{layer}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{layer}.self_attn.v_proj.weight", (kv, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(shape) for _, shape in self.tensors())

    def config(self) -> dict[str, Any]:
        """What `config.json` says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def _nbytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def write_model(folder: Path, shape: Shape, *, seed: int = 0) -> list[Path]:
    """Write the model into a folder, which is made, and return its weights' files, all of it on the disk (fsync).

    UnsupportedError where the disk has no room for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    if free < shape.nbytes + (1 << 28):
        raise UnsupportedError(
            f"{folder} has {free / 1e9:.1f} GB free, {shape.nbytes / 1e9:.1f} GB and some are needed: "
            "name another folder with --directory, or a smaller --size"
        )
    rng = np.random.default_rng(seed)
    parts = _parts(list(shape.tensors()), total=shape.nbytes)
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    index: dict[str, str] = {}
    for name, part in zip(names, parts, strict=True):
        _write_file(folder / name, part, rng)
        index |= dict.fromkeys((tensor for tensor, _ in part), name)
    document = {"metadata": {"total_size": shape.nbytes}, "weight_map": index}
    (folder / INDEX).write_text(json.dumps(document, indent=1), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1), encoding="utf-8")
    return [folder / name for name in names]


def _parts(
    tensors: list[tuple[str, tuple[int, ...]]], *, total: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors of each file, in order; files of different length."""
    parts: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled, limit = 0, _SHARES[0]
    for name, shape in tensors:
        if parts[-1] and filled >= limit * total and len(parts) < len(_SHARES):
            limit += _SHARES[len(parts)]
            parts.append([])
        parts[-1].append((name, shape))
        filled += _nbytes(shape)
    return parts


def _write_file(path: Path, tensors: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in tensors:
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [place, place + _nbytes(shape)],
        }
        place += _nbytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if (8 + len(text) + place) % SECTOR_BYTES == 0:
        text += b" " * 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, place, _PIECE_BYTES):
            file.write(_random(rng, min(_PIECE_BYTES, place - begin) // 2).data)
        file.flush()
        os.fsync(file.fileno())


def _random(rng: np.random.Generator, count: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """bfloat16 of both signs between 2**-7 and 2**-3: finite in every sum, and no disk can compress them much."""
    bits = rng.integers(0, 1 << 16, count, dtype=np.uint16)
    return (bits & np.uint16(0x81FF)) | np.uint16(0x3C00)
