"""One connection to the holder, and every wait on it bounded."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from ghostserve.arena import peers
from ghostserve.clock import monotonic_s
from ghostserve.errors import PoolError, ProtocolError
from ghostserve.types import Closing
from ghostserve.weights import pool_messages as messages
from ghostserve.weights import runtime_dir


class HolderGone(PoolError):
    """Nobody listens, or the connection ended: another holder may be started."""


class NoAnswer(PoolError):
    """Not in time; it may still come."""


class Link(Closing):
    """A greeted connection. What it holds in the pool ends with it, at the latest when this process does.

    A child that is forked does not keep it: it is closed there.
    """

    def __init__(self, directory: Path, *, budget_bytes: int | None = None, timeout_s: float) -> None:
        """HolderGone, or PoolError if the holder is of another version or user, or does not answer in time."""
        deadline_s = monotonic_s() + timeout_s
        try:
            self._sock = runtime_dir.connect(directory, timeout_s=timeout_s)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise HolderGone(f"no holder listens in {directory}") from error
        except OSError as error:
            raise PoolError(f"the holder in {directory} does not answer: {error}") from error
        try:
            peers.require_same_user(peers.peer_credentials(self._sock), own_uid=os.geteuid())
            hello = messages.Hello(budget_bytes=budget_bytes)
            answer, fd = self.ask(hello, timeout_s=max(deadline_s - monotonic_s(), 0.001))
            if fd is not None:
                os.close(fd)
            if answer != messages.Welcome():
                why = answer.reason if isinstance(answer, messages.Refused) else f"it answered {answer}"
                raise PoolError(f"{why}; `ghostserve models stop` ends it")
        except ProtocolError as error:
            self.close()
            raise PoolError(f"the holder in {directory}: {error}") from error
        except BaseException:
            self.close()
            raise
        _links.add(self)

    def ask(self, request: messages.Request, *, timeout_s: float) -> tuple[messages.Answer, int | None]:
        """Its answer, and the descriptor that came with it, which is the caller's. PoolError if none came in time."""
        deadline_s = monotonic_s() + timeout_s
        try:
            self._sock.settimeout(timeout_s)
            self._sock.sendall(messages.to_json(request))
        except TimeoutError:
            raise PoolError(f"the holder takes no message within {timeout_s:g} s") from None
        except OSError as error:
            raise HolderGone(f"the holder is gone: {error}") from error
        return self.next(timeout_s=max(deadline_s - monotonic_s(), 0.001))

    def next(self, *, timeout_s: float) -> tuple[messages.Answer, int | None]:
        """The next message of the holder."""
        try:
            self._sock.settimeout(timeout_s)
            data, fds, cut = peers.receive(self._sock, data_max_bytes=messages.ANSWER_BYTES_MAX, fds_max=1)
        except TimeoutError:
            raise NoAnswer(f"the holder gives no answer within {timeout_s:g} s") from None
        except OSError as error:
            raise HolderGone(f"the holder is gone: {error}") from error
        try:
            if not data:
                raise HolderGone("the holder is gone")
            answer = messages.answer_from_json(data)
            if cut or bool(fds) != isinstance(answer, messages.Given):
                raise ProtocolError(f"{len(fds)} descriptors came with {data[:80]!r}")
        except ProtocolError as error:
            for fd in fds:
                os.close(fd)
            raise PoolError(f"the holder answers wrongly: {error}") from error
        return answer, (fds[0] if fds else None)

    def close(self) -> None:
        """May be called again."""
        self._sock.close()


_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _close_in_child() -> None:
    for link in list(_links):
        link.close()


os.register_at_fork(after_in_child=_close_in_child)
