"""Whether the model can be read, and split over so many workers. Looks at files; downloads nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ghostserve.cli.doctor_checks import Finding, Subject, fail, ok, warn
from ghostserve.cli.doctor_machine import weights_bytes
from ghostserve.cli.units import bytes_text
from ghostserve.codec.matrix import check_size
from ghostserve.errors import UsageError
from ghostserve.weights.cache import cache_of, offline
from ghostserve.weights.cache_home import user_home
from ghostserve.weights.remote_names import is_url

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json")


def check_model(subject: Subject) -> list[Finding]:
    """A folder as Hugging Face makes them, or an id that is in the cache or can be had."""
    if subject.model is None:
        return [ok("model", "none was named: 'ghostserve doctor MODEL' looks at it")]
    directory = subject.model_directory
    if directory is None and is_url(subject.model):
        return [_by_url(subject.model)]
    if directory is None:
        return [_by_id(subject.model)]
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [fail("model", f"{directory / 'config.json'}: {error}", "name a complete Hugging Face folder")]
    if missing := _missing(directory):
        return [fail("model", f"{directory} lacks {missing}", "download the model again")]
    architectures = ", ".join(config.get("architectures") or ["no architecture named"])
    found = f"{architectures}, {bytes_text(weights_bytes(directory))} of weights in {directory}"
    return [_divided(config, subject.ranks) or ok("model", found)]


def _by_id(model: str) -> Finding:
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        return fail("model", f"{model}: no such folder", "name a folder that exists, or a Hugging Face id")
    home = Path(os.environ.get("HF_HOME") or user_home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    snapshots = cache / f"models--{model.replace('/', '--')}" / "snapshots"
    if any(snapshots.glob("*/config.json")):
        return ok("model", f"{model} is in {cache}")
    if offline():
        return fail("model", f"{model} is not in {cache}", "unset HF_HUB_OFFLINE, or download it first")
    return warn(
        "model",
        f"{model} is not in {cache}: serve will download it",
        "download it first, for a start that needs no network",
    )


def _by_url(model: str) -> Finding:
    cache = cache_of(model)
    if cache.current() is not None:
        return ok("model", f"{model} is in {cache.folder}")
    remedy = f"'ghostserve models pull {model}' first, for a start that needs no network"
    if offline():
        return fail("model", f"{model} is not in {cache.folder.parent}", f"unset HF_HUB_OFFLINE, or {remedy}")
    return warn("model", f"{model} is not in {cache.folder.parent}: serve will fetch it", remedy)


def _missing(directory: Path) -> str | None:
    """What a complete folder has and this one has not."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        absent = sorted(name for name in named if not (directory / name).exists())
        if absent:
            return f"{absent[0]} and {len(absent) - 1} more weight files" if absent[1:] else absent[0]
    elif not weights_bytes(directory):
        return "weights (*.safetensors)"
    return None if any((directory / name).exists() for name in TOKENIZERS) else "a tokenizer"


def _divided(config: dict[str, Any], ranks: int) -> Finding | None:
    """vLLM splits attention heads over the ranks; key-value heads may be copied instead."""
    heads = (config.get("text_config") or config).get("num_attention_heads")
    if not isinstance(heads, int) or heads % ranks == 0:
        return None
    found = f"{heads} attention heads do not divide by --tensor-parallel-size {ranks}"
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and n <= 64]
    return fail("model", found, f"take one of {', '.join(map(str, fitting))}")


def check_parity(subject: Subject) -> list[Finding]:
    """Whether there is a code for so many ranks and shards, and whether anything is protected at all."""
    config = subject.config
    if config.protection == "none":
        return [
            warn(
                "protection",
                "--protection none: a lost worker ends the server",
                "leave --protection none out",
            )
        ]
    try:
        check_size(subject.ranks, config.parity_shards)
    except UsageError as error:
        return [fail("protection", f"--parity-shards {config.parity_shards}: {error}", "ask for fewer")]
    kept = f"{config.parity_shards} parity shards" if config.protection == "parity" else "replicas"
    return [ok("protection", f"{kept} for {subject.ranks} ranks")]
