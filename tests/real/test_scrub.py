"""Silent corruption is found in idle time and made right, before anyone computes with it. TP=2, float32, eager."""

from __future__ import annotations

from typing import Any

import pytest

from ghostserve.testing.oracle import compare_choices
from real.kit import PROMPTS, Ask, Served, assert_rebuilt, assert_same, fresh_salt
from real.test_losses import cached_tokens

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]
RANK, SLOT = 1, 5
LONG = Ask(max_tokens=120)
scrubbed_or_not = pytest.mark.parametrize("scrub", [True, False], ids=["scrubbed", "negative control"])


@pytest.fixture
def served(float32: Served):
    """Nothing of an earlier test is in the shadow, and nothing is scrubbed until the test says so."""
    float32.settle()
    float32.post("/reset_prefix_cache")
    float32.server.set_switch("skip_scrub", True)
    yield float32
    float32.server.admin.disarm_faults()
    float32.settle()
    float32.post("/reset_prefix_cache")  # what a negative control left wrong
    float32.server.set_switch("skip_scrub", False)


def let_it_scrub(served: Served, *, until: str, after: dict[str, Any]) -> dict[str, Any]:
    """Switch the scrub on until a count has risen; the last thing it found.

    A scrub that has not noticed that it was switched off compares live KV a minute later, as ever.
    """
    served.server.set_switch("skip_scrub", False)
    status = served.server.wait_status(
        lambda status: status["scrub"][until] > after[until], timeout_s=75, what=f"{until} above {after}"
    )
    served.server.set_switch("skip_scrub", True)
    finding: dict[str, Any] = status["scrub"]["findings"][-1]
    return finding


def pids(served: Served) -> list[int]:
    return [rank["pid"] for rank in served.server.status()["ranks"]]


@scrubbed_or_not
def test_a_flipped_bit_in_cached_kv(served: Served, scrub: bool) -> None:
    """Put right in place, from the other rank and parity; the next request that hits the block is answered right."""
    ask, salt = Ask(prompt=PROMPTS["json-dump"] * 4, max_tokens=20), fresh_salt()
    reference = served.reference(ask)
    assert_same(reference, served.run(ask, salt=salt))  # fills the cache
    status = served.settle()
    flipped = served.rpc("ghost_corrupt_kv", RANK, SLOT)[RANK]
    if scrub:
        finding = let_it_scrub(served, until="repaired_total", after=status["scrub"])
        assert (finding["part"], finding["index"], finding["block"]) == ("kv", RANK, flipped["block"])
        assert (finding["layers"], finding["slots"]) == ([flipped["layer"]], [SLOT])
        assert finding["remedy"] == "from the other ranks and parity"
        said = served.server.log_tail(lines=200)
        assert f"kv of block {flipped['block']}, rank {RANK}, differs" in said
        assert flipped["layer"] in said
    assert cached_tokens(served, ask, salt) > 0, "the prefix cache was lost"
    answer = served.run(ask, salt=salt)
    assert compare_choices(reference.token_ids, answer.token_ids).identical is scrub
    after = served.server.status()
    assert after["recoveries_total"] == status["recoveries_total"], "nobody was to be replaced"
    assert after["scrub"]["kv_mismatches_total"] - status["scrub"]["kv_mismatches_total"] == int(scrub)
    assert after["scrub"]["refused_total"] == status["scrub"]["refused_total"]


@scrubbed_or_not
def test_a_flipped_byte_in_the_parity(served: Served, scrub: bool) -> None:
    """Found and made anew before the loss, which is a rebuild then; without the scrub it is a recomputation."""
    reference, before = served.reference(LONG), served.recoveries()
    served.arm(point="keeper_encoding", rank=0, action="corrupt_parity")

    def scrub_then_kill() -> None:
        status = served.settle()
        if scrub:
            finding = let_it_scrub(served, until="repaired_total", after=status["scrub"])
            assert (finding["part"], finding["remedy"]) == ("parity", "mirrored anew from live KV")
            served.settle()  # coded again
        served.kill(RANK)
        served.recovery(after=before)

    assert_same(reference, served.run_with_stops(LONG, (60, scrub_then_kill)))
    report = served.recovery(after=before)
    assert report["path"] == ("rebuild" if scrub else "recompute"), report
    if scrub:
        assert_rebuilt(report, sealed=True)


@scrubbed_or_not
def test_a_flipped_byte_in_a_mirror(served: Served, scrub: bool) -> None:
    reference, before = served.reference(LONG), served.recoveries()

    def corrupt() -> dict[str, Any]:
        for _ in range(4):
            flipped = served.rpc("ghost_corrupt_tail", RANK)[RANK]
            if flipped is not None:
                return flipped
            served.one_step()  # the last one has made a block whole: its mirrors go to the keeper
        raise AssertionError("every step makes a block whole")

    def scrub_then_kill() -> None:
        status, flipped = served.settle(), corrupt()
        if scrub:
            finding = let_it_scrub(served, until="repaired_total", after=status["scrub"])
            assert (finding["part"], finding["index"]) == ("mirror", RANK)
            assert (finding["block"], len(finding["slots"])) == (flipped["block"], 1)
            assert finding["layers"] == ["model.layers.0.self_attn.attn"]
        served.kill(RANK)
        served.recovery(after=before)

    assert_same(reference, served.run_with_stops(LONG, (60, scrub_then_kill)))
    report = served.recovery(after=before)
    assert report["path"] == ("rebuild" if scrub else "recompute"), report


def test_what_cannot_be_put_right_is_recomputed(served: Served) -> None:
    """Live KV and the only parity of one block are both wrong: the request starts over, nobody is replaced."""
    ask = Ask(prompt=PROMPTS["json-dump"] * 4, max_tokens=100)
    reference, before = served.reference(ask), pids(served)
    served.post("/reset_prefix_cache")
    counters = served.server.status()["counters"]
    served.arm(point="keeper_encoding", rank=0, action="corrupt_parity")

    def corrupt_and_scrub() -> None:
        status = served.settle()
        assert served.rpc("ghost_corrupt_kv", RANK, SLOT)[RANK] is not None
        let_it_scrub(served, until="refused_total", after=status["scrub"])

    assert_same(reference, served.run_with_stops(ask, (10, corrupt_and_scrub)))
    after = served.server.status()
    assert after["counters"]["requests_recomputed_total"] == counters["requests_recomputed_total"] + 1
    assert after["counters"]["recoveries_total"] == counters["recoveries_total"]
    assert pids(served) == before


def test_it_goes_round_while_nothing_is_wrong(served: Served) -> None:
    """Everything is read again and again, and nothing is found."""
    assert served.run(Ask(max_tokens=60)).error is None
    status = served.settle()
    served.server.set_switch("skip_scrub", False)
    after = served.server.wait_status(
        lambda s: all(
            s["scrub"][part]["rounds"] >= status["scrub"][part]["rounds"] + 1 for part in ("kv", "frames")
        ),
        timeout_s=75,
        what="a round",
    )["scrub"]
    assert after["blocks_total"] > status["scrub"]["blocks_total"]
    assert after["bytes_total"] > status["scrub"]["bytes_total"]
    for kind in ("kv", "mirror", "parity"):
        assert after[f"{kind}_mismatches_total"] == status["scrub"][f"{kind}_mismatches_total"]
