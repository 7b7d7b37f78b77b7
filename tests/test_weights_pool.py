"""The pool over a real holder: what clients get, what it refuses, and what a client can do to others (nothing)."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ghostserve.errors import PoolError
from ghostserve.weights import pool_memory, runtime_dir
from ghostserve.weights import pool_messages as messages
from ghostserve.weights.holder_server import HolderServer
from ghostserve.weights.host_memory import HostMemory
from ghostserve.weights.pool import Follow, Hit, Lease, Pool, Refused
from ghostserve.weights.pool_book import PoolBook
from ghostserve.weights.pool_types import EntryState, ImageKind, Refusal
from weights_pool_kit import BUDGET_BYTES, SOURCE, Place, eventually

MIB = 1 << 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("pool") / "run")
    yield place
    place.close()


@pytest.fixture
def pool(place: Place) -> Iterator[Pool]:
    """An empty pool; nothing is left in it but what is published, and that is dropped."""
    pool = place.pool()
    yield pool
    eventually(lambda: pool.stats().clients == 0, "a test left something held")
    for entry in pool.list():
        pool.drop(entry.key)
    assert pool.stats().used_bytes == 0


def opened(pool: Pool, key: str = "k", nbytes: int = MIB, *, kind: str = "rank", label: str = "m"):  # type: ignore[no-untyped-def]
    assert kind in ("rank", "file")
    return pool.open(key, nbytes, kind=kind, label=label, reload_cost_s=1.0)  # type: ignore[arg-type]


def published(pool: Pool, data: bytes = b"weights", *, key: str = "k", **more: str) -> Hit:
    lease = opened(pool, key, **more)
    assert isinstance(lease, Lease), lease
    os.pwrite(lease.fd, data, 0)
    hit = lease.publish(b"meta")
    assert isinstance(hit, Hit), hit
    return hit


# ---- lease, follow, hit ----------------------------------------------------------------------------------------------


def test_what_one_fills_others_have(pool: Pool) -> None:
    with published(pool, b"weights"), opened(pool) as hit:
        assert isinstance(hit, Hit)
        assert os.pread(hit.fd, 7, 0) == b"weights"
        assert hit.meta == b"meta"
        assert not os.get_inheritable(hit.fd)
        with mmap.mmap(hit.fd, MIB, flags=mmap.MAP_PRIVATE) as mapped:
            mapped[:2] = b"no"
            assert os.pread(hit.fd, 7, 0) == b"weights", "a change in a private mapping stays private"


def test_who_follows_reads_behind_the_watermark_and_then_has_it(pool: Pool) -> None:
    lease = opened(pool)
    follow = opened(pool)
    assert isinstance(lease, Lease)
    assert isinstance(follow, Follow)
    assert follow.outcome(timeout_s=0.01) is None
    with (
        mmap.mmap(follow.fd, MIB, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as seen,
        follow.watermark() as watermark,
    ):
        with mmap.mmap(lease.fd, MIB) as memory, lease.watermark() as mark:
            assert not watermark.wait(1, timeout_s=0.01)
            memory[:3] = b"abc"
            mark.advance(3)
            assert watermark.wait(3, timeout_s=5)
            assert seen[:3] == b"abc"
        with lease.publish() as hit:  # type: ignore[union-attr]
            assert isinstance(hit, Hit)
            assert watermark.wait(MIB, timeout_s=5)
            followed = follow.outcome(timeout_s=5)
            assert isinstance(followed, Hit)
            followed.close()


def test_a_lease_that_is_abandoned_goes_to_who_follows_on_new_memory(pool: Pool) -> None:
    lease, first, second = (opened(pool) for _ in range(3))
    with mmap.mmap(lease.fd, MIB) as memory:
        memory[:6] = b"poison"
        lease.abandon()
        heir = first.outcome(timeout_s=5)
        assert isinstance(heir, Lease)
        again = second.outcome(timeout_s=5)
        assert isinstance(again, Follow)
        memory[:6] = b"POISON"
        assert os.pread(heir.fd, 6, 0) == bytes(6)
    heir.close()
    last = again.outcome(timeout_s=5)
    assert isinstance(last, Lease)
    last.close()


def test_who_watches_sees_that_nothing_more_comes(pool: Pool) -> None:
    lease, follow = opened(pool), opened(pool)
    with follow.watermark() as watermark:
        lease.abandon()
        eventually(lambda: watermark.abandoned)
        assert not watermark.wait(MIB, timeout_s=60), "at once, and not after a minute"
    follow.close()


def test_published_memory_cannot_be_written_by_anybody(pool: Pool) -> None:
    with published(pool) as hit:
        fd = os.open(f"/proc/self/fd/{hit.fd}", os.O_RDWR)
        try:
            for change in (
                lambda: os.pwrite(fd, b"x", 0),
                lambda: os.ftruncate(fd, 0),
                lambda: os.ftruncate(fd, 1 << 30),
                lambda: mmap.mmap(fd, MIB),
                lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
            ):
                with pytest.raises(PermissionError):
                    change()
        finally:
            os.close(fd)


def test_memory_being_filled_cannot_shrink_below_who_maps_it(pool: Pool) -> None:
    with opened(pool) as lease, pytest.raises(PermissionError):
        os.ftruncate(lease.fd, 0)


def test_what_is_still_mapped_shared_is_not_published(pool: Pool) -> None:
    lease = opened(pool)
    with mmap.mmap(lease.fd, MIB):
        refused = lease.publish()
    assert isinstance(refused, Refused)
    assert "still mapped for writing" in refused.reason
    with opened(pool) as other:
        assert isinstance(other, Lease)


def test_the_holder_publishes_nothing_that_is_not_sealed(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_memory, "seal", lambda fd, nbytes, meta: None)
    lease, follow = opened(pool), opened(pool)
    refused = lease.publish()
    assert isinstance(refused, Refused)
    assert "not sealed" in refused.reason
    heir = follow.outcome(timeout_s=5)
    assert isinstance(heir, Lease), "it goes on as if the filler had died"
    heir.close()


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_full_pool_evicts_what_may_go_and_else_refuses(pool: Pool) -> None:
    held = [published(pool, key=f"k{number}") for number in range(14)]
    refused = opened(pool, "one more", 4 * MIB)
    assert isinstance(refused, Refused)
    assert refused.why is Refusal.IN_USE
    held[3].close()
    held[5].close()
    eventually(lambda: pool.stats().clients == 12)
    with opened(pool, "one more", 3 * MIB) as lease:
        assert isinstance(lease, Lease)
        assert {entry.key for entry in pool.list()}.isdisjoint({"k3", "k5"})
    for hit in held:
        hit.close()


@pytest.mark.parametrize("nbytes", [BUDGET_BYTES, 1 << 50])
def test_a_huge_request_is_refused(pool: Pool, nbytes: int) -> None:
    refused = opened(pool, "huge", nbytes)
    assert isinstance(refused, Refused)
    assert refused.why is Refusal.TOO_LARGE
    assert "--weights-memory" in refused.reason


@pytest.mark.parametrize("nbytes", [0, -1, 1 << 51])
def test_an_impossible_request_is_refused(pool: Pool, nbytes: int) -> None:
    assert isinstance(opened(pool, "k", nbytes), Refused)


def test_a_budget_that_is_given_later_holds_for_all(place: Place, pool: Pool) -> None:
    published(pool, key="a").close()
    place.pool(budget_bytes=4096)
    try:
        assert pool.stats().budget_bytes == 4096
        assert pool.list() == []
        place.pool(budget_bytes=None)
        assert pool.stats().budget_bytes == 4096
    finally:
        place.pool()
    assert pool.stats().budget_bytes == BUDGET_BYTES


def test_a_budget_of_nothing_is_no_pool(place: Place) -> None:
    assert Pool.connect(start=True, budget_bytes=0, directory=place.directory) is None


# ---- people ----------------------------------------------------------------------------------------------------------


def test_pin_unpin_drop_and_list(pool: Pool) -> None:
    with published(pool, key="a"):
        assert pool.pin("m") == 1
        published(pool, key="b").close()
        assert [(entry.key, entry.pinned) for entry in pool.list()] == [("a", True), ("b", True)]
        assert pool.stats().pinned_bytes == pool.stats().used_bytes
        assert pool.unpin("m")
        assert not pool.unpin("m")
        assert pool.drop("m") == messages.Done(entries=2, in_use=1)
        (left,) = pool.list()
        assert (left.key, left.state) == ("a", EntryState.DROPPED)
    eventually(lambda: pool.list() == [])


def test_a_list_longer_than_a_packet_comes_whole(pool: Pool) -> None:
    names = [f"{number:03d}-{'é' * 200}" for number in range(120)]
    for name in names:
        lease = opened(pool, name, 1, label="ü" * 250)
        lease.publish().close()
    assert [entry.key for entry in pool.list()] == names[-len(pool.list()) :]
    assert len(pool.list()) > 100


def test_the_numbers(pool: Pool) -> None:
    before = pool.stats().counts[ImageKind.FILE]
    with published(pool, kind="file"), opened(pool, kind="file"):
        stats = pool.stats()
        assert stats.entries == {ImageKind.FILE: 1, ImageKind.RANK: 0}
        assert stats.bytes[ImageKind.FILE] == stats.referenced_bytes > MIB
        counts = stats.counts[ImageKind.FILE]
        assert (counts.hits - before.hits, counts.misses - before.misses) == (1, 1)


# ---- clients that mean no good ---------------------------------------------------------------------------------------


def raw(place: Place, *packets: bytes, greet: bool = True) -> socket.socket:
    sock = runtime_dir.connect(place.directory, timeout_s=10)
    if greet:
        sock.sendall(messages.to_json(messages.Hello()))
        assert messages.answer_from_json(sock.recv(4096)) == messages.Welcome()
    for packet in packets:
        sock.sendall(packet)
    return sock


GARBAGE = {
    "bytes": b"\xff\x00garbage",
    "no object": b"[1]",
    "deep": b"[" * 8000,
    "unknown": b'{"is":"exec"}',
    "an answer": messages.to_json(messages.Welcome()),
    "a field too many": b'{"is":"publish","meta_bytes":0,"x":1}',
    "a wrong type": b'{"is":"publish","meta_bytes":true}',
    "nothing leased": messages.to_json(messages.Publish(meta_bytes=0)),
    "too much meta": messages.to_json(messages.Publish(meta_bytes=1 << 40)),
    "no number": b'{"is":"open","key":"k","nbytes":1,"kind":"rank","label":"m","reload_cost_s":NaN}',
    "a kind of its own": b'{"is":"open","key":"k","nbytes":1,"kind":"x","label":"m","reload_cost_s":1}',
    "a long name": messages.to_json(messages.Ask(what="pin", name="n" * 257)),
    "too long": b'{"is":"' + b"x" * 20000 + b'"}',
}


@pytest.mark.parametrize("packet", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_costs_its_sender_the_connection_and_nobody_else_anything(
    place: Place, pool: Pool, packet: bytes
) -> None:
    with published(pool), raw(place, packet) as sock:
        assert sock.recv(4096) == b""
        with opened(pool) as hit:
            assert isinstance(hit, Hit)


def test_without_a_hello_nothing_is_answered(place: Place, pool: Pool) -> None:
    with raw(place, messages.to_json(messages.Ask(what="status")), greet=False) as sock:
        assert sock.recv(4096) == b""
    assert pool.list() == []


def test_descriptors_that_are_sent_along_are_closed(place: Place, pool: Pool) -> None:
    with raw(place) as sock, open("/dev/zero", "rb") as file:
        socket.send_fds(sock, [messages.to_json(messages.Ask(what="status"))], [file.fileno()] * 8)
        assert sock.recv(4096) == b""
    assert pool.list() == []
    assert "/dev/zero" not in place.descriptors()


def test_one_that_asks_and_never_reads_is_dropped_and_keeps_nobody_waiting(place: Place, pool: Pool) -> None:
    ask = messages.to_json(messages.Ask(what="status"))
    with raw(place) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(5000):
            sock.sendall(ask)
            if _ % 1000 == 0:
                pool.stats()
        pytest.fail("it was never dropped")
    pool.stats()


def test_another_version_is_no_holder_and_says_so(
    place: Place, pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hello = messages.Hello
    monkeypatch.setattr(messages, "Hello", lambda **fields: hello(version=99, **fields))
    assert Pool.connect(start=True, directory=place.directory) is None
    said = f"speaks version {messages.VERSION}, and not 99; `ghostserve models stop` ends it"
    assert said in caplog.text
    refused = opened(pool)
    assert isinstance(refused, Refused)
    monkeypatch.undo()
    assert pool.list() == []


STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.settimeout(10)
try:
    sock.connect(sys.argv[1])
    sock.sendall(sys.argv[2].encode())
    print("closed" if not sock.recv(100) else "answered")
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_client_of_another_user_is_refused(place: Place, pool: Pool, tmp_path: Path) -> None:
    """By the directory, and, should that be open, by the holder itself."""
    hello = messages.to_json(messages.Hello()).decode()

    def stranger(path: Path) -> str:
        command = [sys.executable, "-c", STRANGER, str(path), hello]
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()

    assert stranger(place.directory / runtime_dir.SOCKET_NAME) == "PermissionError"
    with open_to_all(tmp_path) as (path, dropped):
        assert stranger(path) in ("closed", "ConnectionResetError", "BrokenPipeError")
        assert not dropped.is_set()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as ours:
            ours.settimeout(10)
            ours.connect(str(path))
            ours.sendall(hello.encode())
            assert messages.answer_from_json(ours.recv(100)) == messages.Welcome()


@contextlib.contextmanager
def open_to_all(folder: Path) -> Iterator[tuple[Path, threading.Event]]:
    """A holder's loop on a socket that everybody may connect to."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        path, ended = Path(name, "s"), threading.Event()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(path))
        os.chmod(path, 0o777)
        listener.listen()
        memory = HostMemory(total_bytes=1 << 40, available_bytes=1 << 40)
        server = HolderServer(
            listener,
            PoolBook(budget_bytes=MIB),
            idle_timeout_s=60,
            host_memory=lambda: memory,
            findable=lambda: not ended.is_set(),
            tick_s=0.02,
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield path, ended
        finally:
            ended.set()
            thread.join(10)
            listener.close()
            server.close()


# ---- the directory ---------------------------------------------------------------------------------------------------


def test_where_the_directory_is(tmp_path: Path) -> None:
    fallback = Path(f"/tmp/ghostserve-{os.geteuid()}")
    assert runtime_dir.runtime_dir({}) == fallback
    assert runtime_dir.runtime_dir({"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path / "ghostserve"
    assert runtime_dir.runtime_dir({"XDG_RUNTIME_DIR": str(tmp_path / "gone")}) == fallback
    both = {"XDG_RUNTIME_DIR": str(tmp_path), "GHOSTSERVE_RUNTIME_DIR": str(tmp_path / "own")}
    assert runtime_dir.runtime_dir(both) == tmp_path / "own"


def test_a_directory_that_is_not_ours_alone_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for mode in (0o750, 0o701, 0o777):
        wide = tmp_path / f"{mode:o}"
        wide.mkdir()
        wide.chmod(mode)
        assert Pool.connect(start=True, directory=wide) is None
        assert f"mode {mode:04o}, where user {os.geteuid()} with mode 0700 is needed" in caplog.text
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there")
    (tmp_path / "there").mkdir(mode=0o700)
    assert Pool.connect(start=True, directory=link) is None
    assert "is no directory of ours" in caplog.text
    file = tmp_path / "file"
    file.touch()
    assert Pool.connect(start=True, directory=file) is None
    if os.geteuid() == 0:
        other = tmp_path / "other"
        other.mkdir(mode=0o700)
        os.chown(other, 65534, 65534)
        assert Pool.connect(start=True, directory=other) is None
        assert "belongs to user 65534" in caplog.text


def test_a_path_longer_than_a_socket_address_will_do(tmp_path: Path) -> None:
    place = Place(tmp_path / ("x" * 120))
    try:
        assert place.pool().list() == []
    finally:
        place.close()


def test_a_holder_that_cannot_start_is_no_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    assert Pool.connect(start=True, directory=tmp_path / "run") is None
    assert "cannot be started" in caplog.text
    with pytest.raises(PoolError):
        Pool(tmp_path / "run").list()


def test_source_is_where_the_package_is() -> None:
    assert (Path(SOURCE) / "ghostserve" / "weights" / "holder.py").exists()
