"""Descriptors go to processes of our own user, and to nobody else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from ghostserve.arena import handoff, peers
from ghostserve.arena.handoff import Role
from ghostserve.arena.memfd import Segment
from ghostserve.arena.peers import Credentials
from ghostserve.clock import monotonic_s
from ghostserve.errors import ProtocolError, StartError


@pytest.fixture
def address() -> str:
    return handoff.new_address()


@pytest.fixture
def segments() -> Iterator[dict[str, Segment]]:
    made = {"control": Segment.create("control", 4096), "pool": Segment.create("pool", 0)}
    yield made
    for segment in made.values():
        segment.close()


class Server:
    """Answers connections with `answer` in a thread, one after the other, until closed."""

    def __init__(self, address: str, segments: dict[str, Segment] | None, *, raw: bytes = b"") -> None:
        self._listener = handoff.listen(address)
        self._segments, self._raw = segments, raw
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer:
                peer.settimeout(5)
                data = peer.recv(256)
                if not data:
                    continue
                assert handoff.parse_hello(data) is Role.RANK
                if self._segments is not None:
                    handoff.send_segments(peer, self._segments)
                elif self._raw:
                    peer.sendall(self._raw)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_addresses_are_unguessable(address: str) -> None:
    assert address.startswith("ghostserve-")
    assert len(address) == len("ghostserve-") + 32
    assert address != handoff.new_address()


def test_segments_come_over(address: str, segments: dict[str, Segment]) -> None:
    server = Server(address, segments)
    try:
        got = handoff.fetch_segments(address, timeout_s=5)
        assert list(got) == ["control", "pool"]
        got["pool"].resize(8192)
        got["pool"].array[8191] = 3
        segments["pool"].refresh()
        assert segments["pool"].array[8191] == 3
        assert not any(os.get_inheritable(segment.fd) for segment in got.values())
        for segment in got.values():
            segment.close()
    finally:
        server.close()


@pytest.mark.parametrize("place", ["", "-front"])
def test_fetching_waits_for_somebody_to_listen(
    address: str, segments: dict[str, Segment], place: str
) -> None:
    assert handoff.front_address(address) == address + "-front"
    late: list[Server] = []
    timer = threading.Timer(0.3, lambda: late.append(Server(address + place, segments)))
    timer.start()
    try:
        for segment in handoff.fetch_segments(address, timeout_s=10).values():
            segment.close()
    finally:
        timer.join(10)
        late[0].close()


def test_fetching_ends_in_time(address: str) -> None:
    began_s = monotonic_s()
    with pytest.raises(
        StartError, match=rf"no arena within 0\.3 s \(@{address}-front: .*@{address}: .*refused"
    ):
        handoff.fetch_segments(address, timeout_s=0.3)
    assert 0.2 < monotonic_s() - began_s < 5


def test_a_keeper_that_hangs_does_not_keep_the_front_from_answering(
    address: str, segments: dict[str, Segment]
) -> None:
    hung = handoff.listen(address)  # connections are queued by the kernel and never answered
    server = Server(handoff.front_address(address), segments)
    began_s = monotonic_s()
    try:
        for segment in handoff.fetch_segments(address, timeout_s=20).values():
            segment.close()
    finally:
        server.close()
        hung.close()
    assert monotonic_s() - began_s < 5, "a replacement waited for the keeper"


def test_a_front_that_hangs_does_not_keep_the_keeper_from_answering(
    address: str, segments: dict[str, Segment]
) -> None:
    hung = handoff.listen(handoff.front_address(address))
    server = Server(address, segments)
    try:
        for segment in handoff.fetch_segments(address, timeout_s=1).values():
            segment.close()
    finally:
        server.close()
        hung.close()


@pytest.mark.parametrize("raw", [b"", b"nonsense", b"[]", b'{"kind":"segments","names":["control"]}'])
def test_a_bad_answer_is_refused_and_leaks_nothing(address: str, raw: bytes) -> None:
    before = descriptors()
    server = Server(address, None, raw=raw)
    try:
        with pytest.raises(StartError):
            handoff.fetch_segments(address, timeout_s=0.2)
    finally:
        server.close()
    assert descriptors() == before


def test_hello() -> None:
    for role in Role:
        assert handoff.parse_hello(handoff.hello(role)) is role
    for data in (
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b"1",
        b'{"kind":"hello","role":"king"}',
        b'{"kind":"x","role":"rank"}',
    ):
        with pytest.raises(ProtocolError, match="no hello"):
            handoff.parse_hello(data)


def test_who_is_at_the_other_end(address: str) -> None:
    with handoff.listen(address) as listener:
        sock, credentials = handoff.connect(address, timeout_s=5)
        peer, _ = listener.accept()
        with sock, peer:
            assert credentials == peers.peer_credentials(peer)
            assert credentials == Credentials(pid=os.getpid(), uid=os.geteuid())


def test_another_user_is_refused() -> None:
    peers.require_same_user(Credentials(pid=1, uid=1000), own_uid=1000)
    for uid, own_uid in ((0, 1000), (1000, 0), (1001, 1000)):
        with pytest.raises(ProtocolError, match=f"process 1 runs as user {uid}, not {own_uid}"):
            peers.require_same_user(Credentials(pid=1, uid=uid), own_uid=own_uid)


STRANGER = """
import os, sys
from ghostserve.arena import handoff
from ghostserve.errors import StartError
os.setgid(65534); os.setuid(65534)
try:
    handoff.fetch_segments(sys.argv[1], timeout_s=0.2)
except StartError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_client_takes_nothing_from_another_user(address: str, segments: dict[str, Segment]) -> None:
    server = Server(address, segments)
    try:
        command = [sys.executable, "-c", STRANGER, address]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "runs as user 0, not 65534" in result.stdout, result
    finally:
        server.close()
