"""The front process's side of the keeper: creates the arena, starts the keeper, and starts it again.

    starting ──▶ running ──keeper died──▶ starting (at most `restarts_max` times within `window_s`)
                    │                        └── more often ──▶ given up for `window_s`, then starting
                    └──close()──▶ closed

One thread does it all, also handing out descriptors at the front's own address, so that the arena can be
had while there is no keeper. It is the only thread that starts a keeper: the kernel's parent-death signal
goes out when the *thread* that started a process ends.
"""

from __future__ import annotations

import logging
import math
import os
import select
import site
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import ghostserve
from ghostserve.arena import handoff, peers
from ghostserve.arena.control import CONTROL_BYTES, LANE_FRONT, ControlPage, Counter
from ghostserve.arena.memfd import Segment
from ghostserve.clock import monotonic_s
from ghostserve.errors import GhostserveError
from ghostserve.events.kinds import KeeperDied, KeeperGivenUp, KeeperRestarted
from ghostserve.types import Closing, FailureKind

logger = logging.getLogger(__name__)

SEGMENT_NAMES = ("control", "staging", "pool", "debug")
_REAP_TIMEOUT_S = 5.0
_PEER_TIMEOUT_S = 0.5  # a rank that connects to the front says hello at once


class KeeperSupervisor(Closing):
    """Owns the arena's segments and the keeper process for as long as it lives.

    `address` goes into the environment of every process that is to use the arena (`environment`). `segments`
    are the front's own duplicates: control is formatted, the others are empty until the engine sizes them.
    """

    def __init__(self, *, restarts_max: int = 5, window_s: float = 60.0) -> None:
        """Create the arena and start the keeper in the background; `wait_ready` waits for it."""
        self.address = handoff.new_address()
        self.segments = {
            name: Segment.create(f"ghostserve-{name}", CONTROL_BYTES if name == "control" else 0)
            for name in SEGMENT_NAMES
        }
        ControlPage.format(self.segments["control"])
        self.control = ControlPage(self.segments["control"], lane=LANE_FRONT)
        self._restarts_max = restarts_max
        self._window_s = window_s
        # The keeper reads the other end: it ends when we do, however we do.
        self._pipe_read, self._pipe_write = os.pipe()
        self._listener = handoff.listen(handoff.front_address(self.address))
        self._listener.settimeout(_PEER_TIMEOUT_S)
        self._wake_fd = os.eventfd(0)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="keeper-supervisor", daemon=True)
        self._thread.start()

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to find the arena."""
        return {handoff.ARENA_ADDRESS_ENV: self.address}

    def wait_ready(self, *, timeout_s: float) -> None:
        """Until the arena can be fetched; StartError after `timeout_s`."""
        for segment in handoff.fetch_segments(self.address, timeout_s=timeout_s).values():
            segment.close()

    def close(self, *, timeout_s: float = 2 * _REAP_TIMEOUT_S) -> None:
        """Kill and reap the keeper and give the arena up; others that still map it keep it. Idempotent."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            # Its descriptors stay open then: closing them under it would hand their numbers to others.
            logger.error("the keeper's supervisor did not end within %g s", timeout_s)
            return
        self._listener.close()
        for fd in (self._pipe_read, self._pipe_write, self._wake_fd):
            os.close(fd)
        for segment in self.segments.values():
            segment.close()

    def _run(self) -> None:
        starts: deque[float] = deque()  # those in the window
        started_before = False
        while not self._closing:
            starts.append(monotonic_s())
            while starts[0] < starts[-1] - self._window_s:
                starts.popleft()
            if len(starts) > self._restarts_max + 1:
                logger.error(
                    "the keeper died %d times in %g s: no parity for as long", len(starts), self._window_s
                )
                self.control.keeper_given_up = True
                self.control.events.tell(KeeperGivenUp(deaths=len(starts), window_s=self._window_s))
                starts.clear()
                # Not for good: nobody else wipes frames, and without that no block could be protected in the end.
                self._serve_until(None, timeout_s=self._window_s)
                self.control.keeper_given_up = False
                continue
            if started_before:
                self.control.add(Counter.KEEPER_RESTARTS)
            started_before = True
            try:
                self._run_keeper()
            except Exception:  # counts as a death; the server itself needs no keeper
                logger.exception("the keeper could not be started")
            if not self._closing:
                self.control.ledger.count_failure(FailureKind.KEEPER)

    def _run_keeper(self) -> None:
        """Start the keeper and return when it is dead and reaped."""
        process = subprocess.Popen(
            self._command(),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            pass_fds=[*(segment.fd for segment in self.segments.values()), self._pipe_read],
        )
        pidfd: int | None = None
        try:
            pidfd = os.pidfd_open(process.pid)
            self.control.keeper_pid = process.pid
            if restarts := self.control.get(Counter.KEEPER_RESTARTS):
                self.control.events.tell(KeeperRestarted(pid=process.pid, restarts=restarts))
            self._serve_until(pidfd)
        finally:
            self.control.keeper_pid = None
            process.kill()
            try:
                process.wait(_REAP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                logger.error("keeper %d does not die", process.pid)
            if pidfd is not None:
                os.close(pidfd)
        if not self._closing:
            logger.warning("keeper %d ended with status %s", process.pid, process.returncode)
            if process.returncode is not None:
                self.control.events.tell(KeeperDied(pid=process.pid, status=process.returncode))

    def _serve_until(self, pidfd: int | None, *, timeout_s: float = math.inf) -> None:
        """Hand out descriptors until the process of `pidfd` ends, the time is over, or `close` is called."""
        until_s = monotonic_s() + timeout_s
        poll = select.poll()
        for fd in (self._wake_fd, self._listener.fileno(), *([] if pidfd is None else [pidfd])):
            poll.register(fd, select.POLLIN)
        while not self._closing:
            left_s = until_s - monotonic_s()
            ready = {fd for fd, _ in poll.poll(None if left_s == math.inf else max(0.0, left_s) * 1000)}
            if pidfd in ready or left_s <= 0:
                return
            if self._listener.fileno() in ready:
                self._hand_out()

    def _hand_out(self) -> None:
        peer = peers.accept(self._listener, own_uid=os.geteuid())
        if peer is None:
            return
        with peer:
            try:
                peer.settimeout(_PEER_TIMEOUT_S)
                if handoff.parse_hello(peer.recv(handoff.HELLO_MAX_BYTES)) is not handoff.Role.ENGINE:
                    handoff.send_segments(peer, self.segments)
            except (OSError, GhostserveError) as error:
                logger.warning("a peer was dropped: %s", error)

    def _command(self) -> list[str]:
        fds = ",".join(f"{name}={segment.fd}" for name, segment in self.segments.items())
        command = [sys.executable, "-m", "ghostserve.shadow.keeper", "--address", self.address]
        return [*command, "--fds", fds, "--parent-fd", str(self._pipe_read)]


def _environment() -> dict[str, str]:
    """Ours, such that the keeper imports the same ghostserve and starts no threads for numpy."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    root = str(Path(ghostserve.__file__).parent.parent)
    if root not in site.getsitepackages():
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{known}" if known else root
    return environment
