"""The requests of a chaos run: lengths as in real traces, greedy and seeded, some with a prefix in common. Pure.

The traces are of big models; lengths are scaled down to what a small one serves in a second or two.

    input tokens   trace / 64, 4 to 1200       output tokens   trace / 2, 12 to 200
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ghostserve

MODELS_DIR = Path(ghostserve.__file__).parent / "models"
TRACES = ("mooncake_conversation", "azure2023_conv")
INPUT_DIVISOR, INPUT_TOKENS_MIN, INPUT_TOKENS_MAX = 64, 4, 1200
OUTPUT_DIVISOR, OUTPUT_TOKENS_MIN, OUTPUT_TOKENS_MAX = 2, 12, 200
CHARACTERS_PER_TOKEN = 3  # of source code, with the shipped tokenizer about
SHARED_PREFIXES = 3
SHARED_CHARACTERS = 600  # six blocks or so: what of it is cached is whole blocks
SEEDED_SHARE, SHARED_SHARE, PAIR_SHARE = 0.5, 0.3, 0.2  # pairs: of the seeded


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked, again and again; its answer is always the same."""

    number: int
    prompt: str
    max_tokens: int
    temperature: float
    seed: int | None
    n: int
    prefix: int | None  # which of the shared ones it begins with

    def as_dict(self) -> dict[str, Any]:
        """Plain values under the same names."""
        return {name: getattr(self, name) for name in self.__slots__}


@cache
def trace_lengths() -> Mapping[str, Any]:
    """Quantiles p0 to p100 of two public traces; see the file for their origin and licence."""
    document: dict[str, Any] = json.loads((MODELS_DIR / "request_lengths.json").read_text(encoding="utf-8"))
    return document


def sample_quantiles(quantiles: Sequence[float], u: float) -> float:
    """Inverse transform: the value at `u` in [0, 1], linear between neighbours."""
    at = u * (len(quantiles) - 1)
    low = min(int(at), len(quantiles) - 2)
    return quantiles[low] + (at - low) * (quantiles[low + 1] - quantiles[low])


def make_requests(count: int, *, rng: random.Random, prompts: Sequence[str]) -> list[Request]:
    """`count` different requests; `prompts` are the texts that they are cut from."""
    return [_request(number, rng, prompts) for number in range(count)]


def _request(number: int, rng: random.Random, prompts: Sequence[str]) -> Request:
    lengths = trace_lengths()[rng.choice(TRACES)]
    tokens = sample_quantiles(lengths["input_tokens"], rng.random()) / INPUT_DIVISOR
    characters = CHARACTERS_PER_TOKEN * int(min(max(tokens, INPUT_TOKENS_MIN), INPUT_TOKENS_MAX))
    output = sample_quantiles(lengths["output_tokens"], rng.random()) / OUTPUT_DIVISOR
    prefix = rng.randrange(SHARED_PREFIXES) if rng.random() < SHARED_SHARE else None
    own = f"# request {number}\n" + _text(prompts, rng.randrange(len(prompts)), characters)
    shared = "" if prefix is None else f"# shared {prefix}\n" + _text(prompts, prefix, SHARED_CHARACTERS)
    seeded = rng.random() < SEEDED_SHARE
    return Request(
        number=number,
        prompt=shared + own,
        max_tokens=int(min(max(output, OUTPUT_TOKENS_MIN), OUTPUT_TOKENS_MAX)),
        temperature=0.8 if seeded else 0.0,
        seed=1000 + number if seeded else None,
        n=2 if seeded and rng.random() < PAIR_SHARE else 1,  # two greedy answers would be one
        prefix=prefix,
    )


def _text(prompts: Sequence[str], first: int, characters: int) -> str:
    """So many characters of the prompts one after the other, from the `first` on, and again."""
    parts: list[str] = []
    length, at = 0, first
    while length < characters:
        parts.append(prompts[at % len(prompts)] + "\n")
        length, at = length + len(parts[-1]), at + 1
    return "".join(parts)[:characters]
