"""The bench of eviction policies: its simulator, its bound and its trace, on cases that can be done by hand."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from eviction import OURS, POLICIES, Pool, bound_s, compare, next_loads
from eviction_trace import KEEP_ALIVE_S, Load, Model, loads_of, make


def loads(order: str, *, gap_s: float = 1.0, serves_s: float = 0.5) -> list[Load]:
    """`abca`: a load of model 0, then 1, ..."""
    return [
        Load(at_s=number * gap_s, until_s=number * gap_s + serves_s, model=ord(letter) - ord("a"))
        for number, letter in enumerate(order, start=1)
    ]


def hits(
    policy: str, order: str, models: list[Model], budget_gb: float, *, while_served: bool = False
) -> int:
    return Pool(models, budget_gb, POLICIES[policy], while_served).run(loads(order)).hits


SAME = [Model(size_gb=1.0, cost_s=1.0) for _ in range(4)]


def test_hits_by_hand() -> None:
    assert hits("LRU", "abcabc", SAME, 2.0) == 0, "the cycle that LRU is bad at"
    assert hits("clairvoyant: what is loaded last goes", "abcabc", SAME, 2.0) == 2
    assert hits("LFU, counts of what is in the pool", "aaabcb", SAME, 2.0) == 2
    assert hits("LRU", "aaabcb", SAME, 2.0) == 3
    assert hits("LRU", "aaaa", SAME, 0.5) == 0, "larger than the pool"


def test_where_a_byte_costs_the_same_ours_is_lru() -> None:
    order = "".join(random.Random(1).choices("abcd", k=200))
    models = [Model(size_gb=size, cost_s=size / 2) for size in (1.0, 2.0, 3.0, 4.0)]
    for budget_gb in (4.0, 6.0, 8.0):
        assert hits(OURS, order, models, budget_gb) == hits("LRU", order, models, budget_gb)


def test_what_is_in_use_is_not_evicted() -> None:
    models = SAME[:2]
    long_served = [
        Load(at_s=1, until_s=100, model=0),
        Load(at_s=2, until_s=3, model=1),
        Load(at_s=50, until_s=60, model=0),
    ]
    run = {served: Pool(models, 1.0, POLICIES["LRU"], served).run(long_served) for served in (True, False)}
    assert (run[True].hits, run[False].hits) == (1, 0)


@pytest.mark.parametrize("seed", range(5))
def test_nobody_passes_the_bound(seed: int) -> None:
    rng = random.Random(seed)
    models = [Model(size_gb=rng.choice((1.0, 2.0, 5.0)), cost_s=rng.uniform(0.5, 9.0)) for _ in range(8)]
    order = "".join(rng.choices("abcdefgh", weights=(8, 7, 6, 5, 4, 3, 2, 1), k=150))
    found = compare(models, loads(order), 0.4, while_served=False)
    limit = found.pop("nobody saves more than")["seconds_saved"]
    assert all(figures["seconds_saved"] <= limit + 1e-9 for figures in found.values())
    assert limit < 0.999


def test_the_bound_is_what_can_be_saved_where_everything_fits_or_nothing() -> None:
    order = loads("abab")
    assert bound_s(SAME, order, 100.0) == pytest.approx(2.0, rel=0.02)
    assert bound_s(SAME, order, 1e-9) < 0.05
    assert bound_s(SAME, loads("ab"), 1.0) == 0.0


def test_when_each_is_loaded_again() -> None:
    assert next_loads(loads("aba")) == [3.0, float("inf"), float("inf")]


def test_a_load_is_a_request_that_finds_no_server() -> None:
    times = np.array([0.0, 10.0, 10.0 + KEEP_ALIVE_S, 500.0])
    assert loads_of(times, 3) == [
        Load(at_s=0.0, until_s=10.0 + 2 * KEEP_ALIVE_S, model=3),
        Load(at_s=500.0, until_s=500.0 + KEEP_ALIVE_S, model=3),
    ]
    assert loads_of(np.empty(0), 0) == []


def test_a_trace_is_read_and_the_same_seed_makes_the_same_loads(tmp_path: Path) -> None:
    archive = tmp_path / "trace.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for number, row in enumerate(("0,0.02,1,Gamma,1,50", "600,0.01,1,Weibull,1,100")):
            data = f"{row}\n1200,0,0,,0,0\n".encode()
            about = tarfile.TarInfo(f"t/chunk-{number}-trace.csv")
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    models, made = make(archive, seed=3, two_sources=True)
    assert len(models) == 2
    assert made == make(archive, seed=3, two_sources=True)[1]
    assert made == sorted(made, key=lambda load: load.at_s)
    assert all(load.at_s < 1200 and (load.model == 0) == (load.at_s < 600) for load in made)
