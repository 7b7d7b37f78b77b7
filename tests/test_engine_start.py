"""engine/start.py: how long a replacement may take, by what starts took before."""

from __future__ import annotations

import pytest

from ghostserve.engine.start import START_LEAST_S, Starter


@pytest.mark.parametrize(
    ("took_s", "bound_s"),
    [((), 120.0), ((0.4,), START_LEAST_S), ((15.0, 0.4), 45.0), ((0.4, 90.0), 120.0)],
    ids=["nothing is known", "quick", "the longest counts", "never above the flag"],
)
def test_the_bound_of_a_start(took_s: tuple[float, ...], bound_s: float) -> None:
    starter = object.__new__(Starter)
    starter._timeout_s, starter._took_s = 120.0, None
    for seconds in took_s:
        starter.ready_after(seconds)
    assert starter.bound_s == bound_s
