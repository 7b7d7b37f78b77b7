"""The same losses under other dtypes, compiled, and with other model families. Each starts one server."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator

import psutil
import pytest

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.engine import leftovers
from ghostserve.testing.server import ServerProcess
from real import families, kit
from real.kit import LONG_PROMPT, PROMPTS, SEEDED, Ask, Served, assert_rebuilt, assert_same

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


def lose_in_turn(served: Served, asks: list[Ask], *, ranks: tuple[int, ...] = (1, 0)) -> None:
    """Kill one rank after the other in the middle of the same batch; all streams must be as without."""
    references = served.run_together(asks)
    again = served.run_together(asks)
    for reference, result in zip(references, again, strict=True):
        assert_same(reference, result)  # failure-free runs agree, or the comparison below would prove nothing
    served.settle()
    before = served.recoveries()
    for rank, steps in zip(ranks, (25, 55), strict=True):
        served.kill_after(steps, rank)
    faulted = served.run_together(asks)
    for reference, result in zip(references, faulted, strict=True):
        assert_same(reference, result)
    served.recovery(after=before + len(ranks) - 1)
    reports = served.server.status()["recoveries"][-len(ranks) :]
    assert [report["lost_ranks"] for report in reports] == [[rank] for rank in ranks]
    for report in reports:
        assert_rebuilt(report, sealed=True)


TEMPORARY_FILES = ("ghostserve", "pymp-", "tmp", "torch", "vllm")
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="compiled mode needs a C++ compiler")
FOUR = [
    Ask(max_tokens=110),
    Ask(prompt=PROMPTS["walk"], max_tokens=90),
    SEEDED,
    Ask(max_tokens=100, temperature=0.9, seed=4),
]


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serving(
        tmp_path_factory, "bfloat16", "--dtype", "bfloat16", "--enforce-eager", "--parity-shards", "2"
    )


def serving(
    factory: pytest.TempPathFactory,
    name: str,
    *flags: str,
    model: str | None = None,
    env: dict[str, str] | None = None,
    serving: str = "v1-sync",
) -> Iterator[Served]:
    directory = factory.mktemp(name)
    path = kit.TINY if model is None else families.build(model, directory / "model")
    served = kit.serve(directory, name, *flags, model=path, env=env, serving=serving)
    try:
        yield served
    finally:
        if served.server.poll() is None:
            assert served.server.stop() == 0, served.server.log_tail(lines=80)


def test_bfloat16(bfloat16: Served) -> None:
    """Batch composition is held equal: in bfloat16 it could round differently otherwise."""
    lose_in_turn(bfloat16, FOUR)


@pytest.mark.slow
def test_twenty_pairs_without_a_failure_are_the_same(bfloat16: Served) -> None:
    """What the oracle rests on: with the batch held equal, failure-free runs agree, in bfloat16 too."""
    asks = [
        Ask(max_tokens=8),
        Ask(max_tokens=8, temperature=0.8, seed=3),
        Ask(prompt=PROMPTS["walk"], max_tokens=8),
    ]
    first = bfloat16.run_together(asks)
    for _ in range(20):
        for reference, result in zip(first, bfloat16.run_together(asks), strict=True):
            assert_same(reference, result)


def lose_with_wrong_parities(served: Served, *, wrong: int) -> None:
    """All parity shards of a stripe but the last are wrong: that one is enough, and nothing is recomputed."""
    ask = Ask(max_tokens=150)
    reference, before = served.reference(ask), served.recoveries()
    refused = served.server.status()["counters"]["checksum_refusals_total"]
    served.arm(point="keeper_encoding", rank=0, action="corrupt_parity")
    with served.unscrubbed():
        faulted = served.run_with_stops(ask, (90, lambda: (served.settle(), served.kill_after(2, 1))))
    assert_same(reference, faulted)
    assert_rebuilt(served.recovery(after=before), sealed=True)
    assert served.server.status()["counters"]["checksum_refusals_total"] == refused + wrong


def test_both_ranks_at_once(bfloat16: Served) -> None:
    """Two parity shards and two ranks: everything comes back from parity, mirrors and staged state alone."""
    references = bfloat16.run_together(FOUR)
    bfloat16.settle()
    before = bfloat16.recoveries()
    bfloat16.kill_after(40, 0, 1)
    for reference, result in zip(references, bfloat16.run_together(FOUR), strict=True):
        assert_same(reference, result)
    report = bfloat16.recovery(after=before)
    assert sorted(report["lost_ranks"]) == [0, 1]
    assert_rebuilt(report, sealed=True)


def test_a_wrong_parity_is_left_out(bfloat16: Served) -> None:
    lose_with_wrong_parities(bfloat16, wrong=1)


@pytest.mark.parametrize("rank", [0, 1])
def test_bfloat16_chunked_prefill(bfloat16: Served, rank: int) -> None:
    asks = [Ask(max_tokens=50), LONG_PROMPT]
    references = bfloat16.run_together(asks)
    before = bfloat16.recoveries()
    bfloat16.arm(point="staged", rank=rank, action="kill", skip=4)
    for reference, result in zip(references, bfloat16.run_together(asks), strict=True):
        assert_same(reference, result)
    assert_rebuilt(bfloat16.recovery(after=before), sealed=True)


@pytest.mark.parametrize(
    ("family", "flags", "how"),
    [
        # torch.compile is vLLM's default: survivors keep their code, the newcomer takes it from the cache.
        pytest.param("qwen3", (), "v1-sync", marks=NEEDS_COMPILER, id="qwen3-compiled"),
        pytest.param(
            "moe", ("--enforce-eager", "--parity-shards", "3"), "v1-sync", marks=pytest.mark.slow, id="moe"
        ),
        # Several KV cache groups: their blocks differ in size and in what leaves a window.
        *(
            pytest.param(
                "hybrid-kv",
                ("--enforce-eager",),
                how,
                marks=[] if how == "v1-async" else pytest.mark.slow,
                id=f"hybrid-kv-{how}",
            )
            for how in ("v1-sync", "v1-async", "v2-sync", "v2-async")
        ),
    ],
)
@pytest.mark.timeout(600)
def test_family(
    tmp_path_factory: pytest.TempPathFactory, family: str, flags: tuple[str, ...], how: str
) -> None:
    env = {} if "--enforce-eager" in flags else {"TORCHDYNAMO_DISABLE": "0"}
    common = ("--dtype", "float32", *flags)
    for served in serving(tmp_path_factory, family, *common, model=family, env=env, serving=how):
        compiled = served.rpc("ghost_compiled")
        lose_in_turn(served, FOUR)
        if family == "qwen3":
            assert served.rpc("ghost_compiled") == ["0", "0"], (
                f"a replacement compiled for itself: {compiled} before"
            )
            continue
        if family == "moe":
            lose_with_wrong_parities(served, wrong=2)
            assert_all_end_with_the_front(served.server)
            continue
        long = Ask(prompt=PROMPTS["json-dump"] * 5, max_tokens=30)
        reference, salt, before = served.reference(long), kit.fresh_salt(), served.recoveries()
        assert_same(reference, served.run(long, salt=salt))
        served.settle()
        served.kill(0)  # while idle: what the prefix cache holds must be right afterwards
        served.recovery(after=before)
        assert_same(reference, served.run(long, salt=salt))
        served.server.record_processes()
        os.kill(served.server.pid, signal.SIGINT)
        assert served.server.wait_exit(timeout_s=30) == 130, served.server.log_tail()
        assert not left_behind(served.server)


def test_a_killed_tree_leaves_nothing(bfloat16: Served) -> None:
    """SIGKILL of every process of the server, children first; the next start sweeps what has a name."""
    server = bfloat16.server
    server.record_processes()
    kill_tree(server.pid)
    await_end_of_processes(server)
    server.wait_exit(timeout_s=10)
    assert server.leaks().shared_memory, "negative control: vLLM's segments have names, and nobody was left"
    leftovers.sweep()
    assert not left_behind(server)


def assert_all_end_with_the_front(server: ServerProcess) -> None:
    """SIGKILL of the front process alone: engine core, workers and keeper end, and clean up after it."""
    server.record_processes()
    os.kill(server.pid, signal.SIGKILL)
    assert not left_behind(server)


def await_end_of_processes(server: ServerProcess) -> None:
    deadline_s = monotonic_s() + 30
    while server.leaks().processes and monotonic_s() < deadline_s:
        sleep_s(0.1)
    assert not server.leaks().processes, "processes outlive the front"


def left_behind(server: ServerProcess) -> list[object]:
    """Processes, segments, and files of the kinds that a server makes, if they stay.

    Others use the temporary directory, too, and what they put there for a moment has the same names.
    """
    deadline_s = monotonic_s() + 30
    while True:
        leaks = server.leaks()
        files = [name for name in leaks.temporary_files if name.startswith(TEMPORARY_FILES)]
        left = [*leaks.processes, *leaks.shared_memory, *files]
        if not left or monotonic_s() >= deadline_s:
            return left
        sleep_s(0.2)


def kill_tree(pid: int) -> None:
    """Stopped first, so that none has time to clean up."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for sent in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(sent)
