"""The faults by the names that people use, and how each is brought about. Pure.

A kind is inflicted in up to two ways: at once, by a signal from outside, or armed, as a `FaultAction` that the process
suffers when it passes a point. What has no signal strikes in the next step instead of at once.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum, StrEnum

from ghostserve.arena.names import FaultAction, FaultPoint
from ghostserve.types import Phase

STEP_POINTS = (
    FaultPoint.BEFORE_MODEL,
    FaultPoint.AFTER_MODEL,
    FaultPoint.STAGED,
    FaultPoint.BEFORE_SAMPLE,
    FaultPoint.AFTER_SAMPLE,
    FaultPoint.BEFORE_REPLY,
)
SURVIVOR_POINTS = {  # by recovery phase: where a rank that lives passes
    Phase.LEAVE: FaultPoint.LEAVE,
    Phase.REGROUP: FaultPoint.REGROUP,
    Phase.STATE: FaultPoint.STATE,
    Phase.KV: FaultPoint.EXPORT,
    Phase.RETRY: FaultPoint.RETRY,
}
NEWCOMER_POINTS = {  # and where its replacement does
    Phase.SPAWN: FaultPoint.SPAWN,
    Phase.REGROUP: FaultPoint.REGROUP,
    Phase.WEIGHTS: FaultPoint.WEIGHTS,
    Phase.STATE: FaultPoint.STATE,
    Phase.KV: FaultPoint.ADOPT,
    Phase.RETRY: FaultPoint.RETRY,
}
_ANYWHERE = (*STEP_POINTS, *dict.fromkeys([*SURVIVOR_POINTS.values(), *NEWCOMER_POINTS.values()]))


class FaultKind(StrEnum):
    """What can go wrong, by name."""

    CRASH = "crash"
    SEGFAULT = "segfault"
    EXCEPTION = "exception"
    HANG = "hang"
    SPIN = "spin"
    BLOCKED = "blocked"
    SLOW = "slow"
    OOM = "oom"
    CORRUPT_KV = "corrupt_kv"
    CORRUPT_MIRROR = "corrupt_mirror"
    CORRUPT_PARITY = "corrupt_parity"
    KEEPER_CRASH = "keeper_crash"
    KEEPER_HANG = "keeper_hang"
    ARENA_WRITE_FAILURE = "arena_write_failure"
    MEMORY_EXHAUSTED = "memory_exhausted"
    STANDBY_DEAD = "standby_dead"
    CLIENT_GONE = "client_gone"


class Victim(Enum):
    """Who suffers it."""

    RANK = "rank"
    KEEPER = "keeper"
    ENGINE = "engine"
    STANDBY = "standby"
    CLIENT = "client"  # nothing that a server could be asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class KindFacts:
    """How a kind is brought about. With neither signal nor action, only a client can."""

    what: str  # for people, after "the worker" and the like
    victim: Victim = Victim.RANK
    by_signal: signal.Signals | None = None
    action: FaultAction | None = None
    points: tuple[FaultPoint, ...] = ()  # where `action` may strike; the first is where it does unless told
    lasts: bool = False  # it strikes for a number of steps


KINDS = {
    FaultKind.CRASH: KindFacts(
        what="ends by SIGKILL", by_signal=signal.SIGKILL, action=FaultAction.KILL, points=_ANYWHERE
    ),
    FaultKind.SEGFAULT: KindFacts(
        what="reads address 0", action=FaultAction.SEGFAULT, points=_ANYWHERE
    ),
    FaultKind.EXCEPTION: KindFacts(
        what="raises in a step", action=FaultAction.RAISE, points=_ANYWHERE
    ),
    FaultKind.HANG: KindFacts(
        what="is stopped by SIGSTOP", by_signal=signal.SIGSTOP, action=FaultAction.HANG, points=_ANYWHERE
    ),
    FaultKind.SPIN: KindFacts(
        what="spins and holds the interpreter's lock", action=FaultAction.SPIN, points=_ANYWHERE
    ),
    FaultKind.BLOCKED: KindFacts(
        what="waits in a collective that no other rank enters", action=FaultAction.BLOCKED, points=STEP_POINTS
    ),
    FaultKind.SLOW: KindFacts(
        what="takes several times as long for a step", action=FaultAction.SLOW,
        points=(FaultPoint.AFTER_MODEL,), lasts=True,
    ),
    FaultKind.OOM: KindFacts(
        what="is killed by the kernel for its memory", action=FaultAction.OOM, points=_ANYWHERE
    ),
    FaultKind.CORRUPT_KV: KindFacts(
        what="has flipped bits in live KV", action=FaultAction.CORRUPT_KV, points=(FaultPoint.STAGED,)
    ),
    FaultKind.CORRUPT_MIRROR: KindFacts(
        what="has a flipped byte in a mirror", action=FaultAction.CORRUPT_MIRROR, points=(FaultPoint.STAGED,)
    ),
    FaultKind.CORRUPT_PARITY: KindFacts(
        what="leaves a flipped byte in the parity it writes next", victim=Victim.KEEPER,
        action=FaultAction.CORRUPT_PARITY, points=(FaultPoint.KEEPER_ENCODING,),
    ),
    FaultKind.KEEPER_CRASH: KindFacts(
        what="ends by SIGKILL", victim=Victim.KEEPER, by_signal=signal.SIGKILL,
        action=FaultAction.KILL, points=(FaultPoint.KEEPER_ENCODING,),
    ),
    FaultKind.KEEPER_HANG: KindFacts(
        what="is stopped by SIGSTOP", victim=Victim.KEEPER, by_signal=signal.SIGSTOP,
        action=FaultAction.HANG, points=(FaultPoint.KEEPER_ENCODING,),
    ),
    FaultKind.ARENA_WRITE_FAILURE: KindFacts(
        what="cannot write a step's mirrors", action=FaultAction.FAIL_STAGING, points=(FaultPoint.AFTER_MODEL,)
    ),
    FaultKind.MEMORY_EXHAUSTED: KindFacts(
        what="finds no free frame in the arena", victim=Victim.ENGINE, action=FaultAction.TAKE_FRAMES,
        points=(FaultPoint.PLANNING,), lasts=True,
    ),
    FaultKind.STANDBY_DEAD: KindFacts(
        what="ends by SIGKILL", victim=Victim.STANDBY, by_signal=signal.SIGKILL
    ),
    FaultKind.CLIENT_GONE: KindFacts(what="goes away in mid-answer", victim=Victim.CLIENT),
}  # fmt: skip

ALIASES = {"corrupt": FaultKind.CORRUPT_KV}
NAMES = (*FaultKind, *ALIASES)


def kind_of(name: str) -> FaultKind | None:
    """The kind of this name, or None if there is none."""
    if name in ALIASES:
        return ALIASES[name]
    return FaultKind(name) if name in tuple(FaultKind) else None
