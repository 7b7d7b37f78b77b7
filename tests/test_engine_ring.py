"""Waiting for a reply too large for vLLM's ring: announced there, sent by a socket. Queues and sockets are stand-ins."""

from __future__ import annotations

import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from ghostserve.clock import monotonic_s
from ghostserve.engine.ring import SUCCESS, RankSilent, Ring

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
