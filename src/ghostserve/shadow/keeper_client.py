"""The engine core's side of the keeper: jobs in, answers out, never in serving's way.

`submit` only appends to a queue; one thread talks to the keeper. When the connection breaks it is made again,
and the geometry and all open jobs are sent again, in their order. A keeper that makes no progress for
`job_deadline_s` is killed: its supervisor starts another. A job that keepers die over `attempts_max` times is
answered as failed. What is open and when a job is given up is decided in `keeper_jobs`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ghostserve.arena import handoff
from ghostserve.clock import monotonic_s
from ghostserve.errors import ProtocolError
from ghostserve.shadow.keeper_jobs import OpenJobs, failure, is_answer_to
from ghostserve.shadow.keeper_messages import (
    MESSAGE_MAX_BYTES,
    Answer,
    EncodeDone,
    Geometry,
    Job,
    KeeperError,
    ScrubDone,
    WipeDone,
    from_json,
    to_json,
)

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 2.0
_BACKOFF_MIN_S, _BACKOFF_MAX_S = 0.02, 0.1  # an attempt costs microseconds, and a restart takes 0.3 s
_KILLED_TIMEOUT_S = 2.0  # a killed keeper's sockets are closed by then


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peer:
    """A connected keeper; `pidfd` is surely its process, however late it is used."""

    sock: socket.socket
    pid: int
    pidfd: int


class KeeperClient:
    """A connection to the keeper at `address` that is made again whenever it breaks.

    `on_answer` is called in the client's own thread, once for each job, mostly in their order; what it raises
    is logged. It must not call `close`.
    """

    def __init__(
        self,
        address: str,
        on_answer: Callable[[Answer], None],
        *,
        job_deadline_s: float = 10.0,
        attempts_max: int = 3,
    ) -> None:
        self._address = address
        self._on_answer = on_answer
        self._job_deadline_s = job_deadline_s
        self._lock = threading.Lock()  # guards the three below and the writing to _wake_fd
        self._jobs = OpenJobs(attempts_max=attempts_max)
        self._geometry: Geometry | None = None
        self._geometry_sent = False
        self._connected = False
        self._backoff_s = _BACKOFF_MIN_S
        self._closing = threading.Event()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="keeper-client", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether a keeper is there now; jobs are taken either way."""
        return self._connected

    def backlog(self) -> int:
        """Jobs submitted and not answered."""
        with self._lock:
            return len(self._jobs)

    def submit(self, message: Geometry | Job) -> None:
        """Take a job, or the geometry that holds from now on. Never blocks, never raises.

        Job numbers must not repeat. After `close` nothing is taken and nothing answered.
        """
        with self._lock:
            if self._closing.is_set():
                return
            if isinstance(message, Geometry):
                self._geometry, self._geometry_sent = message, False
            else:
                self._jobs.add(message)
            os.eventfd_write(self._wake_fd, 1)

    def close(self, *, timeout_s: float = 5.0) -> None:
        """End the thread; open jobs stay unanswered. May be called again."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            os.eventfd_write(self._wake_fd, 1)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.error("the keeper's client did not end within %g s", timeout_s)
        else:
            os.close(self._wake_fd)

    # -- the client's thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        reported = ""
        while not self._closing.is_set():
            try:
                with _connected(self._address) as peer:
                    reported = ""
                    self._connected = True
                    logger.info("connected to keeper %d", peer.pid)
                    self._converse(peer)
            except (OSError, ProtocolError) as error:
                if str(error) != reported:  # once per reason, not per attempt
                    logger.warning("no keeper: %s", error)
                    reported = str(error)
            finally:
                self._connected = False
            self._break_off()
            self._closing.wait(self._backoff_s)
            self._backoff_s = min(2 * self._backoff_s, _BACKOFF_MAX_S)

    def _converse(self, peer: _Peer) -> None:
        """Send and receive until closing. Raises OSError or ProtocolError when the connection is no good."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        while not self._closing.is_set():
            full = self._send(peer.sock)
            poll.register(peer.sock, select.POLLIN | (select.POLLOUT if full else 0))
            patience_s = self._patience_s()
            if patience_s is not None and patience_s <= 0:
                self._kill(peer)
                raise ProtocolError(f"keeper {peer.pid} made no progress for {self._job_deadline_s:g} s")
            ready = dict(poll.poll(None if patience_s is None else patience_s * 1000))
            if self._wake_fd in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
            if ready.get(peer.sock.fileno(), 0) & ~select.POLLOUT:
                self._receive(peer.sock)

    def _send(self, sock: socket.socket) -> bool:
        """Send what may be sent now; True if the socket takes no more."""
        while True:
            # Other threads only append jobs and replace the geometry, so what is seen here stays the next.
            with self._lock:
                geometry = None if self._geometry_sent else self._geometry
                job = self._jobs.next_to_send()
            message = geometry or job
            if message is None:
                return False
            try:
                sock.send(to_json(message))
            except BlockingIOError:
                return True
            except ProtocolError as error:
                if isinstance(message, Geometry):
                    raise
                with self._lock:
                    self._jobs.give_up_next()
                self._tell(failure(message, str(error)))
                continue
            with self._lock:
                if geometry is not None:
                    self._geometry_sent = self._geometry is geometry
                else:
                    self._jobs.sent(now_s=monotonic_s())

    def _receive(self, sock: socket.socket) -> None:
        data = sock.recv(MESSAGE_MAX_BYTES + 1)
        if not data:
            raise ConnectionResetError("the keeper closed the connection")
        message = from_json(data)
        number = message.job if isinstance(message, EncodeDone | ScrubDone | WipeDone | KeeperError) else None
        with self._lock:
            job = self._jobs.sent_job(number)
            if job is None or number is None:
                logger.warning("the keeper says: %s", message)
                return
            answer = failure(job, message.reason) if isinstance(message, KeeperError) else message
            if not is_answer_to(job, answer):
                raise ProtocolError(f"{answer} is no answer to {job}")
            self._jobs.answered(number, now_s=monotonic_s())
        self._backoff_s = _BACKOFF_MIN_S
        assert isinstance(answer, EncodeDone | ScrubDone | WipeDone)
        self._tell(answer)

    def _break_off(self) -> None:
        with self._lock:
            self._geometry_sent = False
            given_up = [] if self._closing.is_set() else self._jobs.broken()
        for job in given_up:
            logger.error("job %d is given up: keepers were lost over it", job.job)
            self._tell(failure(job, "keepers were lost over this job"))

    def _patience_s(self) -> float | None:
        """Seconds until the keeper counts as hung; None while it has nothing to do."""
        with self._lock:
            since_s = self._jobs.progress_s()
        return None if since_s is None else since_s + self._job_deadline_s - monotonic_s()

    def _kill(self, peer: _Peer) -> None:
        if peer.pid == os.getpid():
            return  # a keeper run inside this process; dropping the connection has to do
        logger.error("keeper %d hangs and is killed", peer.pid)
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(peer.pidfd, signal.SIGKILL)
        # Until it is dead its socket still takes connections, which would count as attempts of its job.
        poll = select.poll()
        poll.register(peer.pidfd, select.POLLIN)
        poll.poll(_KILLED_TIMEOUT_S * 1000)

    def _tell(self, answer: Answer) -> None:
        try:
            self._on_answer(answer)
        except Exception:  # the callback's bug must not end the thread: later jobs would hang
            logger.exception("the answer to job %d was not taken", answer.job)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[_Peer]:
    """A keeper that has heard who we are. Raises OSError or ProtocolError if there is none."""
    sock, credentials = handoff.connect(address, timeout_s=_CONNECT_TIMEOUT_S)
    with sock:
        pidfd = os.pidfd_open(credentials.pid)
        try:
            poll = select.poll()
            poll.register(sock, 0)
            if poll.poll(
                0
            ):  # the number could have been another's by then, unless the connection still stands
                raise ConnectionResetError("the keeper left")
            sock.send(handoff.hello(handoff.Role.ENGINE))
            sock.setblocking(False)
            yield _Peer(sock=sock, pid=credentials.pid, pidfd=pidfd)
        finally:
            os.close(pidfd)
