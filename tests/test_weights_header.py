"""The header's staircase of errors, agreement with the safetensors library, and that nothing else ever comes out of it."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from ghostserve.errors import BadWeightsFileError, TruncatedWeightsError, UnsupportedError, WeightsError
from ghostserve.weights.dtypes import ELEMENT_TYPES
from ghostserve.weights.header import JSON_BYTES_MAX, Header, parse_header
from weights_kit import entry, raw

A = {"a": entry("F32", [2], 0, 8)}
DEEP = b'{"a":' * 100_000


def parse(data: bytes) -> Header:
    return parse_header(data, file_bytes=len(data), name="x.safetensors")


def accepted_by_the_library(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def with_entries(**entries: Any) -> bytes:
    return raw(entries, b"\0" * 8)


WRONG = {
    "empty file": (b"", TruncatedWeightsError, "0 bytes are not even"),
    "seven bytes": (b"\0" * 7, TruncatedWeightsError, "not even the length"),
    "no header": (bytes(8), BadWeightsFileError, "the header is empty"),
    "huge header": (b"\xff" * 16, BadWeightsFileError, "more than the 100000000"),
    "over the limit": (
        (JSON_BYTES_MAX + 1).to_bytes(8, "little") + b"{}",
        BadWeightsFileError,
        "100000001 bytes is more",
    ),
    "header beyond the end": ((100).to_bytes(8, "little") + b"{}", TruncatedWeightsError, "header alone has 108"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", BadWeightsFileError, "git lfs pull"),
    "zip": (b"PK\x03\x04" + bytes(20), BadWeightsFileError, "convert the model"),
    "pickle": (b"\x80\x02}q\x00" + bytes(20), BadWeightsFileError, "convert the model"),
    "web page": (b"<!DOCTYPE html><html>", BadWeightsFileError, "web page"),
    "no JSON": (raw(b"{nothing"), BadWeightsFileError, "is not JSON"),
    "no object": (raw(b"[1, 2, 3]"), BadWeightsFileError, "does not begin with '{'"),
    "space before": (raw(b" {}"), BadWeightsFileError, "does not begin with '{'"),
    "no UTF-8": (raw(b'{"\xff": 1}'), BadWeightsFileError, "is not JSON"),
    "half a character": (raw(b'{"\\ud800": 1}'), BadWeightsFileError, "is not JSON"),
    "nested": (raw(DEEP), BadWeightsFileError, "is not JSON"),
    "endless number": (raw(b'{"a": ' + b"9" * 5000 + b"}"), BadWeightsFileError, "is not JSON"),
    "text behind": (raw(b"{} {}"), BadWeightsFileError, "is not JSON"),
    "a tensor twice": (
        raw(b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": 1}'),
        BadWeightsFileError,
        "'a' twice",
    ),
    "a field twice": (
        raw(b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}'),
        BadWeightsFileError,
        "'dtype' twice",
    ),
    "metadata twice": (raw(b'{"__metadata__": {}, "__metadata__": {}}'), BadWeightsFileError, "twice"),
    "metadata no table": (raw({"__metadata__": [1]}), BadWeightsFileError, "__metadata__ is not"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), BadWeightsFileError, "__metadata__ is not"),
    "no entry": (raw({"a": 5}), BadWeightsFileError, "not described by an object"),
    "no dtype": (raw({"a": {"shape": [0], "data_offsets": [0, 0]}}), BadWeightsFileError, "dtype 'None'"),
    "dtype unknown": (with_entries(a=entry("F31", [2], 0, 8)), BadWeightsFileError, "dtype 'F31' is unknown"),
    "dtype a list": (with_entries(a={**entry("", [2], 0, 8), "dtype": ["F32"]}), BadWeightsFileError, "unknown"),
    "no shape": (raw({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), BadWeightsFileError, "shape None"),
    "negative shape": (with_entries(a=entry("F32", [-2], 0, 8)), BadWeightsFileError, "shape [-2]"),
    "shape of truth": (raw({"a": entry("U8", [True], 0, 1)}, b"1"), BadWeightsFileError, "shape [True]"),
    "shape of fractions": (with_entries(a=entry("F32", [2.0], 0, 8)), BadWeightsFileError, "shape [2.0]"),  # type: ignore[list-item]
    "one offset": (raw({"a": {**entry("U8", [0], 0, 0), "data_offsets": [0]}}), BadWeightsFileError, "two offsets"),
    "negative offset": (with_entries(a=entry("F32", [2], -8, 0)), BadWeightsFileError, "[-8, 0]"),
    "not a number": (raw(b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [NaN, 0]}}'), BadWeightsFileError, "nan"),
    "ends before it begins": (with_entries(a=entry("U8", [0], 8, 0)), BadWeightsFileError, "ends at 0, before"),
    "too short for its shape": (with_entries(a=entry("F32", [3], 0, 8)), BadWeightsFileError, "takes 12 bytes"),
    "too long for its shape": (with_entries(a=entry("F32", [1], 0, 8)), BadWeightsFileError, "takes 4 bytes"),
    "half a byte": (raw({"a": entry("F4", [3], 0, 1)}, b"1"), BadWeightsFileError, "takes 1.5 bytes"),
    "overflow to nothing": (raw({"a": entry("F32", [2**62, 2**62, 0], 0, 0)}), BadWeightsFileError, "than any file"),
    "overflow to a fit": (with_entries(a=entry("F32", [2**62 + 2], 0, 8)), BadWeightsFileError, "than any file"),
    "offsets overflow": (with_entries(a=entry("U8", [8], 2**64 - 8, 2**64)), BadWeightsFileError, "two offsets"),
    "overlap": (with_entries(a=entry("F32", [2], 0, 8), b=entry("F32", [1], 4, 8)), BadWeightsFileError, "overlaps"),
    "same bytes": (with_entries(a=entry("F32", [2], 0, 8), b=entry("F32", [2], 0, 8)), BadWeightsFileError, "overlaps"),
    "hole in front": (with_entries(a=entry("F32", [1], 4, 8)), BadWeightsFileError, "a hole of 4 bytes between the header"),
    "hole": (
        with_entries(a=entry("U8", [2], 0, 2), b=entry("U8", [2], 6, 8)),
        BadWeightsFileError,
        "a hole of 4 bytes between tensor 'a' and tensor 'b'",
    ),
    "empty tensor in mid-air": (
        with_entries(a=entry("F32", [2], 0, 8), b=entry("U8", [0], 4, 4)),
        BadWeightsFileError,
        "overlaps",
    ),
    "bytes behind": (raw(A, b"\0" * 9), BadWeightsFileError, "1 bytes behind the last tensor"),
    "bytes missing": (raw(A, b"\0" * 7), TruncatedWeightsError, "an interrupted download"),
    "nothing after the header": (raw(A), TruncatedWeightsError, "an interrupted download"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "kind", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named(data: bytes, kind: type[WeightsError], words: str) -> None:
    with pytest.raises(kind) as caught:
        parse(data)
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert str(caught.value).startswith("x.safetensors: ")
    assert len(str(caught.value)) < 700  # whatever the file says


STRICTER = {"space before", "a tensor twice", "a field twice", "metadata twice", "not a number"}


@pytest.mark.parametrize("name", sorted(WRONG.keys() - STRICTER))
def test_the_library_refuses_it_too(name: str) -> None:
    assert not accepted_by_the_library(WRONG[name][0])


def test_the_first_bytes_alone_do_not_make_a_header() -> None:
    whole = raw(A, b"\0" * 8)
    with pytest.raises(TruncatedWeightsError, match="inside its header"):
        parse_header(whole[:20], file_bytes=len(whole), name="x")


def test_what_is_right_is_read() -> None:
    header = {
        "late": entry("BF16", [2, 2], 4, 12),
        "__metadata__": {"format": "pt"},
        "early": entry("I32", [], 0, 4),
        "none": entry("F8_E4M3", [0, 7], 4, 4),
    }
    whole = raw(json.dumps(header).encode().ljust(400), b"\0" * 12)
    found = parse(whole)
    assert [(span.name, span.begin - 408, span.end - 408) for span in found.tensors] == [
        ("early", 0, 4),
        ("none", 4, 4),
        ("late", 4, 12),
    ]
    assert found.header_bytes == 408
    assert found.metadata == {"format": "pt"}
    assert [span.nbytes for span in found.tensors] == [4, 0, 8]
    assert parse(raw({})).tensors == ()


def test_the_digest_tells_headers_apart() -> None:
    assert parse(raw(A, b"1" * 8)).digest == parse(raw(A, b"2" * 8)).digest
    assert parse(raw(A, b"1" * 8)).digest != parse(raw({"b": A["a"]}, b"1" * 8)).digest


# ---- against the library ---------------------------------------------------------------------------------------------

TORCH = {name: kind for name, kind in ELEMENT_TYPES.items() if kind.torch_name is not None}


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def described(draw: st.DrawFn) -> tuple[str, list[int], bytes]:
    """Type, shape and bytes of a tensor of any type that torch has; many are tiny, odd or empty."""
    dtype = draw(st.sampled_from(sorted(TORCH)))
    least = 0 if TORCH[dtype].per_torch_element == 1 else 1  # the library writes no scalar of a packed type
    shape = draw(st.lists(st.integers(0, 5), min_size=least, max_size=4))
    nbytes = math.prod(shape) * getattr(torch, str(TORCH[dtype].torch_name)).itemsize
    return dtype, shape, draw(st.binary(min_size=nbytes, max_size=nbytes))


def tensor_of(dtype: str, shape: list[int], data: bytes) -> torch.Tensor:
    kind = getattr(torch, str(TORCH[dtype].torch_name))
    if not data:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(kind).reshape(shape)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(NAMES, described(), max_size=6))
def test_what_the_library_writes_is_read_exactly(model: dict[str, tuple[str, list[int], bytes]]) -> None:
    data = save({name: tensor_of(*what) for name, what in model.items()})
    found = {span.name: span for span in parse(data).tensors}
    assert found.keys() == model.keys()
    for name, (dtype, shape, held) in model.items():
        span = found[name]
        assert span.dtype == dtype
        assert ELEMENT_TYPES[dtype].torch_shape(span.shape) == tuple(shape)
        assert data[span.begin : span.end] == held


def test_torch_has_no_half_rows() -> None:
    with pytest.raises(UnsupportedError, match="by 2"):
        ELEMENT_TYPES["F4"].torch_shape((2, 3))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(ELEMENT_TYPES)) | JSON,
        "shape": st.lists(st.integers(-1, 9) | st.integers(), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(0, 20), st.integers(0, 20)) | JSON,
    }
)
HEADERS = st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ENTRIES | JSON, max_size=4)


@settings(deadline=None, max_examples=400)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.tuples(st.binary(max_size=60), st.binary(max_size=20)).map(lambda both: raw(*both)),
        st.tuples(HEADERS, st.binary(max_size=20)).map(lambda both: raw(*both)),
    )
)
def test_nothing_but_our_errors_comes_out(data: bytes) -> None:
    try:
        header = parse(data)
    except BadWeightsFileError:
        return
    assert accepted_by_the_library(data)
    at = header.header_bytes
    for span in header.tensors:
        assert span.begin == at <= span.end <= len(data)
        at = span.end


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_flipped_header_is_refused_or_still_covers_the_file(data: st.DataObject) -> None:
    whole = bytearray(raw({"a": entry("F32", [2, 3], 0, 24), "b": entry("I8", [5], 24, 29)}, bytes(29)))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 30))] = data.draw(st.integers(0, 255))
    try:
        header = parse(bytes(whole))
    except BadWeightsFileError:
        return
    assert sum(span.nbytes for span in header.tensors) == len(whole) - header.header_bytes


def test_the_fuzz_reaches_what_is_right() -> None:
    """Its own control: the same generator's headers are accepted often enough to mean something."""
    right = 0
    rng = np.random.default_rng(1)
    for _ in range(200):
        shape = [int(rng.integers(0, 4)), int(rng.integers(0, 4))]
        nbytes = shape[0] * shape[1] * 2
        right += bool(parse(raw({"a": entry("BF16", shape, 0, nbytes)}, bytes(nbytes))).tensors)
    assert right == 200


def test_a_header_whose_length_looks_like_a_pickle() -> None:
    """0x0280 bytes begin as a pickle does: one file of some thousands."""
    text = json.dumps({"a": entry("U8", [1], 0, 1)}).encode().ljust(0x0280)
    assert raw(text)[:2] == b"\x80\x02"
    assert [span.name for span in parse(raw(text, b"x")).tensors] == ["a"]
