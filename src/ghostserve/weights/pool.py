"""The pool as loaders see it: ask for an image by its key, get memory that is there, or memory to fill, or a reason.

    pool = Pool.connect(start=True, budget_bytes=None)          # None: no holder; load from the disk
    got = pool.open(key, nbytes, kind="rank", label=model, reload_cost_s=3.0)

    Hit      sealed memory: map `fd` MAP_PRIVATE, keep the Hit while it is mapped
    Lease    empty memory: map `fd` shared, fill it, map the same place anew as private, `publish`
    Follow   somebody else fills it: read behind the `watermark`, then take the `outcome`
    Refused  why not: load from the disk

Nothing here waits longer than it says, and nothing raises in a loader's way: `connect` gives None, the others Refused.
What a Hit, Lease or Follow holds in the pool, a connection holds; it ends with the process, however that ends.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import PoolError
from ghostserve.types import Closing
from ghostserve.weights import pool_memory, pool_start, runtime_dir
from ghostserve.weights import pool_messages as messages
from ghostserve.weights.pool_link import HolderGone, Link, NoAnswer
from ghostserve.weights.pool_types import EntryInfo, PoolStats, Refusal
from ghostserve.weights.watermark import Watermark

logger = logging.getLogger(__name__)

TIMEOUT_S = 2.0
START_TIMEOUT_S = 5.0  # a holder that had to be started answers by then
_RELAUNCH_S = 1.0  # where there are two, one goes away again
_RETRY_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Nothing from the pool, and why, for one line in the log."""

    reason: str
    why: Refusal = Refusal.OTHER


class _Held(Closing):
    """Something of one entry, held by a connection of its own. Not thread-safe. Close it, once or more often."""

    def __init__(self, link: Link, fd: int, nbytes: int, *, timeout_s: float) -> None:
        self._link, self._fd, self._timeout_s = link, fd, timeout_s
        self.nbytes = nbytes

    @property
    def fd(self) -> int:
        """The memory; close-on-exec, closed with this. A mapping of it lasts longer."""
        return self._fd

    def close(self) -> None:
        """Give it back."""
        self._link.close()
        self._forget()

    def _forget(self) -> None:
        """Leave the connection to a successor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Hit(_Held):
    """A published image, which never changes. While this is open it is not evicted: keep it as long as its mapping."""

    @property
    def meta(self) -> bytes:
        """What its filler said of it. PoolError if it cannot be read."""
        return pool_memory.read_meta(self.fd, self.nbytes)


class Lease(_Held):
    """Empty memory that is ours to fill. Closing it, or dying, abandons it, and the next who waits gets a new one."""

    def watermark(self) -> Watermark:
        """To tell followers how far it is filled; close it before publishing."""
        return Watermark(self.fd, self.nbytes, writable=True)

    def publish(self, meta: bytes = b"") -> Hit | Refused:
        """Seal the memory and let others have it. This is over then; what is mapped stays valid whatever the answer.

        Everything of it that is mapped shared and writable must be unmapped or mapped anew as private before.
        """
        try:
            pool_memory.seal(self.fd, self.nbytes, meta)
        except PoolError as error:
            self.close()
            return Refused(reason=str(error))
        got = _outcome(self._link, messages.Publish(meta_bytes=len(meta)), timeout_s=self._timeout_s)
        self._forget()
        assert isinstance(got, Hit | Refused), got
        return got

    def abandon(self) -> None:
        """Give it up. What is mapped stays valid, and nobody else sees it."""
        self.close()


class Follow(_Held):
    """Memory that another process is filling."""

    def watermark(self) -> Watermark:
        """How far it is filled. Map the image itself MAP_PRIVATE, too, or it could not be sealed."""
        return Watermark(self.fd, self.nbytes)

    def outcome(self, *, timeout_s: float) -> Outcome | None:
        """Wait for the filler: a Hit when it has published; a Lease, on new memory, if it is gone and we are next; a
        Follow, of new memory, if somebody else is next. None: nothing yet, ask again. Otherwise this is over then.
        """
        try:
            answer = self._link.next(timeout_s=timeout_s)
        except NoAnswer:
            return None
        except PoolError as error:
            self.close()
            return Refused(reason=str(error))
        self._forget()
        return _held(self._link, *answer, timeout_s=self._timeout_s)


Outcome = Hit | Lease | Follow | Refused
A = TypeVar("A", bound=messages.Answer)
_HELD: dict[str, type[Hit | Lease | Follow]] = {"hit": Hit, "lease": Lease, "follow": Follow}


class Pool:
    """A holder that has answered. Each call makes a connection of its own, so threads may share this."""

    def __init__(self, directory: Path, *, timeout_s: float = TIMEOUT_S) -> None:
        """Use `connect`."""
        self._directory, self._timeout_s = directory, timeout_s

    @classmethod
    def connect(
        cls,
        *,
        start: bool,
        budget_bytes: int | None = None,
        timeout_s: float = TIMEOUT_S,
        directory: Path | None = None,
        idle_timeout_s: float | None = None,
    ) -> Pool | None:
        """The user's holder on this machine, started if there is none and `start`; None, with a line in the log, if
        there is none or it does not answer in time.

        `budget_bytes` is the budget from now on, whoever set it before; None leaves it; 0: no pool is wanted.
        """
        if budget_bytes == 0:
            return None
        directory = directory or runtime_dir.runtime_dir()
        try:
            if start:
                _greet_or_launch(
                    directory,
                    budget_bytes=budget_bytes,
                    timeout_s=timeout_s,
                    idle_timeout_s=idle_timeout_s,
                )
            else:
                Link(directory, budget_bytes=budget_bytes, timeout_s=timeout_s).close()
        except PoolError as error:
            level = logging.DEBUG if isinstance(error, HolderGone) and not start else logging.WARNING
            logger.log(level, "no pool for weights in host memory: %s", error)
            return None
        return cls(directory, timeout_s=timeout_s)

    def open(
        self,
        key: str,
        nbytes: int,
        *,
        kind: Literal["file", "rank"],
        label: str,
        reload_cost_s: float,
        readers: int = 1,
    ) -> Outcome:
        """The image with this key; who gives the same key wants the same bytes. `label` is the model's name.

        `reload_cost_s`: what it would take to have it again; with its size and use it decides what is evicted.
        `readers`: so many processes, this one included, want a file for one load; it stays until all have asked.
        """
        try:
            link = self._link()
        except PoolError as error:
            return Refused(reason=str(error))
        request = messages.Open(
            key=key,
            nbytes=nbytes,
            kind=kind,
            label=label,
            reload_cost_s=float(reload_cost_s),
            readers=readers,
        )
        return _outcome(link, request, timeout_s=self._timeout_s)

    def list(self) -> list[EntryInfo]:
        """Everything in the pool. PoolError if the holder does not answer; so for all below."""
        entries: list[EntryInfo] = []
        with self._link() as link:
            more = True
            while more:
                after = entries[-1].number if entries else 0
                answer = _ask(link, messages.Ask(what="list", after=after), messages.Entries, self._timeout_s)
                entries += messages.entries_of(answer)
                more = answer.more
        return entries

    def stats(self) -> PoolStats:
        """The pool in numbers."""
        with self._link() as link:
            return messages.stats_of(
                _ask(link, messages.Ask(what="status"), messages.Numbers, self._timeout_s)
            )

    def pin(self, name: str) -> int:
        """Never evict entries with this key or label, those to come included: how many there are now.

        A pin also keeps the holder from ending when idle.
        """
        return self._told("pin", name).entries

    def unpin(self, name: str) -> bool:
        """Whether it was pinned."""
        return bool(self._told("unpin", name).entries)

    def drop(self, name: str) -> messages.Done:
        """Forget published entries with this key or label, and free what nobody uses; the rest goes with its users."""
        return self._told("drop", name)

    def stop(self) -> bool:
        """End the holder; what others have mapped stays theirs. See `pool_start.stop_holder`."""
        return pool_start.stop_holder(self._directory)

    def _told(self, what: str, name: str) -> messages.Done:
        with self._link() as link:
            return _ask(link, messages.Ask(what=what, name=name), messages.Done, self._timeout_s)

    def _link(self) -> Link:
        return Link(self._directory, timeout_s=self._timeout_s)


def _outcome(link: Link, request: messages.Request, *, timeout_s: float) -> Outcome:
    """Ask, and make of the answer what it gives; the link is closed if it gives nothing."""
    try:
        return _held(link, *link.ask(request, timeout_s=timeout_s), timeout_s=timeout_s)
    except PoolError as error:
        link.close()
        return Refused(reason=str(error))


def _held(link: Link, answer: messages.Answer, fd: int | None, *, timeout_s: float) -> Outcome:
    if not isinstance(answer, messages.Given) or fd is None:
        link.close()
        if isinstance(answer, messages.Refused):
            return Refused(reason=answer.reason, why=Refusal(answer.why))
        return Refused(reason=f"the holder answers wrongly: {answer}")
    held = _HELD[answer.how](link, fd, answer.nbytes, timeout_s=timeout_s)
    flaw = pool_memory.flaw(fd, answer.nbytes, answer.meta_bytes) if answer.how == "hit" else None
    if flaw is not None:
        held.close()
        return Refused(reason=f"the holder's memory is not to be trusted: {flaw}")
    return held


def _ask(link: Link, request: messages.Ask, wanted: type[A], timeout_s: float) -> A:
    answer, fd = link.ask(request, timeout_s=timeout_s)
    if fd is not None:
        os.close(fd)
    if isinstance(answer, messages.Refused):
        raise PoolError(answer.reason)
    if not isinstance(answer, wanted):
        raise PoolError(f"the holder answers wrongly: {answer}")
    return answer


def _greet_or_launch(
    directory: Path, *, budget_bytes: int | None, timeout_s: float, idle_timeout_s: float | None
) -> None:
    """Say hello to the holder; start one if nobody listens, and another if that one is not to be found either."""
    deadline_s, launched_s = monotonic_s() + timeout_s, None
    while True:
        remaining_s = max(deadline_s - monotonic_s(), _RETRY_S)
        try:
            Link(directory, budget_bytes=budget_bytes, timeout_s=remaining_s).close()
            return
        except HolderGone:
            now_s = monotonic_s()
            if now_s >= deadline_s:
                raise
        if launched_s is None or now_s - launched_s >= _RELAUNCH_S:
            first = launched_s is None
            try:
                pool_start.launch(directory, budget_bytes=budget_bytes, idle_timeout_s=idle_timeout_s)
            except PoolError:
                if first:
                    raise
            launched_s = monotonic_s()
            if first:
                deadline_s = max(deadline_s, launched_s + START_TIMEOUT_S)
        sleep_s(_RETRY_S)
