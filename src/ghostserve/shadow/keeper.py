"""The keeper process: holds the arena, hands it out, and encodes in the background.

    python -m ghostserve.shadow.keeper --address A --fds control=5,staging=6,pool=7,debug=8 --parent-fd 9

It starts empty, inherits the descriptors from the front process, and leaves when that is gone. One thread
does everything, one message at a time, at low priority: nothing that serves ever waits for it. A peer that
sends nonsense gets an error and changes nothing. It must start quickly, so no torch and no vLLM here.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import logging
import os
import selectors
import signal
import socket
from collections.abc import Mapping, Sequence

from ghostserve.arena import handoff, peers
from ghostserve.arena.control import LANE_KEEPER, ControlPage
from ghostserve.arena.memfd import Segment
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import GhostserveError, ProtocolError, StartError
from ghostserve.shadow import keeper_messages as messages
from ghostserve.shadow.keeper_work import KeeperWork

logger = logging.getLogger(__name__)

PROCESS_TITLE = "ghostserve: keeper"
NICE = 10
HELLO_TIMEOUT_S = 5.0  # a peer that has not said by then what it wants is dropped
ANSWER_TIMEOUT_S = 5.0  # an engine that does not take its answers for so long is dropped; it comes back
BIND_TIMEOUT_S = 5.0  # a killed keeper's address is free once the kernel has closed its socket
GUESTS_MAX = 64  # peers that have not said hello yet
_PR_SET_PDEATHSIG = 1


class Keeper:
    """The loop over listener, guests (no hello yet), the engine's connection, and the parent's pipe."""

    def __init__(
        self, *, listener: socket.socket, parent_fd: int, segments: Mapping[str, Segment], work: KeeperWork
    ) -> None:
        self._listener = listener
        self._segments = segments
        self._work = work
        self._guests: dict[socket.socket, float] = {}  # -> when it is dropped
        self._engine: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._parent_fd = parent_fd
        self._selector.register(parent_fd, selectors.EVENT_READ)
        listener.setblocking(False)

    def run(self) -> None:
        """Serve until the parent is gone."""
        while True:
            for key, _ in self._selector.select(timeout=self._patience_s()):
                peer = key.fileobj
                if peer == self._parent_fd:
                    logger.info("the front process is gone")
                    return
                assert isinstance(peer, socket.socket)
                if peer is self._listener:
                    self._accept()
                elif peer is self._engine:
                    self._job(peer)
                elif peer in self._guests:
                    self._greet(peer)
            for peer in [peer for peer, until_s in self._guests.items() if until_s <= monotonic_s()]:
                logger.warning("a peer said nothing for %g s", HELLO_TIMEOUT_S)
                self._drop(peer)

    def _patience_s(self) -> float | None:
        return max(0.0, min(self._guests.values()) - monotonic_s()) if self._guests else None

    def _accept(self) -> None:
        peer = peers.accept(self._listener, own_uid=os.geteuid())
        if peer is None:
            return
        peer.setblocking(False)
        if len(self._guests) >= GUESTS_MAX:
            self._drop(next(iter(self._guests)))
        self._guests[peer] = monotonic_s() + HELLO_TIMEOUT_S
        self._selector.register(peer, selectors.EVENT_READ)

    def _greet(self, peer: socket.socket) -> None:
        try:
            role = handoff.parse_hello(peer.recv(handoff.HELLO_MAX_BYTES))
            if role is handoff.Role.ENGINE:
                del self._guests[peer]
                if self._engine is not None:
                    self._drop(self._engine)  # the newest engine is the one that lives
                peer.settimeout(ANSWER_TIMEOUT_S)
                self._engine = peer
                return
            handoff.send_segments(peer, self._segments)
        except (OSError, ProtocolError) as error:
            logger.warning("a peer was dropped: %s", error)
        self._drop(peer)

    def _job(self, peer: socket.socket) -> None:
        """Read one message of the engine and answer it."""
        try:
            data = peer.recv(messages.MESSAGE_MAX_BYTES + 1)
            if not data:
                self._drop(peer)
                return
            answer = self._answer(data)
            if answer is not None:
                peer.sendall(messages.to_json(answer))
        except OSError as error:
            logger.warning("the engine's connection broke: %s", error)
            self._drop(peer)

    def _answer(self, data: bytes) -> messages.Message | None:
        try:
            message = messages.from_json(data)
            if isinstance(message, messages.Geometry):
                self._work.configure(message)
                return None
            if isinstance(message, messages.EncodeJob | messages.ScrubJob | messages.WipeJob):
                return self._work.do(message)
            raise ProtocolError(f"{type(message).__name__} is an answer, not a job")
        except (GhostserveError, OSError) as error:
            logger.warning("a message was refused: %s", error)
            return messages.KeeperError(job=messages.job_of(data), reason=str(error))

    def _drop(self, peer: socket.socket) -> None:
        self._guests.pop(peer, None)
        if peer is self._engine:
            self._engine = None
        self._selector.unregister(peer)
        peer.close()


def _listen(address: str) -> socket.socket:
    """Listen at the address; waits for the socket of a keeper just killed to be gone."""
    deadline_s = monotonic_s() + BIND_TIMEOUT_S
    while True:
        try:
            return handoff.listen(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or monotonic_s() > deadline_s:
                raise StartError(f"cannot listen at @{address}: {error}") from error
            sleep_s(0.01)


def _settle() -> None:
    """Become a modest process that dies with its parent."""
    # A Ctrl-C in the terminal reaches us too; it is the front process that decides when we leave.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The pipe tells that the parent is gone; this one holds even if somebody else inherited its other end.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    with contextlib.suppress(ImportError):
        from setproctitle import setproctitle

        setproctitle(PROCESS_TITLE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the keeper; returns when the front process is gone."""
    parser = argparse.ArgumentParser(prog="ghostserve-keeper", allow_abbrev=False)
    parser.add_argument("--address", required=True)
    parser.add_argument("--fds", required=True, help="NAME=FD,...")
    parser.add_argument("--parent-fd", required=True, type=int)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s keeper: %(message)s")
    _settle()
    segments = {
        name: Segment.attach(int(fd)) for name, fd in (item.split("=") for item in args.fds.split(","))
    }
    control = ControlPage(segments["control"], lane=LANE_KEEPER)
    try:
        Keeper(
            listener=_listen(args.address),
            parent_fd=args.parent_fd,
            segments=segments,
            work=KeeperWork(pool=segments["pool"], control=control),
        ).run()
    except StartError as error:
        logger.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
