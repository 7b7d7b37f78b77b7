"""One rank dies; every open stream goes on with the tokens it would have had. TP=2, float32, eager."""

from __future__ import annotations

import signal
import threading
from typing import Any

import psutil
import pytest

from ghostserve.clock import monotonic_s
from ghostserve.testing.client import StopStreaming
from real.kit import (
    LONG_PROMPT,
    LONG_SEEDED,
    PROMPTS,
    SEEDED,
    SEEDED_PAIR,
    Ask,
    Hurt,
    Served,
    assert_rebuilt,
    assert_same,
    fresh_salt,
)

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]
RANKS = [0, 1]
POINTS = ["before_model", "after_model", "staged", "before_sample", "after_sample", "before_reply"]


@pytest.fixture(autouse=True)
def _healthy(float32: Served):
    """Each case starts and ends with a server that serves, all of it protected."""
    float32.settle()
    yield
    float32.server.admin.disarm_faults()
    float32.settle()


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(
    "ask",
    [Ask(), SEEDED, SEEDED_PAIR, Ask(presence_penalty=0.6)],
    ids=["greedy", "seeded", "seeded-n2", "penalised"],
)
def test_kill_in_decode(float32: Served, ask: Ask, rank: int) -> None:
    reference, before = float32.reference(ask), float32.recoveries()
    pid = float32.settle()["ranks"][rank]["pid"]
    float32.kill_after(40, rank)
    faulted = float32.run(ask)
    assert_same(reference, faulted)
    report = float32.recovery(after=before)
    assert report["lost_ranks"] == [rank]
    assert report["lost_pids"] == [pid]
    assert_rebuilt(report, sealed=True)


@pytest.mark.parametrize("rank", RANKS)
def test_kill_between_two_steps(float32: Served, rank: int) -> None:
    """From outside, by the server's route, while requests are open and no step is."""
    killed: dict[str, Any] = {}
    reference, before = float32.reference(SEEDED), float32.recoveries()
    faulted = float32.run_with_stops(SEEDED, (40, lambda: killed.update(float32.kill(rank))))
    assert_same(reference, faulted)
    report = float32.recovery(after=before)
    assert report["lost_pids"] == [killed["pid"]]
    assert_rebuilt(report, sealed=True)


def test_kill_before_anything_is_sealed(float32: Served) -> None:
    """Everything comes back from mirrors: the only block is a tail."""
    ask = Ask(max_tokens=20)
    reference, before = float32.reference(ask), float32.recoveries()
    float32.post("/reset_prefix_cache")
    float32.wait_now(lambda s: s["shadow"]["coded_blocks"] == 0, timeout_s=15, what="an empty shadow")
    float32.arm(point="staged", rank=1, action="kill", skip=8)
    assert_same(reference, float32.run(ask))
    report = float32.recovery(after=before)
    assert_rebuilt(report, sealed=False)
    assert report["kv_blocks_from_parity"] == 0
    assert report["kv_blocks_from_mirrors"] == 1


def test_mirrors_of_coded_blocks_are_freed(float32: Served) -> None:
    """Before the kill only the tail is mirrored; all sealed blocks must come from parity."""
    ask, status = Ask(max_tokens=150), {}

    def kill() -> None:
        status.update(float32.settle())
        float32.kill_after(0, 0)

    reference, before = float32.reference(ask), float32.recoveries()
    faulted = float32.run_with_stops(ask, (70, kill))
    assert_same(reference, faulted)
    shadow = status["shadow"]
    assert shadow["mirror_bytes"] <= 2 * 2 * shadow["frame_bytes"], shadow  # a tail, perhaps one just sealed
    report = float32.recovery(after=before)
    assert_rebuilt(report, sealed=True)
    assert report["kv_blocks_from_mirrors"] <= 2


@pytest.mark.parametrize("rank", RANKS)
def test_kill_while_idle(float32: Served, rank: int) -> None:
    """The next request is right, and so are its hits in the prefix cache."""
    ask, salt, before = Ask(prompt=PROMPTS["json-dump"] * 4), fresh_salt(), float32.recoveries()
    reference = float32.reference(ask)
    assert_same(reference, float32.run(ask, salt=salt))  # fills the cache
    float32.settle()
    float32.kill(rank)
    report = float32.recovery(after=before)
    assert_rebuilt(report, sealed=True)
    hits = cached_tokens(float32, ask, salt)
    assert hits > 0, "the prefix cache was lost"
    assert_same(reference, float32.run(ask, salt=salt))


def cached_tokens(served: Served, ask: Ask, salt: str) -> int:
    body = {**ask.body, "model": "tiny", "cache_salt": salt, "max_tokens": 1}
    usage = served.post("/v1/completions", body)["usage"]
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


@pytest.mark.parametrize("rank", RANKS)
def test_kill_in_chunked_prefill_while_others_decode(float32: Served, rank: int) -> None:
    """A prompt of several chunks is half computed; other streams are in mid-decode. Seeded ones too."""
    asks = [Ask(max_tokens=60), SEEDED, LONG_PROMPT, LONG_SEEDED]
    references = float32.run_together(asks)
    before = float32.recoveries()
    # The first steps are prefill chunks of 256 tokens: strike in the fourth.
    float32.arm(point="after_model", rank=rank, action="kill", skip=3)
    faulted = float32.run_together(asks)
    for reference, result in zip(references, faulted, strict=True):
        assert_same(reference, result)
    assert_rebuilt(float32.recovery(after=before), sealed=True)


def test_eight_streams_of_mixed_lengths(float32: Served) -> None:
    asks = [
        Ask(prompt=prompt, max_tokens=40 + 12 * index, temperature=0.8 * (index % 2), seed=index)
        for index, prompt in enumerate([*PROMPTS.values(), *PROMPTS.values()][:8])
    ]
    references = float32.run_together(asks)
    before = float32.recoveries()
    float32.kill_after(20, 1)  # steps: then all of them are in mid-answer
    faulted = float32.run_together(asks)
    for reference, result in zip(references, faulted, strict=True):
        assert_same(reference, result)
    assert_rebuilt(float32.recovery(after=before), sealed=True)


@pytest.mark.parametrize("ranks", [(1, 0), (1, 1)], ids=["different", "same"])
def test_two_losses_in_one_stream(float32: Served, ranks: tuple[int, int]) -> None:
    ask, before = Ask(max_tokens=150), float32.recoveries()
    reference = float32.reference(ask)
    for steps, rank in zip((40, 80), ranks, strict=True):
        float32.kill_after(steps, rank)
    assert_same(reference, float32.run(ask))
    float32.recovery(after=before + 1)
    assert float32.recoveries() == before + 2
    assert [report["lost_ranks"] for report in float32.server.status()["recoveries"][-2:]] == [
        [rank] for rank in ranks
    ]
    for report in float32.server.status()["recoveries"][-2:]:
        assert_rebuilt(report, sealed=True)


@pytest.mark.parametrize(
    ("point", "rank"),
    [
        pytest.param(point, rank, marks=[pytest.mark.slow] * ((rank + index) % 2))
        for index, point in enumerate(POINTS)
        for rank in RANKS
    ],
)
def test_kill_at_a_fault_point(float32: Served, point: str, rank: int) -> None:
    """Torn steps: before the forward, after it, staged, sampled, not answered yet."""
    reference, before = float32.reference(SEEDED), float32.recoveries()
    float32.arm(point=point, rank=rank, action="kill", skip=70)
    faulted = float32.run(SEEDED)
    assert_same(reference, faulted)
    report = float32.recovery(after=before)
    assert report["lost_ranks"] == [rank]
    assert_rebuilt(report, sealed=True)


def test_burst_of_arrivals_and_aborts(float32: Served) -> None:
    """Requests that arrive or are aborted during a recovery are handled as usual after it."""
    asks = [Ask(prompt=prompt, max_tokens=50) for prompt in PROMPTS.values()]
    references = [float32.reference(ask) for ask in asks]
    before = float32.recoveries()
    results: dict[int, object] = {}

    def one(position: int) -> None:
        results[position] = float32.run(asks[position])

    def leave(*_) -> None:
        raise StopStreaming

    late = [threading.Thread(target=one, args=(position,)) for position in range(len(asks))]

    def arrive() -> None:
        for thread in late:
            thread.start()

    gone = threading.Thread(target=lambda: float32.run(Ask(max_tokens=400), on_token=Hurt(60, leave)))
    float32.post("/pause?mode=keep&clear_cache=false")
    float32.kill_after(20, 0)
    gone.start()
    float32.wait_for_open(1)
    float32.post("/resume")
    faulted = float32.run(asks[0], on_token=Hurt(10, arrive))
    for thread in [*late, gone]:
        thread.join(timeout=90)
        assert not thread.is_alive()
    assert_same(references[0], faulted)
    for position, reference in enumerate(references):
        assert_same(reference, results[position])
    assert_rebuilt(float32.recovery(after=before), sealed=False)


def test_status_answers_during_the_outage(float32: Served) -> None:
    seen: list[str] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.02):
            seen.append(float32.server.status()["state"])

    looker = threading.Thread(target=look)
    looker.start()
    float32.arm(point="adopt", rank=1, action="slow", argument=300)  # long enough to be looked at
    float32.kill_after(60, 1)
    try:
        float32.run(Ask())
    finally:
        stop.set()
        looker.join(timeout=20)
    assert "recovering" in seen, set(seen)
    assert float32.server.status()["state"] == "serving"


@pytest.mark.usefixtures("unscrubbed")
def test_who_has_nothing_to_do_takes_no_processor(float32: Served) -> None:
    """Engine core, workers, standby and keeper, once vLLM's ranks have stopped spinning for a message, some seconds later.

    The front process answers this test.
    """
    float32.settle()
    processes = psutil.Process(float32.server.pid).children(recursive=True)
    assert len(processes) >= 5

    def used_s() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    share, deadline_s = 1.0, monotonic_s() + 30
    while share >= 0.15 and monotonic_s() < deadline_s:
        began_s, before_s = monotonic_s(), used_s()
        for _ in range(4):  # statuses, which are written a few times per second
            float32.wait_now(lambda _: True, timeout_s=20, what="a status")
        share = (used_s() - before_s) / (monotonic_s() - began_s)
    assert share < 0.15, f"{share:.0%} of a core"


def test_titles_after_a_replacement(float32: Served) -> None:
    """Workers keep vLLM's titles, also the replaced ones."""
    import psutil

    for rank in float32.server.status()["ranks"]:
        title = " ".join(psutil.Process(rank["pid"]).cmdline())
        assert title.startswith(f"VLLM::Worker_TP{rank['rank']}"), title


@pytest.mark.parametrize("point", ["spawn", "weights"])
def test_a_replacement_that_dies_while_starting(float32: Served, point: str) -> None:
    """The next one takes its place; survivors waiting for the first are not given up, nor is their KV."""
    ask = Ask(max_tokens=150)
    reference, before = float32.reference(ask), float32.recoveries()
    pid = float32.settle()["ranks"][1]["pid"]
    float32.arm(point=point, rank=1, action="kill")
    float32.kill_after(70, 1)
    assert_same(reference, float32.run(ask))
    report = float32.recovery(after=before)
    assert_rebuilt(report, sealed=True)
    assert report["lost_ranks"] == [1, 1]
    assert report["lost_pids"][0] == pid
    assert len(set(report["lost_pids"])) == 2, "the replacement that died is not told"
    assert float32.server.status()["ranks"][1]["pid"] not in report["lost_pids"]


@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_fork_server_that_is_gone_or_stopped(float32: Served, signum: signal.Signals) -> None:
    """Its children go on; the next replacement is started by a new one."""
    ask = Ask(max_tokens=150)
    reference, before = float32.reference(ask), float32.recoveries()
    ranks = float32.server.status()["ranks"]
    fork_server = psutil.Process(ranks[0]["pid"]).parent()
    assert fork_server is not None
    fork_server.send_signal(signum)
    assert_same(reference, float32.run(ask))
    assert float32.recoveries() == before, "nobody else was lost"
    float32.kill_after(70, 1)
    faulted = float32.run(ask, timeout_s=150)
    assert_same(reference, faulted)
    report = float32.recovery(after=before)
    assert_rebuilt(report, sealed=True)
    assert report["lost_ranks"] == [1]
    assert psutil.pid_exists(ranks[0]["pid"])
