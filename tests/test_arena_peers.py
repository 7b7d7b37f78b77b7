"""Who may connect, and what a listener does when it cannot take anybody."""

from __future__ import annotations

import os
import resource
import select
import socket
from collections.abc import Iterator

import pytest

from ghostserve.arena import handoff, peers
from ghostserve.clock import monotonic_s

ATTEMPTS = 5


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with handoff.listen(handoff.new_address()) as made:
        made.setblocking(False)
        yield made


@pytest.fixture
def client(listener: socket.socket) -> Iterator[socket.socket]:
    """Has connected, and nobody has accepted it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as made:
        made.settimeout(5)
        made.connect(listener.getsockname())
        yield made


def test_who_runs_as_the_same_user_is_accepted(listener: socket.socket, client: socket.socket) -> None:
    accepted = peers.accept(listener, own_uid=os.geteuid())
    assert accepted is not None
    with accepted:
        accepted.sendall(b"welcome")
        assert client.recv(16) == b"welcome"


def test_a_stranger_is_refused_and_the_connection_closed(
    listener: socket.socket, client: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    assert peers.accept(listener, own_uid=os.geteuid() + 1) is None
    assert client.recv(16) == b""
    reason = f"process {os.getpid()} runs as user {os.geteuid()}, not {os.geteuid() + 1}"
    assert f"a peer was refused: {reason}" in caplog.text


def test_who_went_away_in_between_is_nobody(
    listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    assert peers.accept(listener, own_uid=os.geteuid()) is None
    assert "accept: " in caplog.text


def test_out_of_descriptors_it_does_not_spin_and_takes_the_client_later(
    listener: socket.socket, client: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    began_s = monotonic_s()
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        for _ in range(ATTEMPTS):
            assert select.select([listener], [], [], 0)[0], "it stays ready"
            assert peers.accept(listener, own_uid=os.geteuid()) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert monotonic_s() - began_s >= ATTEMPTS * 0.01
    assert caplog.text.count("Too many open files") == ATTEMPTS
    accepted = peers.accept(listener, own_uid=os.geteuid())
    assert accepted is not None, "whoever waited meanwhile is not lost"
    accepted.close()
