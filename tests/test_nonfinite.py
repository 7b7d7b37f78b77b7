"""NaN and infinity by their bits: for every kind of number, against torch's own idea of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ghostserve.shadow.nonfinite import ELEMENTS, NonFinite, count_nonfinite


def dtype_of(element: str) -> torch.dtype:
    dtype = getattr(torch, element)
    assert isinstance(dtype, torch.dtype)
    return dtype


def reference(log: np.ndarray, element: str) -> NonFinite:
    """As torch reads it, which every float32 can tell apart."""
    numbers = torch.from_numpy(log.copy()).view(dtype_of(element)).to(torch.float32)
    return NonFinite(nan=int(numbers.isnan().sum()), inf=int(numbers.isinf().sum()))


@pytest.mark.parametrize("element", sorted(ELEMENTS))
def test_every_pattern_of_a_small_kind_and_random_ones_of_a_large(element: str) -> None:
    size = dtype_of(element).itemsize
    rng = np.random.default_rng(size)
    if size <= 2:
        log = np.arange(256**size, dtype=f"<u{size}").view(np.uint8)
    else:
        words = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
        words[::50] |= 0x7F800000  # far more that are none than chance would give
        words[::150] &= 0xFF800000
        log = words.view(np.uint8)
    expected = reference(log, element)
    assert count_nonfinite(log, element) == expected
    assert expected.nan
    assert bool(expected.inf) is (element != "float8_e4m3fn")


@pytest.mark.parametrize("element", sorted(ELEMENTS))
def test_the_largest_numbers_are_numbers(element: str) -> None:
    dtype = dtype_of(element)
    limits = torch.finfo(dtype)
    numbers = torch.tensor([limits.max, limits.min, 0.0, -0.0, limits.tiny], dtype=torch.float64).to(dtype)
    log = numbers.view(torch.uint8).numpy()
    assert count_nonfinite(log, element) == NonFinite()
    assert not count_nonfinite(log, element)


@pytest.mark.parametrize("element", sorted(ELEMENTS))
def test_one_among_many_is_found_wherever_it_is(element: str) -> None:
    dtype = dtype_of(element)
    for place in (0, 500, 1023):
        numbers = torch.ones(1024, dtype=torch.float32)
        numbers[place] = float("nan")
        log = numbers.to(dtype).view(torch.uint8).numpy()
        assert count_nonfinite(log, element) == NonFinite(nan=1)


def test_what_is_not_known_is_not_looked_at() -> None:
    log = np.full(64, 0xFF, dtype=np.uint8)
    assert count_nonfinite(log, "") == NonFinite()
    assert count_nonfinite(log, "int8") == NonFinite()
    assert count_nonfinite(log[:0], "float32") == NonFinite()
    assert count_nonfinite(log[:7], "float32") == NonFinite(nan=1)  # and three bytes that are no number
