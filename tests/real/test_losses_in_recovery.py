"""A second loss while the first is repaired, in every phase; both ranks at once; a rank that keeps dying."""

from __future__ import annotations

import pytest

from real.kit import SEEDED, Ask, Served, assert_rebuilt, assert_same

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]
# Where the second loss strikes, and whom: rank 1 is lost first, so 0 is a survivor and 1 the newcomer.
STRIKES = [
    ("leave", 0),
    ("regroup", 0),
    ("regroup", 1),
    ("state", 0),
    ("adopt", 1),
    ("retry", 0),
    *(
        pytest.param(phase, rank, marks=pytest.mark.slow)
        for phase, rank in (("spawn", 1), ("weights", 1), ("state", 1), ("export", 0), ("retry", 1))
    ),
]


@pytest.fixture(autouse=True)
def _healthy(float32: Served):
    float32.settle()
    yield
    float32.server.admin.disarm_faults()
    float32.settle()


@pytest.mark.parametrize(("phase", "second"), STRIKES)
def test_a_second_loss_in_every_phase(float32: Served, phase: str, second: int) -> None:
    """The recovery starts over in a higher epoch. With one parity shard, what both ranks have lost is recomputed."""
    ask = Ask(max_tokens=150)
    reference, before = float32.reference(ask), float32.recoveries()
    epoch = float32.settle()["epoch"]
    float32.arm(point=phase, rank=second, action="kill")
    float32.kill_after(70, 1)
    assert_same(reference, float32.run(ask))
    report = float32.recovery(after=before)
    assert report["ok"], report
    assert report["lost_ranks"] == [1, second], report
    assert report["epoch"] == epoch + 2
    if second == 1:  # one rank's KV is gone, however often
        assert_rebuilt(report, sealed=True)


def test_both_ranks_at_once(float32: Served) -> None:
    """Nobody survives. One parity shard cannot give two shards back: recomputed, and not a token is different."""
    reference, before = float32.reference(SEEDED), float32.recoveries()
    float32.kill_after(70, 0, 1)
    assert_same(reference, float32.run(SEEDED))
    report = float32.recovery(after=before)
    assert report["ok"], report
    assert sorted(report["lost_ranks"]) == [0, 1]
    assert report["path"] == "recompute", report
