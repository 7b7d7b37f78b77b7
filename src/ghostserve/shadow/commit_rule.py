"""Whose word counts: when a step is accepted, which steps a rank runs, what may be freed meanwhile. Pure.

engine core ── step (epoch, number) ──▶ rank: StepGate      refuses other epochs, and all after a failed step
engine core ◀── stamp (epoch, number, status) ── rank       accepted once `first_unfinished` finds nobody
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ghostserve.arena.names import Stamp, StampStatus
from ghostserve.types import Decision


def has_finished(stamp: Stamp, *, epoch: int, step: int) -> bool:
    """Whether a rank with this stamp has done its share of the step.

    One that is at a later step has finished this one: it goes no further after a failure.
    """
    done = stamp.step == step and stamp.status is StampStatus.DONE
    return stamp.epoch == epoch and (done or stamp.step > step)


def has_failed(stamp: Stamp, *, epoch: int, step: int) -> bool:
    """Whether the stamp says that exactly this step failed there, by its own fault or a peer's."""
    failed = stamp.status in (StampStatus.FAILED, StampStatus.PEER_LEFT)
    return failed and (stamp.epoch, stamp.step) == (epoch, step)


def raised_itself(stamp: Stamp, *, epoch: int, step: int) -> bool:
    """Whether the step raised there by itself, not because a peer had left."""
    return stamp.status is StampStatus.FAILED and (stamp.epoch, stamp.step) == (epoch, step)


def first_unfinished(
    read_stamp: Callable[[int], Stamp], ranks: Iterable[int], *, epoch: int, step: int
) -> int | None:
    """The commit rule: the first of these ranks that has not finished the step; None if all have."""
    for rank in ranks:
        if not has_finished(read_stamp(rank), epoch=epoch, step=step):
            return rank
    return None


@dataclass(slots=True)
class StepGate:
    """Which steps a rank runs. After a failed one none, until it was re-formed: the state is no one's."""

    epoch: int = 0
    failed_at: tuple[int, int] | None = None  # (epoch, step)

    def refusal(self, *, epoch: int) -> str | None:
        """Why a step of this epoch must not be run; None: run it."""
        if epoch != self.epoch:
            return f"a step of epoch {epoch}, now {self.epoch}"
        if self.failed_at is not None:
            return f"refused after the failed step {self.failed_at}"
        return None

    def failed(self, *, epoch: int, step: int) -> None:
        """A step failed here."""
        self.failed_at = (epoch, step)

    def reformed(self, *, epoch: int) -> None:
        """The rank has taken on the state after the last accepted step, in this epoch."""
        self.epoch, self.failed_at = epoch, None


def defers_frees(batches_in_flight_max: int) -> Decision[bool]:
    """Whether a block given up by its request stays taken until the steps sent before that are accepted.

    A step that runs again must find what it read the first time. With one batch nothing is sent between the two.
    """
    if batches_in_flight_max > 1:
        return Decision(choice=True, reason="a step in flight may run again, and reads it again")
    return Decision(choice=False, reason="no other step is sent before the one in flight is accepted")
