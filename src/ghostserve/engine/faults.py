"""Carries out an injected fault at a named point. Nothing happens unless one was armed from outside."""

from __future__ import annotations

import os
import signal

from ghostserve.arena.control import ControlPage, FaultAction, FaultPoint
from ghostserve.clock import monotonic_s, sleep_s

HANG_BOUND_S = 600.0


class InjectedFault(RuntimeError):
    """Raised by the `raise` action, as a model's own error would be."""


def hit(page: ControlPage, point: FaultPoint, rank: int) -> FaultAction | None:
    """Die, raise or hang here if a fault is armed for this point and rank; any other is returned."""
    action = page.take_fault(point, rank)
    if action is None:
        return None
    if action is FaultAction.KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    if action is FaultAction.RAISE:
        raise InjectedFault(f"injected at {point.value} on rank {rank}")
    if action is FaultAction.HANG:
        deadline_s = monotonic_s() + HANG_BOUND_S
        while monotonic_s() < deadline_s:
            sleep_s(0.1)
    return action
