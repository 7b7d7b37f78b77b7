"""The same losses under the other model runner and the other scheduling: a part of the matrix, one server each.

`pytest --serving ...` runs all of it (test_losses.py, test_ladder.py), by default with V1 and two batches in flight. The KV
pool is small here, so that requests are preempted while others are in flight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

from ghostserve.testing.client import StopStreaming
from ghostserve.testing.oracle import compare_choices
from real import kit
from real.kit import PROMPTS, SEEDED_PAIR, Ask, Hurt, Served, assert_rebuilt, assert_same

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]
SMALL_POOL = ("--kv-cache-memory-bytes", str(7 << 19), "--max-model-len", "768")
SERVINGS = ("v2-async", "v2-sync", "v1-async")  # V2 is interpreted here: slow
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in SERVINGS]
whole = pytest.mark.parametrize("served", SLOW, indirect=True)
part = pytest.mark.parametrize("served", [SERVINGS[0], *SLOW[1:]], indirect=True)


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    name = request.param
    flags = ("--dtype", "float32", "--enforce-eager", *SMALL_POOL)
    served = kit.serve(tmp_path_factory.mktemp(name), name, *flags, serving=name)
    try:
        yield served
    finally:
        assert served.server.stop() == 0, served.server.log_tail(lines=80)


@pytest.fixture(autouse=True)
def _healthy(served: Served) -> Iterator[None]:
    served.settle()
    yield
    served.server.admin.disarm_faults()
    for name in ("skip_restore", "force_recompute", "skip_rng_restore"):
        served.server.set_switch(name, False)
    served.settle()


@part
def test_it_is_served_as_asked(served: Served, request: pytest.FixtureRequest) -> None:
    runner, scheduling = request.node.callspec.params["served"].split("-")
    status = served.server.status()
    assert status["model_runner"] == runner.upper()
    assert status["async_scheduling"] is (scheduling == "async")
    assert status["max_concurrent_batches"] == (2 if scheduling == "async" else 1)


MIXED = [
    Ask(max_tokens=45),
    Ask(temperature=0.8, seed=11, n=2, max_tokens=40),
    Ask(temperature=0.8, seed=3, max_tokens=30, regex="[a-z ]{200}"),
]
FAULTS = [(1, "after_model", 25), (1, "after_sample", 12), (0, "staged", 33)]


def kill_in_decode(served: Served, *, rank: int, point: str, skip: int) -> None:
    references = served.run_together(MIXED)
    served.settle()
    before = served.recoveries()
    served.arm(point=point, rank=rank, action="kill", skip=skip)
    for reference, result in zip(references, served.run_together(MIXED), strict=True):
        assert_same(reference, result)
    report = served.recovery(after=before)
    assert report["lost_ranks"] == [rank]
    assert_rebuilt(report, sealed=True)


@whole
@pytest.mark.parametrize(("rank", "point", "skip"), FAULTS)
def test_kill_in_decode(served: Served, rank: int, point: str, skip: int) -> None:
    kill_in_decode(served, rank=rank, point=point, skip=skip)


@part
def test_kill_between_forward_and_sampling(served: Served) -> None:
    """In V2 the logits, a collective, are computed with the sampling."""
    kill_in_decode(served, rank=0, point="before_sample", skip=21)


@part
def test_kill_in_chunked_prefill(served: Served) -> None:
    """A prompt of several chunks, the next one always in flight; other streams decode."""
    asks = [Ask(max_tokens=30), Ask(prompt=PROMPTS["json-dump"] * 12, max_tokens=20, temperature=0.8, seed=5)]
    references = served.run_together(asks)
    before = served.recoveries()
    served.arm(point="after_model", rank=0, action="kill", skip=2)
    for reference, result in zip(references, served.run_together(asks), strict=True):
        assert_same(reference, result)
    assert_rebuilt(served.recovery(after=before), sealed=True)


def preemptions(served: Served) -> float:
    text = httpx.get(served.server.base_url + "/metrics", trust_env=False).text
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("vllm:num_preemptions_total")
    )


@whole
@pytest.mark.parametrize("skip", [60, 75])
def test_kill_while_requests_are_preempted(served: Served, skip: int) -> None:
    """More KV is wanted than there is: a step in flight names requests that the next one throws out."""
    asks = [
        Ask(prompt=prompt, max_tokens=110, temperature=0.8 * (index % 2), seed=index)
        for index, prompt in enumerate([*PROMPTS.values(), *PROMPTS.values()][:7])
    ]
    count = preemptions(served)
    references = served.run_together(asks)
    assert preemptions(served) > count, "the pool is too large for this test"
    before = served.recoveries()
    served.arm(point="after_model", rank=1, action="kill", skip=skip)
    for reference, result in zip(references, served.run_together(asks), strict=True):
        assert_same(reference, result)
    assert served.recovery(after=before)["ok"]


@whole
def test_kill_while_requests_stop_and_are_aborted(served: Served) -> None:
    """Requests leave between two batches that name them."""
    ask, before = Ask(max_tokens=60), served.recoveries()
    reference = served.reference(ask)

    def leave(*_: object) -> None:
        raise StopStreaming

    short = [Ask(prompt=prompt, max_tokens=9 + index) for index, prompt in enumerate(PROMPTS.values())]
    shorts = served.run_together(short)
    served.arm(point="before_sample", rank=1, action="kill", skip=9)
    for expected, result in zip(shorts, served.run_together(short), strict=True):
        assert_same(expected, result)
    served.recovery(after=before)
    served.run(Ask(max_tokens=300), on_token=Hurt(20, leave))
    served.kill_after(30, 0)
    assert_same(reference, served.run(ask))
    served.recovery(after=before + 1)
    assert served.recoveries() == before + 2


@whole
def test_forced_recompute(served: Served) -> None:
    """Rung 3: requests leave every batch in flight and start over from their tokens, also one with a grammar."""
    asks = [
        Ask(max_tokens=50),
        Ask(temperature=0.8, seed=7, max_tokens=60),
        Ask(max_tokens=40, regex="[a-z ]{200}"),
    ]
    references = served.run_together(asks)
    assert re.fullmatch("[a-z ]+", references[2].text[0]), "the grammar holds"
    before = served.recoveries()
    served.server.set_switch("force_recompute", True)
    served.arm(point="after_model", rank=1, action="kill", skip=22)
    for reference, result in zip(references, served.run_together(asks), strict=True):
        assert_same(reference, result)
    report = served.recovery(after=before)
    assert (report["path"], report["requests_recomputed"]) == ("recompute", 3)


@whole
def test_a_step_that_always_raises_fails_its_requests_only(served: Served) -> None:
    reference, pids = served.reference(SEEDED_PAIR), [rank["pid"] for rank in served.server.status()["ranks"]]
    for _ in range(2):  # the first try, and the retry
        for rank in (0, 1):
            served.arm(point="before_model", rank=rank, action="raise", skip=20)
    failed = served.run(Ask(max_tokens=60))
    assert failed.error is not None or set(failed.finish_reasons.values()) & {"error", "abort"}, failed
    served.server.admin.disarm_faults()
    assert_same(reference, served.run(SEEDED_PAIR))
    assert [rank["pid"] for rank in served.server.status()["ranks"]] == pids


@whole
def test_without_restore_the_output_changes(served: Served) -> None:
    """Negative control: the oracle can fail."""
    ask = Ask(max_tokens=90)
    reference = served.reference(ask)
    served.server.set_switch("skip_restore", True)
    served.kill_after(40, 1)
    faulted = served.run(ask)
    assert not compare_choices(reference.token_ids, faulted.token_ids).identical
    served.post("/reset_prefix_cache")


@whole
@pytest.mark.parametrize("with_copy", [True, False], ids=["rng restored", "negative control"])
def test_unseeded_ranks_agree(served: Served, with_copy: bool) -> None:
    served.server.set_switch("skip_rng_restore", not with_copy)
    found: list[list[str]] = []
    served.kill_after(20, 1)
    ask = Ask(temperature=0.8, max_tokens=60, presence_penalty=0.2)
    answer = served.run_with_stops(ask, (50, lambda: found.append(served.rpc("ghost_digest"))))
    assert answer.error is None
    ((rank0, rank1),) = found
    assert (rank0 == rank1) is with_copy
