"""TP=4 on whatever cores there are: each rank killed once, and any two of them at once with two parity shards. Slow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from real import kit
from real.kit import SEEDED, Ask, Served, assert_rebuilt, assert_same

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = kit.serve(
        tmp_path_factory.mktemp("four"),
        "four",
        "--tensor-parallel-size",
        "4",
        "--dtype",
        "float32",
        "--enforce-eager",
    )
    try:
        yield served
    finally:
        served.server.stop()


@pytest.mark.parametrize("rank", range(4))
def test_each_rank_once(four: Served, rank: int) -> None:
    ask = (Ask(), SEEDED)[rank % 2]
    four.settle()
    reference, before = four.reference(ask), four.recoveries()
    four.kill_after(50, rank)
    assert_same(reference, four.run(ask, timeout_s=180))
    report = four.recovery(after=before)
    assert report["lost_ranks"] == [rank]
    assert_rebuilt(report, sealed=True)


@pytest.mark.parametrize("point", ["after_model", "staged", "after_sample"])
def test_fault_points(four: Served, point: str) -> None:
    four.settle()
    reference, before = four.reference(SEEDED), four.recoveries()
    four.arm(point=point, rank=2, action="kill", skip=60)
    assert_same(reference, four.run(SEEDED, timeout_s=180))
    assert_rebuilt(four.recovery(after=before), sealed=True)


# ---- two at once, of four --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_parities(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = kit.serve(
        tmp_path_factory.mktemp("two-parities"),
        "two-parities",
        *("--tensor-parallel-size", "4", "--parity-shards", "2"),
        *("--dtype", "float32", "--enforce-eager"),
    )
    try:
        yield served
    finally:
        served.server.stop()


@pytest.mark.parametrize("pair", list(itertools.combinations(range(4), 2)), ids=str)
def test_any_two_ranks_at_once(two_parities: Served, pair: tuple[int, int]) -> None:
    """Nothing is recomputed: two parity shards, two survivors."""
    served = two_parities
    served.settle()
    reference, before = served.reference(SEEDED), served.recoveries()
    served.kill_after(60, *pair)
    assert_same(reference, served.run(SEEDED, timeout_s=240))
    report = served.recovery(after=before)
    assert sorted(report["lost_ranks"]) == list(pair)
    assert_rebuilt(report, sealed=True)


def test_three_at_once_are_recomputed(two_parities: Served) -> None:
    """Negative control: more than parity covers cannot be rebuilt, and the tokens are the same in float32 all the same."""
    served = two_parities
    served.settle()
    reference, before = served.reference(SEEDED), served.recoveries()
    served.kill_after(60, 0, 1, 3)
    assert_same(reference, served.run(SEEDED, timeout_s=240))
    report = served.recovery(after=before)
    assert sorted(report["lost_ranks"]) == [0, 1, 3]
    assert report["path"] == "recompute"
    assert report["requests_recomputed"] == 1
