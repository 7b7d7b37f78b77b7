"""Waiting for replies: of one that is too large for vLLM's ring (announced there, sent by a socket), and of all ranks, who may
wait for each other. Queues and sockets are stand-ins.
"""

from __future__ import annotations

import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.executor.multiproc_executor import WorkerProc

from ghostserve.clock import monotonic_s
from ghostserve.engine.ring import SUCCESS, RankRaised, RankSilent, Ring

POLLS_MAX = 100  # somebody who waits for ever ends here


class Socket:
    """Says after `slices` polls that there is something; never if that is infinite."""

    def __init__(self, slices: float) -> None:
        self.polls, self._slices = 0, slices

    def poll(self, timeout: int) -> bool:
        self.polls += 1
        assert self.polls < POLLS_MAX, "nobody looks whether the sender still runs"
        return self.polls > self._slices

    def recv_multipart(self, copy: bool) -> list[bytes]:
        return [pickle.dumps((SUCCESS, "large"))]


class Queue:
    """One announcement, then small replies."""

    def __init__(self, slices: float) -> None:
        self.current_idx, self.local_socket = 0, Socket(slices)

    def dequeue(self, timeout: float) -> Any:
        self.current_idx += 1
        if self.current_idx == 1:
            raise TimeoutError
        return SUCCESS, "small"


def ring_of(queue: Queue) -> Ring:
    process = SimpleNamespace(is_alive=lambda: True)
    return Ring(SimpleNamespace(workers=[SimpleNamespace(rank=0, proc=process)], response_mqs=[queue]))


def next_reply(ring: Ring) -> Any:
    return ring.wait_for_reply(0, deadline_s=monotonic_s() + 30, failed=lambda: None, expect_alive=[0])


def test_it_is_waited_for_and_taken_once() -> None:
    ring = ring_of(Queue(3))
    assert [next_reply(ring), next_reply(ring)] == ["large", "small"]


def test_its_sender_is_stopped_on_the_way() -> None:
    ring = ring_of(Queue(math.inf))
    ring.hung = lambda: frozenset({0})
    with pytest.raises(RankSilent):
        next_reply(ring)


def test_a_replacement_does_not_owe_it() -> None:
    ring = ring_of(Queue(math.inf))
    ring.hung = lambda: frozenset({0})
    with pytest.raises(RankSilent):
        next_reply(ring)
    fresh = Queue(0)
    fresh.current_idx = 1
    ring._executor.response_mqs[0] = fresh
    assert next_reply(ring) == "small"


class Answers:
    """Small replies, each once it is due."""

    def __init__(self, *replies: Any) -> None:
        self.current_idx, self._replies = 0, list(replies)

    def dequeue(self, timeout: float) -> Any:
        if not self._replies:
            raise TimeoutError
        return self._replies.pop(0)


def ring_of_ranks(*queues: Answers) -> Ring:
    processes = [SimpleNamespace(is_alive=lambda: True) for _ in queues]
    workers = [SimpleNamespace(rank=rank, proc=process) for rank, process in enumerate(processes)]
    ring = Ring(SimpleNamespace(workers=workers, response_mqs=list(queues)))
    ring.wait_for_exit = lambda timeout_s: frozenset()  # type: ignore[method-assign]
    return ring


def test_who_waits_for_a_peer_is_not_blamed() -> None:
    """Rank 0 waits in a collective for rank 1, which hangs; rank 2 has answered. Rank 0 is the first to be asked."""
    ring = ring_of_ranks(Answers(), Answers(), Answers((SUCCESS, "done")))
    asked: list[frozenset[int]] = []

    def at_fault(silent: frozenset[int]) -> frozenset[int]:
        asked.append(silent)
        return frozenset({1})

    ring.at_fault = at_fault
    with pytest.raises(RankSilent, match="rank 1 did not answer in time") as caught:
        ring.collect(range(3), timeout_s=0.0)
    assert (asked, caught.value.ranks, caught.value.by_time) == ([{0, 1}], {1}, True)


def test_a_rank_that_raises_is_heard_before_one_that_waits_for_it() -> None:
    """It left rank 0 in a collective: that would not answer before its deadline."""
    ring = ring_of_ranks(Answers(), Answers((WorkerProc.ResponseStatus.FAILURE, "no graph")))
    with pytest.raises(RankRaised, match="no graph") as caught:
        ring.collect(range(2), timeout_s=60.0)
    assert caught.value.rank == 1


def test_answers_that_come_early_are_kept() -> None:
    late = Answers()
    dequeue, asked = late.dequeue, 0

    def after_a_while(timeout: float) -> Any:
        nonlocal asked
        asked += 1
        return dequeue(timeout) if asked < 3 else (SUCCESS, "late")

    late.dequeue = after_a_while  # type: ignore[method-assign]
    ring = ring_of_ranks(late, Answers((SUCCESS, "early"), (SUCCESS, "of the next call")))
    assert ring.collect(range(2), timeout_s=60.0) == {0: "late", 1: "early"}
