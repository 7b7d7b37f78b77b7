"""Real processes that are killed or stop: nothing is poisoned, nothing leaks, and nobody waits longer than it said."""

from __future__ import annotations

import gc
import logging
import mmap
import os
import select
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ghostserve.clock import monotonic_s
from ghostserve.errors import PoolError
from ghostserve.weights import runtime_dir
from ghostserve.weights.pool import Follow, Hit, Lease, Pool, Refused
from ghostserve.weights.pool_start import launch, stop_holder
from ghostserve.weights.pool_types import EntryState, ImageKind
from weights_pool_kit import BUDGET_BYTES, Actor, Place, eventually

pytestmark = pytest.mark.long

MIB = 1 << 20
WANTED = ("k", 4 * MIB, "rank", "m")
DEADLINE_S = 0.3
SLACK_S = 2.0  # of a loaded machine


@pytest.fixture
def actor(place: Place) -> Iterator[Callable[[], Actor]]:
    """Makes client processes that are connected to the holder."""
    made: list[Actor] = []

    def make() -> Actor:
        made.append(Actor())
        assert made[-1].tell("connect", str(place.directory), True, BUDGET_BYTES) is True
        return made[-1]

    yield make
    for one in made:
        one.close()


def opened(pool: Pool) -> Hit | Lease | Follow | Refused:
    return pool.open(WANTED[0], WANTED[1], kind="rank", label="m", reload_cost_s=1.0)


def pidfd_ends(pid: int, *, timeout_s: float) -> bool:
    pidfd = os.pidfd_open(pid)
    try:
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)


# ---- who fills or uses is killed -------------------------------------------------------------------------------------


def test_a_filler_that_is_killed_poisons_nothing_and_the_next_fills(
    place: Place, actor: Callable[[], Actor]
) -> None:
    pool = place.pool()
    filler, heir, third = actor(), actor(), actor()
    assert filler.tell("open", *WANTED)["is"] == "Lease"
    assert filler.tell("fill", 2 * MIB, 0xEE) == 2 * MIB
    assert heir.tell("open", *WANTED)["is"] == "Follow"
    assert third.tell("open", *WANTED)["is"] == "Follow"
    assert place.memory_bytes() > 2 * MIB
    filler.kill()
    assert heir.tell("outcome", 10)["is"] == "Lease"
    assert third.tell("outcome", 10)["is"] == "Follow"
    assert place.memory_bytes() < MIB, "what was half full is freed, and nothing of it is handed on"
    (entry,) = pool.list()
    assert (entry.state, entry.references) == (EntryState.FILLING, 2)
    assert heir.tell("fill", 4 * MIB, 0x11) == 4 * MIB
    assert heir.tell("publish")["is"] == "Hit"
    assert third.tell("outcome", 10)["is"] == "Hit"
    with opened(pool) as hit:  # type: ignore[union-attr]
        assert isinstance(hit, Hit)
        assert os.pread(hit.fd, 4 * MIB, 0) == b"\x11" * 4 * MIB
    assert pool.stats().counts[ImageKind.RANK].abandoned == 1


def test_a_filler_that_is_killed_with_nobody_waiting_leaves_nothing(
    place: Place, actor: Callable[[], Actor]
) -> None:
    pool = place.pool()
    filler = actor()
    filler.tell("open", *WANTED)
    filler.tell("fill", 4 * MIB, 1)
    filler.kill()
    eventually(lambda: pool.stats().used_bytes == 0)
    eventually(lambda: place.memory_bytes() == 0)
    with opened(pool) as lease:  # type: ignore[union-attr]
        assert isinstance(lease, Lease)
        assert os.pread(lease.fd, 4 * MIB, 0) == bytes(4 * MIB)


def test_a_child_that_outlives_its_parent_does_not_keep_the_lease(
    place: Place, actor: Callable[[], Actor]
) -> None:
    pool = place.pool()
    filler = actor()
    filler.tell("open", *WANTED)
    child = filler.tell("fork")
    try:
        filler.kill()
        eventually(lambda: pool.stats().clients == 0)
        assert not pidfd_ends(child, timeout_s=0)
    finally:
        os.kill(child, 9)


def test_those_who_follow_or_use_leak_nothing_when_killed(place: Place, actor: Callable[[], Actor]) -> None:
    pool = place.pool()
    filler, follower = actor(), actor()
    filler.tell("open", *WANTED)
    follower.tell("open", *WANTED)
    follower.kill()
    eventually(lambda: pool.stats().clients == 1)
    filler.tell("fill", 4 * MIB, 7)
    assert filler.tell("publish")["is"] == "Hit"
    assert [entry.references for entry in pool.list()] == [1]
    filler.kill()
    eventually(lambda: pool.stats().clients == 0)
    with opened(pool) as hit:  # type: ignore[union-attr]
        assert isinstance(hit, Hit), "what was published outlives who filled it"
        assert pool.drop("k").in_use == 1
    eventually(lambda: place.memory_bytes() == 0)


def test_many_rounds_leave_no_descriptor_and_no_memory(place: Place) -> None:
    pool = place.pool()

    def round_of(number: int) -> None:
        lease = pool.open(f"k{number}", MIB, kind="rank", label="m", reload_cost_s=1.0)
        follow = pool.open(f"k{number}", MIB, kind="rank", label="m", reload_cost_s=1.0)
        assert isinstance(lease, Lease)
        assert isinstance(follow, Follow)
        os.pwrite(lease.fd, b"x" * MIB, 0)
        if number % 2:
            lease.abandon()
            heir = follow.outcome(timeout_s=10)
            assert isinstance(heir, Lease)
            heir.close()
        else:
            hit = lease.publish()
            assert isinstance(hit, Hit)
            hit.close()
            follow.close()

    def settled() -> tuple[int, int]:
        eventually(lambda: pool.stats().clients == 0)
        pool.drop("m")
        eventually(lambda: sum("socket" in name for name in place.descriptors()) <= 1)
        gc.collect()  # what earlier tests left
        return len(place.descriptors()), len(os.listdir("/proc/self/fd"))

    round_of(0)
    before = settled()
    for number in range(1, 60):
        round_of(number)
    after = settled()
    assert after[0] <= before[0], place.descriptors()
    assert after[1] <= before[1], os.listdir("/proc/self/fd")
    assert place.memory_bytes() == 0


# ---- the holder is killed, or hangs ----------------------------------------------------------------------------------


def test_when_the_holder_is_killed_clients_go_on_and_the_next_starts_another(place: Place) -> None:
    pool = place.pool()
    lease, follow = opened(pool), opened(pool)
    assert isinstance(lease, Lease)
    assert isinstance(follow, Follow)
    first = place.pid
    with mmap.mmap(lease.fd, 4 * MIB) as memory, lease.watermark() as mark, follow.watermark() as seen:
        place.kill()
        memory[:4] = b"more"
        mark.advance(4)
        assert seen.wait(4, timeout_s=5), "filling and following need no holder"
        assert os.pread(follow.fd, 4, 0) == b"more"
        assert Pool.connect(start=False, directory=place.directory) is None
        gone = follow.outcome(timeout_s=5)
        assert isinstance(gone, Refused)
        assert "gone" in gone.reason
    refused = lease.publish()
    assert isinstance(refused, Refused)
    assert isinstance(opened(pool), Refused)
    with pytest.raises(PoolError):
        pool.stats()
    again = place.pool()
    assert place.pid != first
    assert len(place.processes()) == 1
    with opened(again) as fresh:  # type: ignore[union-attr]
        assert isinstance(fresh, Lease)
    with opened(pool) as same:  # type: ignore[union-attr]
        assert not isinstance(same, Refused), "an older Pool finds the new holder"


def test_what_is_mapped_outlives_the_holder(place: Place) -> None:
    pool = place.pool()
    lease = opened(pool)
    assert isinstance(lease, Lease)
    os.pwrite(lease.fd, b"weights", 0)
    hit = lease.publish()
    assert isinstance(hit, Hit)
    with hit, mmap.mmap(hit.fd, 4 * MIB, flags=mmap.MAP_PRIVATE) as mapped:
        assert pool.stop()
        assert mapped[:7] == b"weights"


def test_every_call_to_a_holder_that_hangs_ends_in_time(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.pool()
    pool = Pool(place.directory, timeout_s=DEADLINE_S)
    lease, follow = opened(pool), opened(pool)
    assert isinstance(lease, Lease)
    assert isinstance(follow, Follow)

    def within(call: Callable[[], object], *, at_least_s: float = DEADLINE_S * 0.9) -> object:
        began_s = monotonic_s()
        try:
            return call()
        except PoolError as error:
            return error
        finally:
            assert at_least_s <= monotonic_s() - began_s < DEADLINE_S + SLACK_S

    with place.stopped():
        for start in (True, False):
            connect = within(
                lambda start=start: Pool.connect(  # type: ignore[misc]
                    start=start, directory=place.directory, timeout_s=DEADLINE_S
                )
            )
            assert connect is None
        assert caplog.text.count("no pool for weights in host memory: the holder gives no answer") == 2
        assert isinstance(within(lambda: opened(pool)), Refused)
        assert within(lambda: follow.outcome(timeout_s=DEADLINE_S)) is None
        assert isinstance(within(lease.publish), Refused)
        for call in (
            pool.list,
            pool.stats,
            lambda: pool.pin("m"),
            lambda: pool.unpin("m"),
            lambda: pool.drop("m"),
        ):
            assert isinstance(within(call), PoolError)
        assert len(place.processes()) == 1, "no second one is started beside one that hangs"
    outcome = follow.outcome(timeout_s=10)
    assert isinstance(outcome, Hit), "once it goes on, what was sealed is published"
    outcome.close()
    pool = place.pool()
    eventually(lambda: pool.stats().clients == 0)


def test_a_queue_that_is_full_ends_in_time_too(place: Place) -> None:
    place.pool()
    waiting = []
    try:
        with place.stopped():
            with pytest.raises(TimeoutError):
                while True:
                    waiting.append(runtime_dir.connect(place.directory, timeout_s=0))
            began_s = monotonic_s()
            assert Pool.connect(start=True, directory=place.directory, timeout_s=DEADLINE_S) is None
            assert monotonic_s() - began_s < DEADLINE_S + SLACK_S
    finally:
        for sock in waiting:
            sock.close()
    assert place.pool().list() == []


@pytest.mark.parametrize("hangs", [False, True])
def test_stop_ends_a_holder_also_one_that_hangs(place: Place, hangs: bool) -> None:
    pool = place.pool()
    pid = place.pid
    if hangs:
        os.kill(pid, 19)
    assert stop_holder(place.directory, timeout_s=0.3 if hangs else 10)
    assert place.processes() == []
    if not hangs:
        assert not (place.directory / runtime_dir.SOCKET_NAME).exists()
        assert "ends: asked to" in place.log()
    assert not pool.stop()
    assert not stop_holder(place.directory / "nowhere")


# ---- starting and ending ---------------------------------------------------------------------------------------------


def test_of_many_that_start_one_at_once_all_get_the_same(place: Place, actor: Callable[[], Actor]) -> None:
    actors = [Actor() for _ in range(6)]
    try:
        for one in actors:
            one.begin("connect", str(place.directory), True, BUDGET_BYTES)
        assert [one.answer() for one in actors] == [True] * 6
        eventually(lambda: len(place.processes()) == 1)
        assert place.processes() == [place.pid]
        kinds = [one.tell("open", *WANTED)["is"] for one in actors]
        assert kinds == ["Lease", *["Follow"] * 5]
    finally:
        for one in actors:
            one.close()


def test_a_second_holder_goes_away_and_the_first_stays(place: Place) -> None:
    pool = place.pool()
    first = place.pid
    launch(place.directory, budget_bytes=1)
    eventually(lambda: "there is a holder already" in place.log())
    eventually(lambda: place.processes() == [first])
    assert pool.stats().budget_bytes == BUDGET_BYTES


def test_a_holder_starts_quickly_stays_small_and_belongs_to_nobody(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    inherited = os.memfd_create("inherited", 0)
    os.set_inheritable(inherited, True)
    try:
        began_s = monotonic_s()
        place.pool()
        started_s = monotonic_s() - began_s
    finally:
        os.close(inherited)
    about = Path(f"/proc/{place.pid}")
    status = dict(
        line.split(":\t", 1) for line in (about / "status").read_text().splitlines() if ":\t" in line
    )
    assert started_s < 1.0, "0.13 s on an idle machine"
    assert int(status["VmRSS"].split()[0]) < 32 * 1024
    assert int(status["PPid"]) != os.getpid()
    assert os.getsid(place.pid) not in (os.getsid(0), place.pid)
    assert (about / "cwd").readlink() == Path("/")
    assert (about / "comm").read_text().strip() == "ghostserve:pool"
    assert b"hf_secret" not in (about / "environ").read_bytes()
    loaded = (about / "maps").read_text()
    assert "libpython" in loaded or "python" in loaded
    assert not [name for name in ("numpy", "torch", "vllm") if name in loaded]
    names = place.descriptors()
    assert names.count("/dev/null") == 3
    assert not [name for name in names if "inherited" in name or "pipe:" in name]


def test_an_idle_holder_ends_and_one_in_use_or_with_a_pin_does_not(place: Place) -> None:
    pool = place.pool(idle_timeout_s=0.2)
    pid = place.pid
    lease = opened(pool)
    assert not pidfd_ends(pid, timeout_s=0.6), "somebody has a lease"
    pool.pin("m")
    lease.close()  # type: ignore[union-attr]
    assert not pidfd_ends(pid, timeout_s=0.6), "somebody has pinned something"
    pool.unpin("m")
    assert pidfd_ends(pid, timeout_s=10)
    assert "ends: idle for 0.2 s" in place.log()
    assert not (place.directory / runtime_dir.SOCKET_NAME).exists()


def test_asking_for_numbers_does_not_keep_a_holder_alive(place: Place) -> None:
    pool = place.pool(idle_timeout_s=0.3)
    ends_s = monotonic_s() + 10
    with pytest.raises(PoolError):
        while monotonic_s() < ends_s:
            pool.stats()
    assert Pool.connect(start=False, directory=place.directory) is None


def test_one_that_connects_while_a_holder_ends_gets_the_next(place: Place) -> None:
    """Holders that end at once when idle: whoever comes meets one, its end, or nobody, and gets a holder."""
    with ThreadPoolExecutor(2) as threads:
        pools = list(threads.map(lambda _: place.pool(idle_timeout_s=0.02), range(12)))
    assert len(pools) == 12
    eventually(lambda: place.processes() == [])


def test_a_holder_that_nobody_can_find_any_more_gives_way(place: Place) -> None:
    """As when the user's runtime directory was removed and made anew while processes went on."""
    pool = place.pool()
    first = place.pid
    pool.pin("m")
    place.directory.rename(place.directory.with_name("before"))
    second = place.pool()
    assert place.pid != first
    assert second.list() == []
    with runtime_dir.connect(place.directory.with_name("before"), timeout_s=10):
        place.directory.with_name("before").joinpath(runtime_dir.SOCKET_NAME).unlink()
    # The end of that connection wakes it; without one it looks for its socket twice a minute.
    assert pidfd_ends(first, timeout_s=10)


def test_the_log_of_a_holder_is_bounded(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.pool()
    with caplog.at_level(logging.DEBUG):
        for _ in range(3000):
            sock = runtime_dir.connect(place.directory, timeout_s=10)
            sock.sendall(b"nonsense" * 10)
            sock.close()
    place.pool()
    sizes = [path.stat().st_size for path in place.directory.glob("holder.log*")]
    assert 0 < sum(sizes) <= 2 * 256 * 1024
    assert len(sizes) == 2, "it was written to more than once around"
