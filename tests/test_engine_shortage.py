"""When it is told that KV is unprotected: once an episode, however often blocks lose their copy and get it back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ghostserve.engine.guard import Guard
from ghostserve.engine.shortage import CALM_S, PAUSE_S, SETTLE_S, Shortage
from ghostserve.events.kinds import Event, KvProtected, KvUnprotected
from test_engine_guard_counts import guard  # noqa: F401


def play(shortage: Shortage, blocks: Iterator[tuple[float, int]]) -> list[tuple[float, Event]]:
    """What is told when."""
    told = (
        (now_s, shortage.look(now_s, unprotected_blocks=number, memory_is_full=True))
        for now_s, number in blocks
    )
    return [(now_s, event) for now_s, event in told if event is not None]


def every_quarter(seconds: float, blocks: Any) -> Iterator[tuple[float, int]]:
    for tick in range(int(seconds * 4)):
        yield tick / 4, blocks(tick / 4)


def test_it_is_told_once_and_so_is_its_end() -> None:
    told = play(Shortage(), every_quarter(100, lambda now_s: 5 if 10 <= now_s < 50 else 0))
    assert told == [
        (10 + SETTLE_S, KvUnprotected(blocks=5, reason="--host-memory is full")),
        (50 + CALM_S, KvProtected()),
    ]


def test_what_is_caught_up_on_at_once_is_not_told() -> None:
    assert play(Shortage(), every_quarter(100, lambda now_s: int(now_s % 5 < SETTLE_S))) == []


@pytest.mark.parametrize("period_s", [2 * SETTLE_S + 1, 2 * CALM_S + 3])
def test_what_comes_and_goes_is_told_at_most_once_a_minute(period_s: float) -> None:
    minutes = 30
    flapping = every_quarter(60 * minutes, lambda now_s: int(now_s % period_s < period_s / 2))
    told = play(Shortage(), flapping)
    begun = [at_s for at_s, event in told if isinstance(event, KvUnprotected)]
    assert 1 <= len(begun) <= minutes
    assert all(later - sooner > PAUSE_S for sooner, later in itertools.pairwise(begun))
    assert len(told) - len(begun) in (len(begun), len(begun) - 1), "in turn"


def test_the_guard_looks_as_it_publishes(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """With no frame free it is for want of memory; what was given up for an error is told by others."""
    now_s, told = [100.0], list[Event]()
    monkeypatch.setattr("ghostserve.engine.guard.monotonic_s", lambda: now_s[0])
    monkeypatch.setattr(
        guard, "page", SimpleNamespace(set=lambda *_: None, events=SimpleNamespace(tell=told.append))
    )
    assert guard.protection is not None
    manifest = guard.protection.manifest
    manifest.pool.allocate(manifest.pool.free_count)
    manifest.unprotected[1] = (0, 32)
    for _ in range(3):
        guard.publish()
        now_s[0] += SETTLE_S
    assert told == [KvUnprotected(blocks=1, reason="--host-memory is full")]
    guard.protection.give_up()
    now_s[0] += 100
    guard.publish()
    now_s[0] += 100
    guard.publish()
    assert len(told) == 1
