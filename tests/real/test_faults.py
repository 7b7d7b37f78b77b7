"""Every fault by name: it strikes the real thing, and the tokens stay what they were. TP=2, float32, eager."""

from __future__ import annotations

import pytest

from ghostserve.testing.oracle import compare_choices
from real.kit import SEEDED, Served, assert_rebuilt, assert_same

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]


@pytest.fixture(autouse=True)
def _healthy(float32: Served):
    float32.settle()
    yield
    float32.server.admin.disarm_faults()
    float32.settle()


@pytest.fixture
def poisoned(float32: Served):
    """For a test that leaves wrong KV behind on purpose: nothing of it stays in the prefix cache."""
    yield
    float32.settle()
    float32.post("/reset_prefix_cache")


def struck(served: Served) -> int:
    return int(served.server.status()["counters"]["faults_struck_total"])


# -- silent corruption ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
def test_corrupt_kv_changes_what_follows(float32: Served) -> None:
    """The negative control of every test that corrupts KV: nobody looks, and the answer is another."""
    before, reference = struck(float32), float32.reference(SEEDED)
    float32.arm(point="staged", rank=1, action="corrupt_kv", skip=30)
    faulted = float32.run(SEEDED)
    assert struck(float32) == before + 1
    verdict = compare_choices(reference.token_ids, faulted.token_ids)
    assert verdict.first_difference is not None
    assert verdict.first_difference > 30


def test_corrupt_kv_of_a_rank_that_dies_in_the_same_step(float32: Served) -> None:
    """The mirror was taken before: what is restored is what the rank should have held."""
    before, reference = float32.recoveries(), float32.reference(SEEDED)
    float32.arm(point="staged", rank=1, action="corrupt_kv", skip=30)
    float32.arm(point="before_reply", rank=1, action="kill", skip=30)
    assert_same(reference, float32.run(SEEDED))
    assert_rebuilt(float32.recovery(after=before), sealed=False)
