"""TP=4 on whatever cores there are: each rank killed once, in one stream each. Slow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from real import kit
from real.kit import SEEDED, Ask, Hurt, Served, assert_rebuilt, assert_same

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
    faulted = four.run(ask, on_token=Hurt(50, lambda: four.kill(rank)), timeout_s=180)
    assert_same(reference, faulted)
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
