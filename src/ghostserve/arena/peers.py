"""Who is at the other end of a Unix socket, and what it sends: data with descriptors. Needs neither numpy nor memory."""

from __future__ import annotations

import array
import socket
import struct
from dataclasses import dataclass

from ghostserve.errors import ProtocolError

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


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
