"""Inflicting a fault on a running server: a signal to exactly the process that is meant, or an entry in the fault table.

Reads the state document and the page only; nothing here waits for the engine.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ghostserve.arena.fault_kinds import KINDS, FaultKind, Victim
from ghostserve.arena.memory_group import MemoryGroup
from ghostserve.arena.names import Fault
from ghostserve.errors import GhostserveError, UsageError
from ghostserve.types import RankState
from ghostserve.web.bodies import KillOrder
from ghostserve.web.processes import KillOutcome, kill_exactly, read_start_time_ticks


class NotNow(GhostserveError):
    """There is nobody who could suffer it at the moment."""


class Arms(Protocol):
    """What is needed of the control page."""

    def arm_fault(self, fault: Fault) -> int:
        """Have a rank suffer it; raises BudgetExceeded if full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Process:
    """Who is to suffer, for good."""

    name: str
    pid: int
    start_time_ticks: int


def inflict(page: Arms, state: Mapping[str, Any], order: KillOrder) -> dict[str, Any]:
    """Do it, and say to whom and when. Raises NotNow, UsageError or BudgetExceeded; then nothing was done."""
    facts = KINDS[order.kind]
    if facts.victim is Victim.CLIENT:
        raise UsageError(f"{order.kind.value} is a client's to do: close the connection of a stream")
    process = _process_of(state, facts.victim, order.rank)
    if order.kind is FaultKind.OOM:
        MemoryGroup.demand()
    if facts.by_signal is not None:
        assert process is not None
        _send(process, facts.by_signal)
    else:
        assert facts.action is not None
        factor = order.factor if order.kind is FaultKind.SLOW else 0
        page.arm_fault(
            Fault(
                point=facts.points[0],
                rank=order.rank or 0,
                action=facts.action,
                argument=factor,
                count=order.steps,
            )
        )
    return {
        "how": order.kind.value,
        "rank": order.rank,
        "pid": None if process is None else process.pid,
        "epoch": state["epoch"],
        "killed": facts.by_signal is signal.SIGKILL,
        "strikes": "now" if facts.by_signal is not None else "in the next step",
    }


def _send(process: _Process, signum: signal.Signals) -> None:
    if kill_exactly(process.pid, process.start_time_ticks, signum) is not KillOutcome.SENT:
        raise NotNow(f"{process.name} is not alive: its process {process.pid} is gone")


def _process_of(state: Mapping[str, Any], victim: Victim, rank: int | None) -> _Process | None:
    """The process that the state document names; None if none of its own is meant. Raises NotNow."""
    match victim:
        case Victim.RANK:
            entry = next((entry for entry in state["ranks"] if entry["rank"] == rank), None)
            if entry is None or entry["state"] != RankState.ALIVE.value:
                raise NotNow(f"rank {rank} is {entry['state'] if entry else 'not there'}, not alive")
            return _known(f"rank {rank}", entry)
        case Victim.KEEPER:
            return _known("the keeper", state.get("keeper") or {})
        case Victim.STANDBY:
            standbys = state.get("standbys") or ()
            if not standbys:
                raise NotNow(
                    "there is no standby: start the server with --standbys 1, or wait until one is ready"
                )
            return _known("the standby", standbys[0])
        case _:
            return None


def _known(name: str, entry: Mapping[str, Any]) -> _Process:
    pid = entry.get("pid")
    ticks = entry.get("start_time") or (read_start_time_ticks(pid) if pid else None)
    if pid is None or ticks is None:
        raise NotNow(f"{name} is not alive now; it is started anew, try again in a moment")
    return _Process(name=name, pid=pid, start_time_ticks=ticks)
