"""How a process gets the arena's descriptors: over a Unix socket in the abstract namespace.

    peer ── connect, hello(role) ──▶ keeper (or front)
    peer ◀── names + descriptors (SCM_RIGHTS) ──        then the connection is closed

An abstract address leaves nothing in a file system, but every user of the machine may see it and connect to
it, or take it while the keeper is being restarted. So both sides ask the kernel who the other is, and talk to
processes of their own user only.

The front process answers at an address of its own (`front_address`), so that a replacement gets the arena
also while there is no keeper, or one that hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Mapping
from enum import Enum

from ghostserve.arena.memfd import Segment
from ghostserve.arena.peers import Credentials, peer_credentials, receive, require_same_user
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import ProtocolError, StartError

ARENA_ADDRESS_ENV = "GHOSTSERVE_ARENA"

HELLO_MAX_BYTES = 256
_SEGMENTS_MAX = 16
_NAMES_MAX_BYTES = 4096
_BACKLOG = 64
_RETRY_S = 0.02


class Role(Enum):
    """What a peer wants of the keeper."""

    RANK = "rank"  # the descriptors, nothing else
    FRONT = "front"  # the same
    ENGINE = "engine"  # no descriptors; the connection stays and carries jobs


def new_address() -> str:
    """An abstract address nobody can guess; goes into ARENA_ADDRESS_ENV."""
    return f"ghostserve-{secrets.token_hex(16)}"


def front_address(address: str) -> str:
    """Where the front process hands out the same descriptors."""
    return f"{address}-front"


def listen(address: str) -> socket.socket:
    """A listening socket that nobody inherits. OSError (EADDRINUSE) while somebody holds the address."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(f"\0{address}")
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(address: str, *, timeout_s: float) -> tuple[socket.socket, Credentials]:
    """A connection to a process of our own user; every later call on it is bounded by `timeout_s`.

    Raises OSError if nobody listens, ProtocolError if somebody else does.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(timeout_s)
        sock.connect(f"\0{address}")
        credentials = peer_credentials(sock)
        require_same_user(credentials, own_uid=os.geteuid())
    except BaseException:
        sock.close()
        raise
    return sock, credentials


def hello(role: Role) -> bytes:
    """The first message on a connection."""
    return json.dumps({"kind": "hello", "role": role.value}).encode()


def parse_hello(data: bytes) -> Role:
    """ProtocolError if it is none."""
    try:
        doc = json.loads(data)
        if doc["kind"] == "hello":
            return Role(doc["role"])
    except (ValueError, KeyError, TypeError):
        pass
    raise ProtocolError(f"no hello: {data[:80]!r}")


def send_segments(sock: socket.socket, segments: Mapping[str, Segment]) -> None:
    """Hand out the descriptors; the peer gets its own copies."""
    names = json.dumps({"kind": "segments", "names": list(segments)}).encode()
    socket.send_fds(sock, [names], [segment.fd for segment in segments.values()])


def fetch_segments(address: str, *, timeout_s: float) -> dict[str, Segment]:
    """The arena's segments by name, mapped; asks the front, then the keeper, until one answers.

    The front first: it does nothing else, and a replacement must not wait for a keeper that hangs.

    Raises StartError with the last reason after `timeout_s`.
    """
    deadline_s = monotonic_s() + timeout_s
    while True:
        reasons = []
        for place in (front_address(address), address):
            remaining_s = deadline_s - monotonic_s()
            try:
                # Half, so that one that hangs leaves time to ask the other.
                return _fetch_once(place, timeout_s=max(remaining_s / 2, _RETRY_S))
            except (OSError, ProtocolError) as error:
                reasons.append(f"@{place}: {error}")
        if monotonic_s() + _RETRY_S >= deadline_s:
            raise StartError(f"no arena within {timeout_s:g} s ({'; '.join(reasons)})")
        sleep_s(_RETRY_S)


def _fetch_once(address: str, *, timeout_s: float) -> dict[str, Segment]:
    sock, _ = connect(address, timeout_s=timeout_s)
    with sock:
        sock.sendall(hello(Role.RANK))
        data, fds, truncated = receive(sock, data_max_bytes=_NAMES_MAX_BYTES, fds_max=_SEGMENTS_MAX)
    segments: dict[str, Segment] = {}
    try:
        for name in _parse_names(data, fds=fds, truncated=truncated):
            segments[name] = Segment.attach(fds[0])
            fds.pop(0)
    except BaseException:
        for segment in segments.values():
            segment.close()
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        raise
    return segments


def _parse_names(data: bytes, *, fds: list[int], truncated: bool) -> list[str]:
    if not data:
        raise ProtocolError("the peer closed the connection")
    try:
        doc = json.loads(data)
        names = [str(name) for name in doc["names"]] if doc["kind"] == "segments" else []
    except (ValueError, KeyError, TypeError):
        names = []
    if truncated or not names or not len(names) == len(set(names)) == len(fds):
        raise ProtocolError(f"{len(fds)} descriptors came with {data[:200]!r}")
    return names
