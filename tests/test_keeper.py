"""The keeper as a real process: encoding, dying, being replaced, and leaving nothing behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ghostserve.arena import handoff
from ghostserve.arena.control import (
    CONTROL_BYTES,
    LANE_FRONT,
    ControlPage,
    Counter,
    Fault,
    FaultAction,
    FaultPoint,
)
from ghostserve.arena.memfd import Segment
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.codec.base import Bytes
from ghostserve.events.kinds import KeeperDied, KeeperGivenUp, KeeperRestarted
from ghostserve.shadow.keeper_client import KeeperClient
from ghostserve.shadow.keeper_messages import (
    Answer,
    EncodeDone,
    EncodeJob,
    Geometry,
    KeeperError,
    Message,
    ScrubDone,
    ScrubJob,
    WipeDone,
    WipeJob,
    from_json,
    to_json,
)
from ghostserve.shadow.keeper_supervisor import KeeperSupervisor
from ghostserve.types import FailureKind

pytestmark = pytest.mark.real  # keepers are processes, and die here

FRAME = 64 << 10
FRAMES = 32
RANKS = 2
GEOMETRY = Geometry(frame_bytes=FRAME, frames=FRAMES, ranks=RANKS, parity_shards=1)
NBYTES = FRAME - 13
DEADLINE_S = 60.0  # of a wait; the keeper runs at low priority, and the machine may be busy


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline_s = monotonic_s() + DEADLINE_S
    while not condition():
        assert monotonic_s() < deadline_s, f"waited {DEADLINE_S} s for {what}"
        sleep_s(0.005)


class Engine:
    """What the engine core does with the keeper: sizes the pool, fills mirrors, submits, collects answers."""

    def __init__(self, address: str, *, job_deadline_s: float = DEADLINE_S, attempts_max: int = 3) -> None:
        self.segments = handoff.fetch_segments(address, timeout_s=DEADLINE_S)
        self.pool = self.segments["pool"]
        self.pool.resize(FRAME * FRAMES)
        rng = np.random.default_rng(1)
        self.pool.array[: FRAME * FRAMES // 2] = rng.integers(0, 256, FRAME * FRAMES // 2, dtype=np.uint8)
        self.answers: list[Answer] = []
        self._arrived = threading.Condition()
        self.client = KeeperClient(
            address, self._take, job_deadline_s=job_deadline_s, attempts_max=attempts_max
        )
        self.client.submit(GEOMETRY)

    def _take(self, answer: Answer) -> None:
        with self._arrived:
            self.answers.append(answer)
            self._arrived.notify_all()

    def wait_answers(self, count: int) -> list[Answer]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.answers) >= count, DEADLINE_S), (
                f"{len(self.answers)} of {count} answers"
            )
        return self.answers

    def frame(self, frame: int, nbytes: int = NBYTES) -> Bytes:
        return self.pool.array[frame * FRAME : frame * FRAME + nbytes]

    def encode_job(self, job: int, mirrors: Sequence[int] = (0, 1), parity: int = 20) -> EncodeJob:
        return EncodeJob(
            job=job,
            block=job,
            generation=1,
            mirrors=tuple(mirrors),
            parity=(parity,),
            nbytes=NBYTES,
            checksums=tuple(zlib.crc32(self.frame(mirror).data) for mirror in mirrors),
        )

    def check_parity(self, job: EncodeJob, answer: Answer) -> None:
        assert isinstance(answer, EncodeDone)
        assert (answer.job, answer.ok) == (job.job, True), answer
        parity = self.frame(job.parity[0])
        assert np.array_equal(parity, self.frame(job.mirrors[0]) ^ self.frame(job.mirrors[1]))
        assert parity.any()
        assert answer.parity_checksums == (zlib.crc32(parity.data),)

    def close(self) -> None:
        self.client.close()
        for segment in self.segments.values():
            segment.close()


@contextlib.contextmanager
def server(
    *, restarts_max: int = 5, job_deadline_s: float = DEADLINE_S, attempts_max: int = 3
) -> Iterator[tuple[KeeperSupervisor, Engine]]:
    with KeeperSupervisor(restarts_max=restarts_max) as supervisor:
        engine = Engine(supervisor.address, job_deadline_s=job_deadline_s, attempts_max=attempts_max)
        try:
            yield supervisor, engine
        finally:
            engine.close()


def arm(supervisor: KeeperSupervisor, action: FaultAction, times: int = 1) -> None:
    for _ in range(times):
        supervisor.control.arm_fault(Fault(point=FaultPoint.KEEPER_ENCODING, rank=0, action=action))


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def keeper_pid(supervisor: KeeperSupervisor) -> int:
    wait_until(lambda: supervisor.control.keeper_pid, "a keeper")
    pid = supervisor.control.keeper_pid
    assert pid is not None
    return pid


# -- its work ------------------------------------------------------------------------------------------


def test_it_encodes_and_wipes() -> None:
    with server() as (supervisor, engine):
        jobs = [engine.encode_job(n, mirrors=(2 * n, 2 * n + 1), parity=20 + n) for n in range(4)]
        for job in jobs:
            engine.client.submit(job)
        for job, answer in zip(jobs, engine.wait_answers(4), strict=True):
            engine.check_parity(job, answer)
        assert engine.client.backlog() == 0
        assert not engine.frame(20, FRAME)[NBYTES:].any()  # beyond nbytes nothing is touched

        before = engine.pool.array.copy()
        held = engine.pool.allocated_bytes()
        engine.client.submit(WipeJob(job=9, frames=(3, 1, 0, 20)))
        assert engine.wait_answers(5)[4] == WipeDone(job=9)
        assert engine.pool.allocated_bytes() == held - 4 * FRAME
        for frame in (0, 1, 3, 20):
            before[frame * FRAME : (frame + 1) * FRAME] = 0
        assert np.array_equal(engine.pool.array, before)

        held = engine.pool.allocated_bytes()
        engine.client.submit(WipeJob(job=10, frames=(5, 6), give_back=False))
        assert engine.wait_answers(6)[5] == WipeDone(job=10)
        assert engine.pool.allocated_bytes() == held
        before[5 * FRAME : 7 * FRAME] = 0
        assert np.array_equal(engine.pool.array, before)
        assert supervisor.control.get(Counter.ENCODE_BYTES_TOTAL) == 4 * RANKS * NBYTES
        assert supervisor.control.get(Counter.KEEPER_RESTARTS) == 0


def test_a_scrub_sees_what_was_there_before_a_later_wipe() -> None:
    """Jobs are done in order: frames that are given up after they were asked about are not found wrong."""
    with server() as (_, engine):
        crcs = tuple(zlib.crc32(engine.frame(frame).data) for frame in (2, 3))
        engine.frame(3)[17] ^= 1
        engine.client.submit(ScrubJob(job=1, frames=(2, 3), nbytes=(NBYTES,) * 2, checksums=crcs))
        engine.client.submit(WipeJob(job=3, frames=(2, 3)))
        assert engine.wait_answers(2) == [ScrubDone(job=1, wrong=(1,)), WipeDone(job=3)]


def test_it_is_modest() -> None:
    with server() as (supervisor, engine):
        wait_until(lambda: engine.client.connected, "a connection")
        pid = keeper_pid(supervisor)
        assert os.getpriority(os.PRIO_PROCESS, pid) >= 10
        assert len(os.listdir(f"/proc/{pid}/task")) == 1
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "numpy" in maps
        assert "torch" not in maps
        assert "vllm" not in maps
        pytest.importorskip("setproctitle")
        assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ghostserve: keeper")


def test_a_mirror_that_differs_from_its_checksum_is_refused() -> None:
    with server() as (supervisor, engine):
        job = engine.encode_job(1)
        engine.frame(1)[NBYTES - 1] ^= 0x80
        engine.client.submit(job)
        answer = engine.wait_answers(1)[0]
        assert isinstance(answer, EncodeDone)
        assert not answer.ok
        assert answer.bad_ranks == (1,)
        assert not engine.frame(20).any()
        assert supervisor.control.get(Counter.CHECKSUM_REFUSALS_TOTAL) == 1
        engine.frame(1)[NBYTES - 1] ^= 0x80
        engine.client.submit(engine.encode_job(2))
        engine.check_parity(engine.encode_job(2), engine.wait_answers(2)[1])


def test_armed_corruption_is_there_to_be_found() -> None:
    with server() as (supervisor, engine):
        arm(supervisor, FaultAction.CORRUPT_PARITY)
        engine.client.submit(engine.encode_job(1))
        answer = engine.wait_answers(1)[0]
        assert isinstance(answer, EncodeDone)
        assert answer.ok
        assert answer.parity_checksums != (zlib.crc32(engine.frame(20).data),)
        arm(supervisor, FaultAction.CORRUPT_MIRROR)
        engine.client.submit(engine.encode_job(2, mirrors=(4, 5)))
        answer = engine.wait_answers(2)[1]
        assert isinstance(answer, EncodeDone)
        assert not answer.ok
        assert answer.bad_ranks == (0,)


def test_a_job_that_raises_concerns_nobody_else() -> None:
    with server() as (supervisor, engine):
        arm(supervisor, FaultAction.RAISE)
        engine.client.submit(engine.encode_job(1))
        engine.client.submit(engine.encode_job(2))
        first, second = engine.wait_answers(2)
        assert not first.ok
        assert first.reason
        assert isinstance(first, EncodeDone)
        assert not first.bad_ranks
        engine.check_parity(engine.encode_job(2), second)
        assert supervisor.control.get(Counter.SHADOW_ERRORS_TOTAL) == 1
        assert supervisor.control.get(Counter.KEEPER_RESTARTS) == 0


# -- its death -----------------------------------------------------------------------------------------


def test_killed_while_encoding_the_next_one_does_the_job() -> None:
    with server() as (supervisor, engine):
        wait_until(lambda: engine.client.connected, "a connection")
        pid = keeper_pid(supervisor)
        arm(supervisor, FaultAction.KILL)
        jobs = [engine.encode_job(n, parity=20 + n) for n in range(3)]
        for job in jobs:
            engine.client.submit(job)
        for job, answer in zip(jobs, engine.wait_answers(3), strict=True):
            engine.check_parity(job, answer)
        assert supervisor.control.get(Counter.KEEPER_RESTARTS) == 1
        assert keeper_pid(supervisor) != pid
        assert not alive(pid)


def test_the_kill_strikes_in_the_middle_and_a_keeper_given_up_costs_only_parity() -> None:
    """With no restart allowed, the half-written parity stays to be seen; the arena stays available."""
    with server(restarts_max=0) as (supervisor, engine):
        arm(supervisor, FaultAction.KILL)
        engine.client.submit(engine.encode_job(1))
        wait_until(lambda: supervisor.control.keeper_given_up, "the supervisor to give up")
        half = NBYTES // 2
        expected = engine.frame(0) ^ engine.frame(1)
        assert np.array_equal(engine.frame(20)[:half], expected[:half])
        assert not engine.frame(20)[half:].any()
        assert engine.answers == []
        assert engine.client.backlog() == 1
        assert supervisor.control.keeper_pid is None
        fetched = handoff.fetch_segments(supervisor.address, timeout_s=DEADLINE_S)
        assert bytes(fetched["pool"].array[:64]) == bytes(engine.frame(0)[:64])
        for segment in fetched.values():
            segment.close()


def test_a_keeper_given_up_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up for good, its jobs would stay open: no frame would be wiped and come back, and in the end nothing be protected."""
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/bin/false")
        supervisor = KeeperSupervisor(restarts_max=1, window_s=1.0)
        wait_until(lambda: supervisor.control.keeper_given_up, "the supervisor to give up")
    with supervisor:
        engine = Engine(supervisor.address, job_deadline_s=DEADLINE_S, attempts_max=3)
        try:
            engine.client.submit(WipeJob(job=1, frames=(0,)))
            assert [answer.job for answer in engine.wait_answers(1)] == [1]
            assert not engine.frame(0).any()
            assert not supervisor.control.keeper_given_up
            told = [event for _, event in supervisor.control.events.look().events]
            assert KeeperGivenUp(deaths=3, window_s=1.0) in told
        finally:
            engine.close()


def test_killed_while_idle_the_next_one_is_ready() -> None:
    with server() as (supervisor, engine):
        engine.client.submit(engine.encode_job(1))
        engine.wait_answers(1)
        pid = keeper_pid(supervisor)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: supervisor.control.get(Counter.KEEPER_RESTARTS) == 1, "a restart")
        assert supervisor.control.ledger.failures(FailureKind.KEEPER) == 1
        engine.client.submit(engine.encode_job(2, parity=21))
        engine.check_parity(engine.encode_job(2, parity=21), engine.wait_answers(2)[1])
        died, restarted = (event for _, event in supervisor.control.events.look().events)
        assert died == KeeperDied(pid=pid, status=-signal.SIGKILL)
        assert restarted == KeeperRestarted(pid=keeper_pid(supervisor), restarts=1)
        assert [answer.job for answer in engine.answers] == [1, 2]


@pytest.mark.real
def test_killed_again_and_again_every_job_is_done_once() -> None:
    with server(restarts_max=50, attempts_max=50) as (supervisor, engine):
        rng = random.Random(7)
        jobs = [engine.encode_job(n, mirrors=(n % 8, 8 + n % 8), parity=16 + n % 8) for n in range(400)]
        for number, job in enumerate(jobs):
            engine.client.submit(job)
            if number % 80 == 40:
                engine.wait_answers(number - rng.randrange(40))
                os.kill(keeper_pid(supervisor), signal.SIGKILL)
        answers = engine.wait_answers(len(jobs))
        assert [answer.job for answer in answers] == [job.job for job in jobs]
        for job, answer in zip(jobs, answers, strict=True):
            engine.check_parity(job, answer)
        assert supervisor.control.get(Counter.KEEPER_RESTARTS) == 5


def test_a_keeper_that_hangs_is_killed_and_replaced() -> None:
    # On a busy machine a good keeper may also take longer than that; it is replaced as well.
    with server(job_deadline_s=0.5, attempts_max=50, restarts_max=50) as (supervisor, engine):
        arm(supervisor, FaultAction.HANG)
        engine.client.submit(engine.encode_job(1))
        engine.check_parity(engine.encode_job(1), engine.wait_answers(1)[0])
        assert supervisor.control.get(Counter.KEEPER_RESTARTS) >= 1


def test_a_job_that_keepers_die_over_is_given_up() -> None:
    with server(attempts_max=2) as (supervisor, engine):
        arm(supervisor, FaultAction.KILL, times=2)
        for number in (1, 2):
            engine.client.submit(engine.encode_job(number))
        first, second = engine.wait_answers(2)
        assert first == EncodeDone(job=1, ok=False, reason="keepers were lost over this job")
        engine.check_parity(engine.encode_job(2), second)
        assert supervisor.control.get(Counter.KEEPER_RESTARTS) == 2


def test_answers_that_the_engine_does_not_take_do_not_end_the_client() -> None:
    with server() as (supervisor, engine):
        engine.client.close()
        taken: list[int] = []

        def take(answer: Answer) -> None:
            taken.append(answer.job)
            raise ValueError("a bug of the engine's")

        client = KeeperClient(supervisor.address, take)
        client.submit(GEOMETRY)
        for number in range(3):
            client.submit(engine.encode_job(number))
        wait_until(lambda: taken == [0, 1, 2], "three answers")
        client.close()
        client.close()
        client.submit(engine.encode_job(9))
        assert taken == [0, 1, 2]


# -- strangers and nonsense ----------------------------------------------------------------------------


class RawEngine:
    """An engine's connection without the client's manners."""

    def __init__(self, address: str, greeting: bytes) -> None:
        deadline_s = monotonic_s() + DEADLINE_S
        while True:
            try:
                self.sock, _ = handoff.connect(address, timeout_s=DEADLINE_S)
                break
            except (ConnectionRefusedError, BlockingIOError):  # not started yet; too many at the door
                assert monotonic_s() < deadline_s
                sleep_s(0.01)
        if greeting:
            self.sock.sendall(greeting)

    def ask(self, data: bytes) -> Message:
        self.sock.sendall(data)
        return from_json(self.sock.recv(1 << 16))


GOOD = EncodeJob(
    job=1,
    block=1,
    generation=1,
    mirrors=(0, 1),
    parity=(2,),
    nbytes=FRAME,
    checksums=(zlib.crc32(b"\5" * FRAME),) * 2,
)


@contextlib.contextmanager
def raw_engine() -> Iterator[RawEngine]:
    """A raw connection, and a pool with fives in frames 0 and 1: in the end still so, and a job works."""
    with KeeperSupervisor() as supervisor:
        raw = RawEngine(supervisor.address, handoff.hello(handoff.Role.ENGINE))
        pool = supervisor.segments["pool"]
        pool.resize(FRAME * FRAMES)
        pool.array[: 2 * FRAME] = 5
        with raw.sock:
            yield raw
            assert (pool.array[: 2 * FRAME] == 5).all()
            assert not pool.array[2 * FRAME :].any()
            raw.sock.sendall(to_json(GEOMETRY))
            assert raw.ask(to_json(GOOD)) == EncodeDone(
                job=1, ok=True, parity_checksums=(zlib.crc32(bytes(FRAME)),)
            )
        assert supervisor.control.get(Counter.KEEPER_RESTARTS) == 0


def test_nonsense_is_answered_and_changes_nothing() -> None:
    nonsense: list[tuple[bytes, int | None]] = [
        (b"nonsense", None),
        (b"{}", None),
        (b'{"kind":"encode","job":5}', 5),
        (b"x" * (80 << 10), None),
        (to_json(WipeDone(job=3)), 3),
    ]
    with raw_engine() as raw:
        for data, job in nonsense:
            error = raw.ask(data)
            assert isinstance(error, KeeperError)
            assert error.job == job


def test_a_geometry_that_cannot_be_is_refused() -> None:
    with raw_engine() as raw:
        for wrong, reason in (
            (replace(GEOMETRY, frames=FRAMES + 1), "33 frames"),
            (replace(GEOMETRY, ranks=255, parity_shards=4), "together at most 256"),
            (replace(GEOMETRY, ranks=0), "0 data and"),
        ):
            error = raw.ask(to_json(wrong))
            assert isinstance(error, KeeperError)
            assert reason in error.reason
        early = raw.ask(to_json(GOOD))
        assert isinstance(early, EncodeDone)
        assert "before the geometry" in early.reason


@pytest.mark.parametrize(
    "wrong",
    [
        replace(GOOD, mirrors=(0, 0)),
        replace(GOOD, mirrors=(0,)),
        replace(GOOD, parity=(1,)),
        replace(GOOD, parity=(FRAMES,)),
        replace(GOOD, parity=()),
        replace(GOOD, nbytes=0),
        replace(GOOD, nbytes=FRAME + 1),
        replace(GOOD, checksums=(1,)),
        WipeJob(job=1, frames=(FRAMES,)),
        WipeJob(job=1, frames=(0, 0)),
        ScrubJob(job=1, frames=(0,), nbytes=(FRAME + 1,), checksums=(0,)),
    ],
)
def test_a_job_that_cannot_be_is_refused(wrong: EncodeJob | ScrubJob | WipeJob) -> None:
    with raw_engine() as raw:
        raw.sock.sendall(to_json(GEOMETRY))
        refused = raw.ask(to_json(wrong))
        assert isinstance(refused, EncodeDone | ScrubDone | WipeDone)
        assert (refused.job, refused.ok) == (1, False)
        assert refused.reason


def test_silent_and_rude_guests_keep_nobody_waiting() -> None:
    with KeeperSupervisor() as supervisor:
        rude = RawEngine(supervisor.address, b"GET / HTTP/1.1")
        assert rude.sock.recv(100) == b""
        silent = [RawEngine(supervisor.address, b"") for _ in range(70)]  # more than are kept
        assert silent[0].sock.recv(100) == b""
        for segment in handoff.fetch_segments(supervisor.address, timeout_s=DEADLINE_S).values():
            segment.close()
        for raw in (rude, *silent):
            raw.sock.close()


def test_the_newest_engine_is_served() -> None:
    with KeeperSupervisor() as supervisor:
        first = RawEngine(supervisor.address, handoff.hello(handoff.Role.ENGINE))
        assert isinstance(first.ask(b"?"), KeeperError)
        second = RawEngine(supervisor.address, handoff.hello(handoff.Role.ENGINE))
        assert isinstance(second.ask(b"?"), KeeperError)
        assert first.sock.recv(100) == b""
        first.sock.close()
        second.sock.close()


STRANGER = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
for place in sys.argv[1:]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(10)
    sock.connect("\\0" + place)
    try:
        sock.sendall(b'{"kind":"hello","role":"rank"}')
        data, fds, _, _ = socket.recv_fds(sock, 4096, 16)
        print("got", data, len(fds))
    except (ConnectionResetError, BrokenPipeError):
        print("got", b"", 0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_gets_no_descriptors() -> None:
    with KeeperSupervisor() as supervisor:
        supervisor.wait_ready(timeout_s=DEADLINE_S)
        RawEngine(supervisor.address, handoff.hello(handoff.Role.ENGINE)).sock.close()  # the keeper listens
        places = [supervisor.address, handoff.front_address(supervisor.address)]
        command = [sys.executable, "-S", "-c", STRANGER, *places]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.stdout.splitlines() == ["got b'' 0"] * 2, result


# -- leaving -------------------------------------------------------------------------------------------

FRONT = """
from ghostserve.clock import sleep_s
from ghostserve.shadow.keeper_supervisor import KeeperSupervisor
supervisor = KeeperSupervisor()
supervisor.wait_ready(timeout_s=20)
while supervisor.control.keeper_pid is None:
    sleep_s(0.01)
print(supervisor.address, supervisor.control.keeper_pid, flush=True)
sleep_s(60)
"""


def listening(address: str) -> bool:
    return address in Path("/proc/net/unix").read_text()


def named_memory(pid: int) -> list[str]:
    """Shared memory with a name in a file system that a process maps or holds; such a name could be left."""
    places = Path(f"/proc/{pid}/maps").read_text().splitlines()
    places += [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    assert any("/memfd:ghostserve-pool" in place for place in places)
    return [place for place in places if "/dev/shm" in place]


def test_a_killed_front_takes_the_keeper_along_and_nothing_is_left() -> None:
    front = subprocess.Popen([sys.executable, "-c", FRONT], stdout=subprocess.PIPE, text=True)
    assert front.stdout is not None
    try:
        address, pid = front.stdout.readline().split()
        wait_until(lambda: f"@{address}\n" in Path("/proc/net/unix").read_text(), "the keeper to listen")
        assert alive(int(pid))
        assert listening(handoff.front_address(address))
        assert named_memory(int(pid)) == named_memory(front.pid) == []
    finally:
        front.kill()
        front.wait(10)
        front.stdout.close()
    wait_until(lambda: not alive(int(pid)), "the keeper to leave")
    assert not listening(address)


def test_the_keeper_leaves_when_the_pipe_ends() -> None:
    """The way out that needs no signal, also where somebody else started it."""
    segments = {name: Segment.create(name, 0) for name in ("staging", "pool", "debug")}
    segments["control"] = Segment.create("control", CONTROL_BYTES)
    ControlPage.format(segments["control"])
    read, write = os.pipe()
    address = handoff.new_address()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "ghostserve.shadow.keeper", "--address", address, "--parent-fd", str(read),
            "--fds", ",".join(f"{name}={segment.fd}" for name, segment in segments.items()),
        ],
        pass_fds=[read, *(segment.fd for segment in segments.values())],
    )  # fmt: skip
    try:
        wait_until(lambda: listening(address), "the keeper to listen")
        process.send_signal(signal.SIGINT)  # a Ctrl-C is for the front process to act on
        for segment in handoff.fetch_segments(address, timeout_s=DEADLINE_S).values():
            segment.close()
        os.close(read)
        os.close(write)
        assert process.wait(10) == 0
        assert not listening(address)
    finally:
        process.kill()
        process.wait(10)
        for segment in segments.values():
            segment.close()


def test_closing_leaves_no_process_no_thread_no_descriptor() -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("keeper-")]

    before = len(os.listdir("/proc/self/fd"))
    with server() as (supervisor, engine):
        engine.client.submit(engine.encode_job(1))
        engine.wait_answers(1)
        pid = keeper_pid(supervisor)
        assert threads()
        assert alive(pid)
        assert listening(supervisor.address)
    assert not threads()
    assert not alive(pid)
    assert not listening(supervisor.address)
    supervisor.close()
    del engine, supervisor
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_supervisor_without_a_keeper_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with KeeperSupervisor(restarts_max=2) as supervisor:
        wait_until(lambda: supervisor.control.keeper_given_up, "the supervisor to give up")
        assert supervisor.control.get(Counter.KEEPER_RESTARTS) == 2
        assert supervisor.control.ledger.failures(FailureKind.KEEPER) == 3, "each death, the last one too"
        supervisor.wait_ready(timeout_s=DEADLINE_S)  # by the front itself
        client = KeeperClient(supervisor.address, lambda answer: None)
        client.submit(GEOMETRY)
        client.submit(WipeJob(job=1, frames=(1,)))
        assert client.backlog() == 1
        assert not client.connected
        began_s = monotonic_s()
        client.close()
        assert monotonic_s() - began_s < 2
        assert ControlPage(supervisor.segments["control"], lane=LANE_FRONT).keeper_pid is None


def test_a_socket_that_takes_no_more_is_no_trouble() -> None:
    """Large wipes fill the socket's buffer; all of them are answered, in order."""
    with server() as (_, engine):
        frames = tuple(range(FRAMES))
        for number in range(200):
            engine.client.submit(WipeJob(job=number, frames=frames))
        assert [answer.job for answer in engine.wait_answers(200)] == list(range(200))
        assert not engine.pool.array.any()


def test_sockets_are_of_the_abstract_kind() -> None:
    """Nothing of ours lies in a file system, so nothing can be left there."""
    address = handoff.new_address()
    with handoff.listen(address) as listener:
        assert isinstance(listener, socket.socket)
        line = next(line for line in Path("/proc/net/unix").read_text().splitlines() if address in line)
        assert line.endswith(f"@{address}")
