"""What a place is called, which of its files serving needs, and what one version of them is. Pure.

Nothing here is trusted: a name becomes a path on this machine only if it is a single plain word, whatever a listing or
an index says.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from ghostserve.errors import BadWeightsFileError, UnsafeWeightsError, UsageError

SCHEMES = ("s3", "gs", "http", "https")
INDEX = "model.safetensors.index.json"
SUMS = "SHA256SUMS"
"""Checksums as `sha256sum *` writes them, for servers that give none."""
WEIGHTS = ("*.safetensors",)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
BESIDE = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", SUMS)
"""Configuration and tokenizers. Code (*.py) is left where it is."""
TOO_MUCH = ("consolidated*.safetensors", "consolidated.safetensors.index.json")
"""A second copy of the weights in another layout, where both are there: vLLM takes the one that the index names."""
PROBED = (
    "config.json",
    INDEX,
    SUMS,
    *("generation_config.json", "hf_quant_config.json", "quantize_config.json", "params.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
)
"""What an HTTP server, which cannot list, is asked for one by one; the index names the rest."""
CONVERT = (
    "only pickled weights are there ({name}), which could run code and are never opened: convert them first, with "
    "transformers' from_pretrained(...).save_pretrained(..., safe_serialization=True)"
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+=@,-]{0,254}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file as the remote describes it. `etag` is as it came, quotes and all; `modified` tells versions apart without one."""

    name: str
    nbytes: int
    etag: str | None = None
    modified: str | None = None

    @property
    def digest(self) -> str:
        """Names one version of this file; not of its bytes, which nobody has seen yet."""
        text = json.dumps([self.name, self.nbytes, self.etag or self.modified])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_url(model: str) -> bool:
    """Whether `model` is a place that we fetch from, rather than a folder or a Hugging Face id."""
    return model.partition("://")[0].lower() in SCHEMES and "://" in model


def checked_url(text: str) -> str:
    """The URL without a slash at its end. Raises UsageError."""
    try:
        parts = urlsplit(text)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError as error:
        raise UsageError(f"{text}: not a URL: {error}") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            f"{parts.scheme}://{parts.hostname}{parts.path}: neither user, password, query nor fragment may be in the URL: it is "
            "shown in lists and logs; credentials come from the environment"
        )
    if not parts.hostname or not port_is_fine:
        raise UsageError(f"{text}: not a URL; write for example s3://bucket/folder or https://host/folder")
    if ".." in unquote(parts.path).split("/"):
        raise UsageError(f"{text}: '..' in a URL is not followed")
    return f"{parts.scheme.lower()}://{parts.netloc}{parts.path.rstrip('/')}"


def folder_name(url: str) -> str:
    """A readable and unique name for what lies at `url`: `s3-bucket-llama-8b-0f3a9c2e41`."""
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", url.replace("://", "-")).strip("-.")[:80]
    return f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:10]}"


def checked_name(name: str, *, where: str) -> str:
    """`name`, if it can only ever be a file in the folder it is joined to. Raises BadWeightsFileError."""
    if _NAME.fullmatch(name) is None or name.endswith((".", " ", ".partial")):
        raise BadWeightsFileError(
            f"{where} names a file {name!r}, which is not a plain file name: do not use this model"
        )
    return name


def wanted(name: str) -> bool:
    """Whether serving may need it. Hidden files are somebody's own."""
    return not name.startswith(".") and _matches(name, (*WEIGHTS, *BESIDE))


def is_weights(name: str) -> bool:
    """Whether it holds weights that we read."""
    return _matches(name, WEIGHTS)


def choose(names: Iterable[str], *, where: str) -> list[str]:
    """What of a folder to fetch, small files first. Raises UnsafeWeightsError, BadWeightsFileError."""
    there = sorted(set(names))
    chosen = [checked_name(name, where=where) for name in there if wanted(name)]
    if any(is_weights(name) and not _matches(name, TOO_MUCH) for name in chosen):
        chosen = [name for name in chosen if not _matches(name, TOO_MUCH)]
    if not any(map(is_weights, chosen)):
        pickle = next((name for name in there if _matches(name, PICKLES)), None)
        if pickle is not None:
            raise UnsafeWeightsError(f"{where}: {CONVERT.format(name=pickle)}")
        raise BadWeightsFileError(f"{where} has no *.safetensors: name the folder that holds the weights")
    if "config.json" not in chosen and "params.json" not in chosen:
        raise BadWeightsFileError(f"{where} has no config.json: name the folder that holds the model")
    return sorted(chosen, key=lambda name: (is_weights(name), name))


def shards(index: bytes, *, where: str) -> list[str]:
    """The files that an index names. Raises BadWeightsFileError."""
    try:
        named = set(json.loads(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadWeightsFileError(f"{where}/{INDEX} is no index of weights: {error!r}") from None
    if not all(isinstance(name, str) and is_weights(name) for name in named):
        raise BadWeightsFileError(f"{where}/{INDEX} names files that are not *.safetensors")
    return sorted(checked_name(name, where=f"{where}/{INDEX}") for name in named)


def version_of(files: Iterable[RemoteFile]) -> str:
    """Names one version of a model: its files, their lengths and etags."""
    return hashlib.sha256("\n".join(sorted(file.digest for file in files)).encode()).hexdigest()[:16]


def sums_of(text: str) -> dict[str, str]:
    """Name to SHA-256 of a file as `sha256sum` writes it; lines that are something else are passed over."""
    found = (re.fullmatch(r"([0-9a-fA-F]{64})\s[ *](?:\./)?(.+)", line.strip()) for line in text.splitlines())
    return {match[2]: match[1].lower() for match in found if match is not None}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
