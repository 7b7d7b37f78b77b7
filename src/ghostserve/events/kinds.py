"""The kinds of events: frozen, plain values only, units in the names. Pure.

An event says what happened, once it has; `Record` (record.py) says when and in which order. `rank` and `request` are
whom it is about; everything else becomes `data`. A request has the id that vLLM's engine gave it: the id in the
response, an index where a request has several prompts, and eight random characters.

A kind's name is part of the interface (route, file, `--kind`): it is never changed, and fields are only added, with a
default, so that a file of an older version can be read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all kinds."""

    kind: ClassVar[str] = ""
    names: ClassVar[tuple[str, ...]] = ()  # of its fields
    rank: int | None = None
    request: str | None = None

    def values(self) -> dict[str, Any]:
        """All fields as plain values."""
        return {name: getattr(self, name) for name in self.names}


# -- the server ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStarted(Event):
    """The front process is there; the engine starts."""

    pid: int
    version: str
    model: str
    ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerServing(Event):
    """Requests are answered from here on."""

    start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerDraining(Event):
    """It was told to end; open requests have so long."""

    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStopped(Event):
    """The server has ended, or could not start. `reason`: why, where it was not told to."""

    exit_status: int
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerGaveUp(Event):
    """The group cannot be repaired: clients get an error and the server ends."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultInjected(Event):
    """Somebody asked for a fault."""

    how: str
    pid: int | None = None
    strikes: str = "now"


# -- requests --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAdmitted(Event):
    """The scheduler has it. `traceparent`: the W3C trace context it came with, if any."""

    prompt_tokens: int
    max_tokens: int
    traceparent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFinished(Event):
    """Its answer is complete. `reason` as in the response; `total_ms` since it arrived."""

    reason: str
    output_tokens: int
    total_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAborted(Event):
    """Its client left, or the server ended."""

    output_tokens: int
    total_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFailed(Event):
    """It ended with an error."""

    output_tokens: int
    total_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecomputed(Event):
    """Its context is computed again from its tokens; nothing it showed is taken back."""

    tokens: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestResumed(Event):
    """A recovery that it waited for is over, and it goes on."""

    epoch: int
    output_tokens: int
    recovery_ms: float
    traceparent: str | None = None


# -- losses and recoveries -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLost(Event):
    """A rank's process is given up. `cause`: crash, hang or slow."""

    cause: str
    pid: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFenced(Event):
    """Its process was killed, so that nothing of it can come any more."""

    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTaken(Event):
    """Another process has the rank from here on: a standby, or a new one."""

    pid: int
    standby: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSlow(Event):
    """It holds the others up."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankNotSlow(Event):
    """It keeps up again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRaised(Event):
    """What belongs to an older epoch is refused from here on."""

    epoch: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseBegun(Event):
    """A phase of a recovery; the names are those of `types.Phase`."""

    phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEnded(Event):
    """It is over."""

    phase: str
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseFailed(Event):
    """It could not be finished; another attempt follows, or the end."""

    phase: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryEnded(Event):
    """The report of a recovery, good or bad. `ranks`: who was lost."""

    epoch: int
    ranks: list[int]
    path: str
    ok: bool
    reason: str
    total_ms: float
    phases_ms: dict[str, float]
    kv_blocks_from_parity: int
    kv_blocks_from_mirrors: int
    kv_bytes_rebuilt: int
    tokens_recomputed: int
    requests_recomputed: int
    requests_resumed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRaised(Event):
    """A step raised an error, all ranks being alive; it is tried again."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed(Event):
    """A step is given up: its requests get an error, serving goes on."""

    reason: str
    requests: int


# -- what stands behind ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbyReady(Event):
    """A process waits to take any rank."""

    pid: int
    start_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbyDied(Event):
    """It ended, or did not start in time; another one is started."""

    pid: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperDied(Event):
    """The process that codes parity ended; what it had not coded stays mirrored."""

    pid: int
    status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperRestarted(Event):
    """It was started again."""

    pid: int
    restarts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperGivenUp(Event):
    """It died too often and is left alone for a while: nothing is coded meanwhile."""

    deaths: int
    window_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionLost(Event):
    """The shadow gave up for an error: a loss would be answered by recomputing."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectionRegained(Event):
    """The shadow protects again what comes from here on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvUnprotected(Event):
    """Some KV has no copy: after a loss it would be computed again. Told at most once a minute."""

    blocks: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KvProtected(Event):
    """All KV has a copy again, and has had for a while."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubFinding(Event):
    """Bytes differ from their checksum, and what became of it. `part`: kv, mirror or parity; `shard` for parity."""

    part: str
    block: int
    repaired: bool
    remedy: str
    reason: str = ""
    shard: int | None = None
    layers: list[str] = field(default_factory=list)


def _name_of(kind: type[Event]) -> str:
    """`RankLost` as `rank_lost`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


KINDS: Mapping[str, type[Event]] = {_name_of(kind): kind for kind in Event.__subclasses__()}
for _name, _kind in KINDS.items():
    _kind.kind, _kind.names = _name, tuple(item.name for item in dataclasses.fields(_kind))

OF_REQUESTS = frozenset(name for name in KINDS if name.startswith("request_"))
"""As many as there are requests: kept apart, so that they do not push out what happened to the server."""


def event_of(kind: str, values: Mapping[str, Any]) -> Event | None:
    """The event; None for a kind that is not known, as a newer version may write. Unknown values are left out.

    Raises ValueError where one is missing.
    """
    cls = KINDS.get(kind)
    if cls is None:
        return None
    try:
        return cls(**{name: value for name, value in values.items() if name in cls.names})
    except TypeError as error:
        raise ValueError(f"{kind}: {error}") from None
