"""Who is at the other end of a Unix socket, and what it sends: data with descriptors. Needs the standard library alone."""

from __future__ import annotations

import array
import logging
import socket
import struct
from dataclasses import dataclass

from ghostserve.clock import sleep_s
from ghostserve.errors import ProtocolError

logger = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_ACCEPT_PAUSE_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Who is at the other end, from the kernel: as of `connect` for a client, of `listen` for a server."""

    pid: int
    uid: int


def peer_credentials(sock: socket.socket) -> Credentials:
    """Who is at the other end of a connected Unix socket."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return Credentials(pid=pid, uid=uid)


def require_same_user(credentials: Credentials, *, own_uid: int) -> None:
    """ProtocolError unless the peer runs as `own_uid`; root is refused like anybody else."""
    if credentials.uid != own_uid:
        raise ProtocolError(f"process {credentials.pid} runs as user {credentials.uid}, not {own_uid}")


def accept(listener: socket.socket, *, own_uid: int) -> socket.socket | None:
    """The next who connects to a listener that is ready; None, and the log says why, unless it runs as `own_uid`."""
    try:
        sock, _ = listener.accept()
    except OSError as error:  # the peer went away in between, or we are out of descriptors
        logger.warning("accept: %s", error)
        sleep_s(_ACCEPT_PAUSE_S)  # out of descriptors the listener stays ready: do not spin
        return None
    try:
        require_same_user(peer_credentials(sock), own_uid=own_uid)
    except (OSError, ProtocolError) as error:
        logger.warning("a peer was refused: %s", error)
        sock.close()
        return None
    return sock


def receive(sock: socket.socket, *, data_max_bytes: int, fds_max: int) -> tuple[bytes, list[int], bool]:
    """(data, descriptors, whether something was cut off) of one packet; the descriptors are the caller's to close.

    Not `socket.recv_fds`: it drops flags, so close-on-exec.
    """
    fds = array.array("i")
    room = socket.CMSG_SPACE(fds_max * fds.itemsize)
    data, ancillary, flags, _ = sock.recvmsg(data_max_bytes, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
    return data, list(fds), bool(flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC))
