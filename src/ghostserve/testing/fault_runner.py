"""Performs a FaultPlan on a running server through its routes, driven by what its clients see.

The caller tells what happens: `start`, `sending` and `sent` around a request, and tokens by a callback of `watch`. What
strikes in a step or in a recovery is armed in the server's fault table, which then needs nobody to wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ghostserve.arena.fault_kinds import KINDS, NEWCOMER_POINTS, SURVIVOR_POINTS, FaultKind
from ghostserve.arena.names import Fault
from ghostserve.errors import UsageError
from ghostserve.testing.client import StopStreaming, TokenCallback
from ghostserve.testing.fault_plan import FaultPlan, PlannedFault, RequestPhase
from ghostserve.web.bodies import DEFAULT_FACTOR, DEFAULT_STEPS

LOSING = frozenset(
    {
        FaultKind.CRASH,
        FaultKind.SEGFAULT,
        FaultKind.HANG,
        FaultKind.SPIN,
        FaultKind.BLOCKED,
        FaultKind.OOM,
    }
)
"""The kinds that end in another process taking the rank."""


class Admin(Protocol):
    """What is needed of `web.admin.AdminClient`."""

    def status(self) -> dict[str, Any]: ...

    def inflict(
        self, how: str, *, rank: int | None = None, steps: int | None = None, factor: int | None = None
    ) -> dict[str, Any]: ...

    def arm_fault(
        self, *, point: str, rank: int, action: str, skip: int = 0, argument: int = 0, count: int = 1
    ) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Performed:
    """A fault that was inflicted (`answer` names the process), armed (`armed`), or left to a client."""

    fault: PlannedFault
    armed: Fault | None = None
    answer: dict[str, Any] | None = None


class FaultRunner:
    """One plan, once. Streams may be watched from any number of threads."""

    def __init__(self, admin: Admin, plan: FaultPlan) -> None:
        """Raises UsageError for a plan that names a phase which its rank does not come by."""
        self.plan = plan
        self._admin = admin
        self._faults = plan.faults
        self._done: dict[int, Performed] = {}
        self._lock = threading.RLock()
        demand_possible(plan)

    @property
    def performed(self) -> list[Performed]:
        """In the order of the plan."""
        with self._lock:
            return [self._done[index] for index in sorted(self._done)]

    @property
    def is_done(self) -> bool:
        """Whether everything was performed; what is armed may still have to strike."""
        return len(self._done) == len(self._faults)

    def start(self) -> None:
        """From now on steps are counted; faults without a time happen. Raises what the server answers."""
        self._happen(lambda fault: fault.when.token is None and fault.when.request is None)

    def sending(self) -> None:
        """A request is about to be sent."""
        self._happen(lambda fault: fault.when.request is RequestPhase.PREFILL)

    def sent(self) -> None:
        """A request was sent; it has shown nothing."""
        self._happen(lambda fault: fault.when.request is RequestPhase.QUEUED)

    def watch(self) -> TokenCallback:
        """A callback for one stream, to be called for each chunk. It raises StopStreaming where a client is to leave."""
        shown = 0

        def on_token(index: int, ids: Sequence[int], text: str, at_s: float) -> None:
            nonlocal shown
            shown += len(ids)
            decodes = shown > 0
            self._happen(
                lambda fault: (
                    (fault.when.token is not None and shown >= fault.when.token)
                    or (fault.when.request is RequestPhase.DECODE and decodes)
                    or (fault.then and fault.when.token is None and fault.when.request is None)
                )
            )

        return on_token

    # -- private ---------------------------------------------------------------------------------------

    def _happen(self, is_time: Callable[[PlannedFault], bool]) -> None:
        """Perform whose time it is, in order, and what follows at once."""
        if self.is_done:
            return
        with self._lock:
            for index, fault in enumerate(self._faults):
                if index not in self._done and is_time(fault) and self._may_follow(index):
                    self._perform(index)

    def _may_follow(self, index: int) -> bool:
        """Whether the fault that it follows, if it does, has struck."""
        if not self._faults[index].then:
            return True
        before = self._done.get(index - 1)
        if before is None:
            return False
        if before.armed is None:
            return True
        known = (before.armed.point.value, before.armed.rank, before.armed.action.value)
        armed = self._admin.status()["armed_faults"]
        return all((item["point"], item["rank"], item["action"]) != known for item in armed)

    def _perform(self, index: int, *, steps_before: int = 0) -> None:
        fault = self._faults[index]
        follower = index + 1 if index + 1 < len(self._faults) and self._faults[index + 1].then else None
        if follower is not None and self._faults[follower].when.recovery is not None:
            self._perform(follower)  # armed first: the recovery begins at once
        self._done[index] = Performed(fault=fault)
        if fault.kind is FaultKind.CLIENT_GONE:
            raise StopStreaming
        self._done[index] = self._inflict(index, steps_before)
        if follower is not None and self._faults[follower].when.step is not None:
            self._perform(follower, steps_before=steps_before + (fault.when.step or 0))

    def _inflict(self, index: int, steps_before: int) -> Performed:
        fault, when = self._faults[index], self._faults[index].when
        armed: Fault | None = None
        if when.recovery is not None:
            armed = _recovery_fault(self._faults, index)
        elif when.step is not None:
            armed = self._step_fault(fault, skip=steps_before + when.step - 1)
        elif when.absolute_step is not None:
            armed = self._step_fault(fault, skip=self._steps_until(when.absolute_step))
        elif fault.dies or (when.request is RequestPhase.PREFILL and KINDS[fault.kind].action is not None):
            armed = self._step_fault(fault, skip=0)
        if armed is None:
            answer = self._admin.inflict(
                fault.kind.value, rank=fault.rank, steps=fault.steps, factor=fault.factor
            )
            return Performed(fault=fault, answer=answer)
        self._admin.arm_fault(
            point=armed.point.value,
            rank=armed.rank,
            action=armed.action.value,
            skip=armed.skip,
            argument=armed.argument,
            count=armed.count,
        )
        return Performed(fault=fault, armed=armed)

    def _steps_until(self, absolute: int) -> int:
        taken = int(self._admin.status()["counters"]["steps_total"])
        if absolute <= taken:
            raise UsageError(f"step {absolute} is over, the server has done {taken}: name a later one")
        return absolute - taken - 1

    def _step_fault(self, fault: PlannedFault, *, skip: int) -> Fault:
        facts = KINDS[fault.kind]
        assert facts.action is not None
        default_argument = DEFAULT_FACTOR if fault.kind is FaultKind.SLOW else int(fault.dies)
        return Fault(
            point=facts.points[0],
            rank=fault.rank or 0,
            action=facts.action,
            skip=skip,
            argument=default_argument if fault.factor is None else fault.factor,
            count=(DEFAULT_STEPS if facts.lasts else 1) if fault.steps is None else fault.steps,
        )


def demand_possible(plan: FaultPlan) -> None:
    """Raises UsageError for a plan that names a phase which its rank does not come by."""
    for index, fault in enumerate(plan.faults):
        if fault.when.recovery is not None:
            _recovery_fault(plan.faults, index)


def _recovery_fault(faults: Sequence[PlannedFault], index: int) -> Fault:
    """Where the rank of this fault passes in that phase: as a survivor, or as a newcomer if it is one by then."""
    fault = faults[index]
    phase, action = fault.when.recovery, KINDS[fault.kind].action
    assert phase is not None
    assert action is not None
    chain = index
    while faults[chain].then:
        chain -= 1
    lost = {before.rank for before in faults[chain:index] if before.kind in LOSING}
    newcomer = fault.rank in lost
    point = (NEWCOMER_POINTS if newcomer else SURVIVOR_POINTS).get(phase)
    if point is None:
        role = "a newcomer" if newcomer else "a survivor"
        raise UsageError(
            f"rank {fault.rank} is {role} by then and does not come by {phase.value!r}; choose another phase, or "
            f"{'a rank that lives' if newcomer else 'let it be lost first (then)'}"
        )
    return Fault(point=point, rank=fault.rank or 0, action=action)
