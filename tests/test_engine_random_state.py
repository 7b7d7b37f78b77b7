"""The record of random states, without an engine: what is drawn from it is what would have been drawn."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ghostserve.engine.random_state import RandomState

CPU = torch.device("cpu")
DRAWS: dict[str, Callable[[], object]] = {
    "randint": lambda: np.random.randint(1 << 30),
    "normal": np.random.normal,  # numpy makes two at a time and keeps one
    "nothing": lambda: None,
    "seed": lambda: np.random.seed(5),
    "torch": lambda: torch.rand(3),
}


def next_draws() -> list[object]:
    """What comes next from every global generator."""
    return [
        np.random.randint(1 << 30),
        np.random.normal(),
        np.random.normal(),
        torch.rand(2).tolist(),
    ]


@pytest.fixture(autouse=True)
def _same_start() -> None:
    np.random.seed(3)
    torch.manual_seed(3)


@pytest.mark.parametrize("seed", range(40))
def test_restored_states_draw_the_same(seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(6):
        for _ in range(choose.randrange(4)):
            DRAWS[choose.choice(sorted(DRAWS))]()
        state = RandomState.decode(RandomState.capture(order=[], device=CPU).encode())
        expected = next_draws()
        assert next_draws() != expected  # or the comparison below could not fail
        state.restore_globals(CPU)
        assert next_draws() == expected
        state.restore_globals(CPU)


def test_a_kept_normal_variate_is_noticed() -> None:
    """The second of a pair leaves the generator's words as they are."""
    np.random.normal()
    with_one = RandomState.capture(order=[], device=CPU)
    np.random.normal()
    without = RandomState.capture(order=[], device=CPU)
    assert with_one.numpy_key == without.numpy_key
    assert (with_one.numpy_gauss[0], without.numpy_gauss[0]) == (1, 0)


def test_numpy_is_asked_only_after_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    first = RandomState.capture(order=[], device=CPU)
    asked: list[int] = []
    stock = np.random.get_state
    monkeypatch.setattr(np.random, "get_state", lambda **flags: asked.append(1) or stock(**flags))
    assert RandomState.capture(order=[], device=CPU) == first
    assert not asked
    np.random.randint(2)
    assert RandomState.capture(order=[], device=CPU) != first
    assert asked == [1]
