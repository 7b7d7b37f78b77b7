"""What a rank image holds: the parameters of one rank, where each lies in the image, and the image's name in the pool.

    byte 0                                                          a page        a page
    [ small parameters, each at a multiple of 64 bytes ... padding ][ large one  ][ large one  ] ...

A large parameter has pages of its own, so that it can be mapped, and given back, by itself: vLLM's CPU kernels keep
packed copies, after which the raw parameter is of no use. Places follow from names, types and shapes alone, in the order
of the model: whoever built the same model knows where everything is, and the image's own table only has to agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ghostserve.errors import WeightsError

LAYOUT_VERSION = 1
PAGE_BYTES = 4096
ALIGN_BYTES = 64  # as torch's allocator; kernels choose by it
LARGE_BYTES = 64 << 10
UNREADABLE = "its table cannot be read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One tensor. `dtype` is torch's name without `torch.`; `nbytes` goes with `dtype` and `shape`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a parameter lies."""

    parameter: Parameter
    offset: int

    @property
    def large(self) -> bool:
        return self.parameter.nbytes >= LARGE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Places in the order of the model; `small_bytes` are shared by all that are not large, whole pages."""

    places: tuple[Place, ...]
    small_bytes: int
    nbytes: int

    def encode(self) -> bytes:
        """The table that is published with the image."""
        table = [
            [place.parameter.name, place.parameter.dtype, list(place.parameter.shape), place.offset]
            for place in self.places
        ]
        return json.dumps({"version": LAYOUT_VERSION, "nbytes": self.nbytes, "parameters": table}).encode()

    def refuse_other(self, table: bytes) -> None:
        """Raise WeightsError if an image with this table is not one of this model."""
        try:
            self._refuse_other(_decoded(table))
        except RecursionError:  # of comparing, or of printing, what is nested deeply
            raise WeightsError(UNREADABLE) from None

    def _refuse_other(self, theirs: dict[str, Any]) -> None:
        ours = json.loads(self.encode())
        for what in ("version", "nbytes"):
            if ours[what] != theirs.get(what):
                raise WeightsError(f"its {what} is {_short(theirs.get(what))}, not {ours[what]}")
        others = theirs.get("parameters")
        if not isinstance(others, list):
            raise WeightsError(UNREADABLE)
        for mine, other in zip(ours["parameters"], others, strict=False):
            if mine != other:
                raise WeightsError(f"it has {_short(other)} where the model has {mine}")
        if len(ours["parameters"]) != len(others):
            raise WeightsError("it has another number of parameters")


def lay_out(parameters: Iterable[Parameter]) -> Layout:
    """Give each a place. The same parameters in the same order get the same places."""
    known = tuple(parameters)
    small = 0
    offsets: dict[str, int] = {}
    for parameter in known:
        if parameter.nbytes < LARGE_BYTES:
            offsets[parameter.name] = small
            small = _up(small + parameter.nbytes, ALIGN_BYTES)
    end = small = _up(small, PAGE_BYTES)
    for parameter in known:
        if parameter.nbytes >= LARGE_BYTES:
            offsets[parameter.name] = end
            end = _up(end + parameter.nbytes, PAGE_BYTES)
    places = tuple(Place(parameter=parameter, offset=offsets[parameter.name]) for parameter in known)
    return Layout(places=places, small_bytes=small, nbytes=end)


def image_key(*, source: str, made_of: Mapping[str, Any]) -> str:
    """The name of an image: `source` stands for the model's files, `made_of` for all else that the parameters follow from."""
    text = json.dumps({"layout": LAYOUT_VERSION, "source": source, **made_of}, sort_keys=True, default=str)
    return f"rank-{hashlib.sha256(text.encode()).hexdigest()}"


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _decoded(table: bytes) -> dict[str, Any]:
    try:
        decoded = json.loads(table)
    except (ValueError, RecursionError):
        decoded = None
    if not isinstance(decoded, dict):
        raise WeightsError(UNREADABLE)
    return decoded


def _short(value: object) -> str:
    return str(value)[:200]
