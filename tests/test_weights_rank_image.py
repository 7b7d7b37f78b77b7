"""Where parameters lie in an image, and which image is one of this model."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ghostserve.errors import WeightsError
from ghostserve.weights.rank_image import (
    ALIGN_BYTES,
    LARGE_BYTES,
    PAGE_BYTES,
    Parameter,
    image_key,
    lay_out,
)


def parameter(name: str, nbytes: int) -> Parameter:
    return Parameter(name=name, dtype="uint8", shape=(nbytes,), nbytes=nbytes)


SIZES = [("a", 3), ("b", LARGE_BYTES), ("c", 0), ("d", 100), ("e", LARGE_BYTES + 1), ("f", LARGE_BYTES - 1)]
PARAMETERS = [parameter(name, nbytes) for name, nbytes in SIZES]


def test_nothing_overlaps_and_all_is_aligned() -> None:
    layout = lay_out(PARAMETERS)
    assert [place.parameter for place in layout.places] == PARAMETERS
    taken = sorted(
        (place.offset, place.parameter.nbytes) for place in layout.places if place.parameter.nbytes
    )
    for (offset, nbytes), (following, _) in zip(taken, [*taken[1:], (layout.nbytes, 0)], strict=True):
        assert offset + nbytes <= following
    for place in layout.places:
        assert place.offset % (PAGE_BYTES if place.large else ALIGN_BYTES) == 0
        assert place.large == (place.offset >= layout.small_bytes) or not place.parameter.nbytes
    assert layout.nbytes % PAGE_BYTES == 0
    assert layout.small_bytes % PAGE_BYTES == 0


def test_the_same_model_has_the_same_table() -> None:
    lay_out(PARAMETERS).refuse_other(lay_out(PARAMETERS).encode())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda them: [dataclasses.replace(them[0], dtype="int8"), *them[1:]], "int8"),
        (lambda them: [dataclasses.replace(them[0], shape=(1, 3)), *them[1:]], "where the model has"),
        (lambda them: [*them[:-1], dataclasses.replace(them[-1], name="g")], "'g'"),
        (lambda them: them[:-1], "nbytes"),
        (lambda them: [them[0], them[1], *them[3:]], "where the model has"),
        (lambda them: [*them, parameter("h", 0)], "another number"),
    ],
)
def test_another_model_is_refused(change, sentence: str) -> None:
    with pytest.raises(WeightsError, match=sentence):
        lay_out(PARAMETERS).refuse_other(lay_out(change(PARAMETERS)).encode())


@pytest.mark.parametrize("table", [b"", b"\xff", b"[]", b"{}", json.dumps({"version": 2}).encode()])
def test_what_is_no_table_is_refused(table: bytes) -> None:
    with pytest.raises(WeightsError):
        lay_out(PARAMETERS).refuse_other(table)


def test_a_key_says_all_that_matters() -> None:
    made_of = {"rank": 0, "ranks": 2, "config": {"hidden_size": 8}}
    key = image_key(source="s", made_of=made_of)
    assert key == image_key(source="s", made_of=dict(reversed(made_of.items())))
    assert key != image_key(source="t", made_of=made_of)
    assert key != image_key(source="s", made_of={**made_of, "rank": 1})
    assert key != image_key(source="s", made_of={**made_of, "config": {"hidden_size": 9}})
