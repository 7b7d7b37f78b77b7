"""The header of a safetensors file, read with distrust: a staircase of checks, each with a sentence of its own. Pure.

    0        8                8 + n                                                  end of file
    ├────────┼────────────────┼──────────┬───────┬──────────────────────────────────┤
    │ n, LE  │ JSON, n bytes  │ tensor   │ tensor│ ...  no hole, no overlap, no rest │
    └────────┴────────────────┴──────────┴───────┴──────────────────────────────────┘

    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {"format": "pt"}}

The same files are accepted as by the safetensors library, plus one rule that it states and does not keep: no key twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ghostserve.errors import BadWeightsFileError, TruncatedWeightsError
from ghostserve.weights.dtypes import ELEMENT_TYPES

LENGTH_BYTES = 8
JSON_BYTES_MAX = 100_000_000
"""The library's limit, too: what is larger is an attack or no header."""
METADATA = "__metadata__"
ELEMENTS_MAX = 2**64 - 1

AGAIN = "download or convert it again"
NOT_SAFETENSORS = {  # how a file begins -> what it is
    b"version ": "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder",
    b"PK\x03\x04": "a zip file, probably of torch.save: convert the model to safetensors",
    b"\x80\x02": "a pickle, probably of torch.save: convert the model to safetensors",
    b"<!DOCTY": f"a web page: {AGAIN}",
    b"GGUF": "a GGUF file: give it the ending .gguf",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpan:
    """Where one tensor lies: bytes `begin` to `end` of the file, not of its data part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Zero where a dimension is."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A header that holds: the tensors cover the file from `header_bytes` to its end, in this order, without a gap."""

    tensors: tuple[TensorSpan, ...]
    header_bytes: int
    digest: str
    """sha256 of the header, length word included."""
    metadata: Mapping[str, str]


def header_bytes(first: bytes, *, file_bytes: int, name: str) -> int:
    """How long the header is, length word included, by the first 8 bytes of the file or more."""
    if file_bytes < LENGTH_BYTES or len(first) < LENGTH_BYTES:
        raise TruncatedWeightsError(
            f"{name}: {file_bytes} bytes are not even the length of a header; {AGAIN}"
        )
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if length == 0:
        raise BadWeightsFileError(f"{name}: the header is empty; {AGAIN}")
    if length > JSON_BYTES_MAX or LENGTH_BYTES + length > file_bytes:  # a right one may begin as others do
        for begin, sentence in NOT_SAFETENSORS.items():
            if first.startswith(begin):
                raise BadWeightsFileError(f"{name}: is {sentence}")
    if length > JSON_BYTES_MAX:
        raise BadWeightsFileError(
            f"{name}: a header of {length} bytes is more than the {JSON_BYTES_MAX} that are allowed; "
            f"this is no safetensors file, or a damaged one: {AGAIN}"
        )
    if LENGTH_BYTES + length > file_bytes:
        raise TruncatedWeightsError(
            f"{name}: {file_bytes} bytes, and its header alone has {LENGTH_BYTES + length}; {AGAIN}"
        )
    return LENGTH_BYTES + length


def parse_header(first: bytes, *, file_bytes: int, name: str) -> Header:
    """The header of a file of `file_bytes` bytes, of which `first` are the first ones, as many as `header_bytes` says.

    `name` is for the errors: BadWeightsFileError, or TruncatedWeightsError where more bytes would have made it right.
    """
    data = header_bytes(first, file_bytes=file_bytes, name=name)
    if len(first) < data:
        raise TruncatedWeightsError(f"{name}: ends inside its header; {AGAIN}")
    entries = _entries(first[LENGTH_BYTES:data], name)
    metadata = _metadata(entries.pop(METADATA, None), name)
    tensors = sorted(
        (_span(tensor, entry, data=data, file=name) for tensor, entry in entries.items()),
        key=lambda span: (span.begin, span.end, span.name),
    )
    _check_cover(tensors, data=data, file_bytes=file_bytes, file=name)
    digest = hashlib.sha256(first[:data]).hexdigest()
    return Header(tensors=tuple(tensors), header_bytes=data, digest=digest, metadata=metadata)


class _TwiceError(ValueError):
    """A key that an object has twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(key)
        found[key] = value
    return found


def _entries(text: bytes, file: str) -> dict[str, Any]:
    """The header as an object, no key twice at any depth."""
    if not text.startswith(b"{"):
        raise BadWeightsFileError(f"{file}: the header does not begin with '{{'; {AGAIN}")
    try:
        entries: dict[str, Any] = json.loads(text.decode(), object_pairs_hook=_object)
        for key in entries:
            key.encode()  # half a character (\ud800) is valid JSON, and no name
    except _TwiceError as error:
        raise BadWeightsFileError(
            f"{file}: the header names {str(error)[:200]!r} twice, so which is meant is unknown; {AGAIN}"
        ) from None
    except (ValueError, RecursionError) as error:  # a syntax error, no UTF-8, a number of thousands of digits
        raise BadWeightsFileError(f"{file}: the header is not JSON ({str(error)[:200]}); {AGAIN}") from None
    return entries


def _metadata(value: object, file: str) -> Mapping[str, str]:
    if value is None:
        return MappingProxyType({})
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise BadWeightsFileError(f"{file}: {METADATA} is not a table of texts; {AGAIN}")
    return MappingProxyType(value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= ELEMENTS_MAX  # no bool, which is an int to Python


def _span(tensor: str, entry: object, *, data: int, file: str) -> TensorSpan:
    """One tensor, with its own figures in agreement."""
    where = f"{file}: tensor {tensor[:200]!r}"
    if not isinstance(entry, dict):
        raise BadWeightsFileError(f"{where}: is not described by an object; {AGAIN}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ELEMENT_TYPES:
        raise BadWeightsFileError(
            f"{where}: dtype {str(dtype)[:50]!r} is unknown; known are {', '.join(ELEMENT_TYPES)}"
        )
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise BadWeightsFileError(
            f"{where}: shape {str(shape)[:100]} is not a list of whole numbers; {AGAIN}"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise BadWeightsFileError(f"{where}: data_offsets {str(offsets)[:100]} are not two offsets; {AGAIN}")
    begin, end = offsets
    if end < begin:
        raise BadWeightsFileError(f"{where}: ends at {end}, before it begins at {begin}; {AGAIN}")
    bits = ELEMENT_TYPES[dtype].bits
    for count in shape:
        bits *= count
        if bits > ELEMENTS_MAX:
            raise BadWeightsFileError(
                f"{where}: shape {str(shape)[:100]} is more than any file can hold; {AGAIN}"
            )
    if bits != 8 * (end - begin):
        raise BadWeightsFileError(
            f"{where}: {dtype} of shape {str(shape)[:100]} takes {bits / 8:.15g} bytes, "
            f"and data_offsets give it {end - begin}; {AGAIN}"
        )
    return TensorSpan(name=tensor, dtype=dtype, shape=tuple(shape), begin=data + begin, end=data + end)


def _check_cover(tensors: list[TensorSpan], *, data: int, file_bytes: int, file: str) -> None:
    """From the header to the end of the file, every byte belongs to exactly one tensor."""
    at, before = data, "the header"
    for span in tensors:
        if span.begin < at:
            raise BadWeightsFileError(f"{file}: tensor {span.name[:200]!r} overlaps {before}; {AGAIN}")
        if span.begin > at:
            raise BadWeightsFileError(
                f"{file}: a hole of {span.begin - at} bytes between {before} and tensor {span.name[:200]!r}; {AGAIN}"
            )
        at, before = span.end, f"tensor {span.name[:200]!r}"
    if at > file_bytes:
        raise TruncatedWeightsError(
            f"{file}: {file_bytes} bytes, and its header promises {at}: an interrupted download or copy; {AGAIN}"
        )
    if at < file_bytes:
        raise BadWeightsFileError(
            f"{file}: {file_bytes - at} bytes behind the last tensor that belong to none; {AGAIN}"
        )
