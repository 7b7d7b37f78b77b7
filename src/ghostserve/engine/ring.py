"""Bounded conversations with the ranks over vLLM's message ring.

A reply may never come: its rank died, or a peer's death left it inside a collective. So every wait looks, a few
times per second, at what the processes and their stamps say, and ends with an exception that names the ranks.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.connection
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.executor.multiproc_executor import WorkerProc, WorkerProcHandle

from ghostserve.clock import monotonic_s
from ghostserve.engine.messages import StepLeft
from ghostserve.engine.spawn import ring_readers_done

SLICE_S = 0.02
# A survivor's exception can be seen before its dead peer's exit is.
EXIT_GRACE_S = 1.0
SUCCESS = WorkerProc.ResponseStatus.SUCCESS


class RanksDied(Exception):
    """Processes of these ranks are gone."""

    def __init__(self, ranks: frozenset[int], reason: str) -> None:
        super().__init__(reason)
        self.ranks = ranks
        self.reason = reason


class RankRaised(Exception):
    """A rank answered with an exception, and all processes are alive."""

    def __init__(self, rank: int, reason: str) -> None:
        reason = reason or "an exception without a message"
        super().__init__(reason)
        self.rank = rank
        self.reason = reason


class RankSilent(Exception):
    """Ranks did not answer within their deadline. `by_time`: only the time says so, and of who was to answer.
    `evicted`: they do answer, and are replaced for being slow.
    """

    def __init__(
        self, ranks: frozenset[int], reason: str, *, by_time: bool = False, evicted: bool = False
    ) -> None:
        super().__init__(reason)
        self.ranks = ranks
        self.reason = reason
        self.by_time = by_time
        self.evicted = evicted


class Ring:
    """The executor's side of the ring. Not thread-safe: used under the session's lock."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._token = 0
        self.hung: Callable[[], frozenset[int]] = frozenset  # ranks whose process is stopped for too long
        # Of ranks that do not answer: those who hold up the others.
        self.at_fault: Callable[[frozenset[int]], frozenset[int]] = lambda silent: silent
        self._announced: dict[
            int, MessageQueue
        ] = {}  # by rank, where a large reply is on its way by the socket

    # -- who is there ----------------------------------------------------------------------------------

    @property
    def workers(self) -> Sequence[WorkerProcHandle]:
        return self._executor.workers

    def dead(self) -> frozenset[int]:
        """Ranks whose process has exited."""
        return frozenset(worker.rank for worker in self.workers if not worker.proc.is_alive())

    def wait_for_exit(self, timeout_s: float) -> frozenset[int]:
        """Ranks that have exited, waiting at most `timeout_s` for the first."""
        multiprocessing.connection.wait([worker.proc.sentinel for worker in self.workers], timeout_s)
        return self.dead()

    # -- sending ---------------------------------------------------------------------------------------

    def send(
        self, method: str, *args: Any, reply_rank: int | None = None, gone: Collection[int] = ()
    ) -> None:
        """Call a worker method on every rank; `reply_rank` answers, or all if None. `gone` never read again."""
        queue = self._executor.rpc_broadcast_mq
        if gone:
            ring_readers_done(queue, lambda: list(gone))
        queue.enqueue((method, args, {}, reply_rank), timeout=30.0)
        if gone:
            ring_readers_done(queue, lambda: list(gone))

    # -- waiting ---------------------------------------------------------------------------------------

    def wait_for_reply(
        self,
        rank: int,
        *,
        deadline_s: float,
        failed: Callable[[], int | None],
        expect_alive: Collection[int],
        look: Callable[[], None] = lambda: None,
    ) -> Any:
        """The next reply of a rank. `failed` names a rank whose stamp says that the step failed there; `look` is called
        every `SLICE_S` and may raise.

        Raises RanksDied, RankRaised or RankSilent.
        """
        while True:
            try:
                reply = self._next_reply(rank)
            except TimeoutError:
                if died := self.dead() & frozenset(expect_alive):
                    raise RanksDied(died, _exits(died)) from None
                if (raised := failed()) is not None:
                    self._raise(raised, f"rank {raised} failed its step", expect_alive)
                look()
                if hung := self.hung() & frozenset(expect_alive):
                    raise RankSilent(hung, f"process of rank {_names(hung)} is stopped") from None
                if monotonic_s() > deadline_s:
                    reason = f"rank {rank} did not answer in time"
                    raise RankSilent(frozenset({rank}), reason, by_time=True) from None
                continue
            return self._result(rank, reply, expect_alive)

    def _result(self, rank: int, reply: Any, expect_alive: Collection[int]) -> Any:
        """What a reply says. Raises RanksDied or RankRaised."""
        status, result = reply
        if status != SUCCESS or isinstance(result, StepLeft):
            self._raise(rank, result.reason if isinstance(result, StepLeft) else str(result), expect_alive)
        return result

    def _next_reply(self, rank: int, timeout_s: float = SLICE_S) -> Any:
        """What a rank sent next. Raises TimeoutError after `timeout_s`, with nothing lost.

        vLLM announces a large reply in the ring and sends it by a socket afterwards: once the announcement was
        taken, the rest is what comes next of that queue, if its sender gets that far.
        """
        queue = self._executor.response_mqs[rank]
        if self._announced.get(rank) is not queue:
            announced_at = queue.current_idx
            try:
                return queue.dequeue(timeout=timeout_s)
            except TimeoutError:
                if queue.current_idx == announced_at:
                    raise
                self._announced[rank] = queue
        reply = MessageQueue.recv(queue.local_socket, timeout=timeout_s)
        del self._announced[rank]
        return reply

    def _raise(self, rank: int, reason: str, expect_alive: Collection[int]) -> NoReturn:
        """A rank raised: if a process died, that is the cause."""
        if died := self.wait_for_exit(EXIT_GRACE_S) & frozenset(expect_alive):
            raise RanksDied(died, _exits(died))
        raise RankRaised(rank, reason)

    # -- asking ----------------------------------------------------------------------------------------

    def ask(
        self, method: str, *args: Any, ranks: Collection[int], gone: Collection[int] = (), timeout_s: float
    ) -> dict[int, Any]:
        """Call a method on every rank and collect the answers of `ranks`."""
        self.send(method, *args, gone=gone)
        return self.collect(ranks, timeout_s=timeout_s)

    def collect(self, ranks: Collection[int], *, timeout_s: float) -> dict[int, Any]:
        """One reply of each of these ranks. Raises RanksDied, RankRaised or RankSilent.

        They may meet in collectives on the way: one that raises, or hangs, leaves the others waiting for it. So all of them
        are looked at while the first is waited for, and at the end those are blamed who hold up the others.
        """
        deadline_s = monotonic_s() + timeout_s
        answers: dict[int, Any] = {}
        for rank in ranks:
            if rank in answers:
                continue
            others = [other for other in ranks if other not in (rank, *answers)]
            try:
                answers[rank] = self.wait_for_reply(
                    rank,
                    deadline_s=deadline_s,
                    failed=lambda: None,
                    expect_alive=ranks,
                    look=functools.partial(self._take_early, others, answers, expect_alive=ranks),
                )
            except RankSilent as failure:
                if not failure.by_time:
                    raise
                guilty = self.at_fault(frozenset(ranks) - answers.keys())
                raise RankSilent(
                    guilty, f"rank {_names(guilty)} did not answer in time", by_time=True
                ) from None
        return answers

    def _take_early(
        self, ranks: Collection[int], answers: dict[int, Any], *, expect_alive: Collection[int]
    ) -> None:
        """What has come of these ranks so far. Raises RanksDied or RankRaised."""
        for rank in ranks:
            if rank not in answers:
                with contextlib.suppress(TimeoutError):
                    answers[rank] = self._result(rank, self._next_reply(rank, timeout_s=0), expect_alive)

    def drain(self, ranks: Collection[int], *, gone: Collection[int], timeout_s: float) -> frozenset[int]:
        """Discard every reply sent before now. Returns the ranks that do not answer within `timeout_s`.

        After it each rank of `ranks` is known to be back in its message loop.
        """
        self._token += 1
        token = f"drained-{self._token}"
        self.send("ghost_echo", token, gone=gone)
        deadline_s = monotonic_s() + timeout_s
        silent = set()
        for rank in ranks:
            while True:
                try:
                    _, result = self._next_reply(rank)
                except TimeoutError:
                    if monotonic_s() > deadline_s or rank in self.dead() | self.hung():
                        silent.add(rank)
                        break
                    continue
                if result == token:
                    break
        return frozenset(silent)


def _exits(ranks: frozenset[int]) -> str:
    return f"process of rank {_names(ranks)} exited"


def _names(ranks: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
