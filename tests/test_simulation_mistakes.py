"""The simulation finds bugs: known mistakes, planted one at a time into the product, each found within 1,000 seeds.

Most show in the first few schedules; those that need several things to meet are searched for in several processes.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from ghostserve.testing.simulation.report import run_quietly
from simulation_mistakes import MISTAKES, Found, Mistake, search

SEEDS = 1000
QUICK_SEEDS = 40
CHUNK = 25  # schedules that a process takes at once

SOON = [mistake for mistake in MISTAKES if mistake.soon]
LATE = [mistake for mistake in MISTAKES if not mistake.soon]


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        yield pool


def first(pool: ProcessPoolExecutor, name: str | None, seeds: int) -> Found | None:
    """As `search`, in chunks; what is queued behind the first that finds something is not run."""
    chunks = [pool.submit(search, name, range(at, min(at + CHUNK, seeds))) for at in range(0, seeds, CHUNK)]
    try:
        return next((found for chunk in chunks if (found := chunk.result()) is not None), None)
    finally:
        for chunk in chunks:
            chunk.cancel()


def judge(mistake: Mistake, found: Found | None, seeds: int) -> None:
    assert found is not None, f"{mistake.name}, and nobody noticed in {seeds} schedules"
    print(f"{mistake.name}: seed {found.seed}, {found.violation}")
    assert re.search(mistake.shows, found.violation), (
        f"seed {found.seed} shows another thing: {found.violation}"
    )
    assert run_quietly(found.seed).violation is None, "and it is the mistake that was found"


@pytest.mark.long
@pytest.mark.parametrize("mistake", SOON, ids=lambda mistake: mistake.name)
def test_a_planted_mistake_is_found_soon(mistake: Mistake) -> None:
    judge(mistake, search(mistake.name, range(QUICK_SEEDS)), QUICK_SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", LATE, ids=lambda mistake: mistake.name)
def test_a_planted_mistake_is_found(mistake: Mistake, processes: ProcessPoolExecutor) -> None:
    judge(mistake, first(processes, mistake.name, SEEDS), SEEDS)


@pytest.mark.slow
def test_without_a_mistake_nothing_is_found(processes: ProcessPoolExecutor) -> None:
    assert first(processes, None, SEEDS) is None


def test_a_replacement_that_only_stumbles_is_no_mistake_found() -> None:
    broken = Found(seed=0, violation="event 3: KeyError: 5")
    with pytest.raises(AssertionError, match="shows another thing"):
        judge(MISTAKES[0], broken, QUICK_SEEDS)
    with pytest.raises(AssertionError, match="nobody noticed"):
        judge(MISTAKES[0], None, QUICK_SEEDS)
