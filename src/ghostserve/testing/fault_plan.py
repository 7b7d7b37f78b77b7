"""Plans of faults that read like a sentence, in code and in files. Pure: who performs them is `fault_runner`.

    FaultPlan().crash(rank=1).at_token(40).then.hang(rank=0).in_recovery("kv")

    {"faults": [{"kind": "crash", "rank": 1, "at": {"token": 40}},
                {"kind": "hang", "rank": 0, "at": {"recovery": "kv"}, "then": true}]}

A word for the fault, then one for its time (at once if there is none). Faults do not wait for each other; after `then`
the time of the next one counts from the one before it. Every bad value is a UsageError with its remedy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from ghostserve.arena.fault_kinds import KINDS, NEWCOMER_POINTS, SURVIVOR_POINTS, FaultKind, Victim, kind_of
from ghostserve.errors import UsageError
from ghostserve.types import Phase

RECOVERY_PHASES = tuple(phase for phase in Phase if phase in {*SURVIVOR_POINTS, *NEWCOMER_POINTS})


class RequestPhase(StrEnum):
    """Where a request is, as its client can tell."""

    QUEUED = "queued"  # sent, and not taken by a step
    PREFILL = "prefill"  # in its first step
    DECODE = "decode"  # its first token was shown


@dataclass(frozen=True, slots=True, kw_only=True)
class When:
    """At most one is set; none: at once."""

    step: int | None = None  # the n-th step from now, or from the fault before; 1 is the next one
    absolute_step: int | None = None  # of the server's life, as its counter steps_total tells
    token: int | None = None  # a stream has shown so many
    request: RequestPhase | None = None
    recovery: Phase | None = None  # of the first recovery that comes by there

    def __post_init__(self) -> None:
        set_ones = [item.name for item in fields(self) if getattr(self, item.name) is not None]
        if len(set_ones) > 1:
            raise UsageError(f"a fault has one time, not {' and '.join(set_ones)}: keep one of them")
        for name in ("step", "absolute_step", "token"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} {value!r}: must be a whole number from 1 on")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFault:
    """One fault and its time."""

    kind: FaultKind
    rank: int | None = None
    when: When = When()
    then: bool = False  # its time counts from the fault before it
    steps: int | None = None  # of kinds that last; 0: until disarmed
    factor: int | None = None  # of SLOW
    dies: bool = False  # of CORRUPT_KV: the rank ends by SIGKILL before anybody reads what it holds

    def __post_init__(self) -> None:
        facts = KINDS[self.kind]
        if facts.victim is Victim.RANK and (type(self.rank) is not int or self.rank < 0):
            raise UsageError(f"{self.kind}: rank {self.rank!r} is none; name one from 0 on")
        if facts.victim is not Victim.RANK and self.rank is not None:
            raise UsageError(f"{self.kind} concerns no rank: leave rank {self.rank} out")
        for name, is_known in (("steps", facts.lasts), ("factor", self.kind is FaultKind.SLOW)):
            value = getattr(self, name)
            if value is not None and not is_known:
                raise UsageError(f"{self.kind}: {name} says nothing about it: leave it out")
            if value is not None and (type(value) is not int or value < 0):
                raise UsageError(f"{self.kind}: {name} {value!r} must be a whole number from 0 on")
        if self.dies and self.kind is not FaultKind.CORRUPT_KV:
            raise UsageError(f"{self.kind}: dies says nothing about it: leave it out")
        self._check_time()

    def _check_time(self) -> None:
        facts, when = KINDS[self.kind], self.when
        if self.kind is FaultKind.CLIENT_GONE and when.token is None:
            raise UsageError("client_gone is timed by its own stream: give it at_token(N)")
        if facts.action is None and (when.step, when.absolute_step) != (None, None):
            raise UsageError(f"{self.kind} does not strike in a step: give it at_token(N), or no time")
        if when.recovery is None:
            return
        if when.recovery not in RECOVERY_PHASES:
            known = ", ".join(phase.value for phase in RECOVERY_PHASES)
            raise UsageError(
                f"nothing can strike in the phase {when.recovery.value!r}; choose one of {known}"
            )
        points = {SURVIVOR_POINTS.get(when.recovery), NEWCOMER_POINTS.get(when.recovery)} - {None}
        if not points <= set(facts.points):
            raise UsageError(
                f"{self.kind} cannot strike during a recovery; time it by step or token, or choose another kind"
            )


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Faults in the order in which they are told. Frozen: each word gives a new plan."""

    faults: tuple[PlannedFault, ...] = ()
    _then: bool = False

    # -- faults ----------------------------------------------------------------------------------------

    def crash(self, *, rank: int) -> FaultPlan:
        """The worker ends by SIGKILL."""
        return self._add(FaultKind.CRASH, rank=rank)

    def segfault(self, *, rank: int) -> FaultPlan:
        """The worker reads address 0."""
        return self._add(FaultKind.SEGFAULT, rank=rank)

    def exception(self, *, rank: int) -> FaultPlan:
        """A step raises in the worker."""
        return self._add(FaultKind.EXCEPTION, rank=rank)

    def hang(self, *, rank: int) -> FaultPlan:
        """The worker is stopped by SIGSTOP."""
        return self._add(FaultKind.HANG, rank=rank)

    def spin(self, *, rank: int) -> FaultPlan:
        """The worker spins and never gives the interpreter's lock back."""
        return self._add(FaultKind.SPIN, rank=rank)

    def blocked(self, *, rank: int) -> FaultPlan:
        """The worker waits in a collective that no other enters."""
        return self._add(FaultKind.BLOCKED, rank=rank)

    def slow(self, *, rank: int, factor: int, steps: int = 0) -> FaultPlan:
        """The worker takes `factor` times as long for a step, `steps` times; 0: until disarmed."""
        return self._add(FaultKind.SLOW, rank=rank, factor=factor, steps=steps)

    def oom(self, *, rank: int) -> FaultPlan:
        """The kernel kills the worker for its memory."""
        return self._add(FaultKind.OOM, rank=rank)

    def corrupt_kv(self, *, rank: int, dies: bool = False) -> FaultPlan:
        """Bits of a live block flip on one rank; if it `dies`, by SIGKILL, before anybody reads them."""
        return self._add(FaultKind.CORRUPT_KV, rank=rank, dies=dies)

    def corrupt_mirror(self, *, rank: int) -> FaultPlan:
        """A byte of a mirror flips after its checksum was taken."""
        return self._add(FaultKind.CORRUPT_MIRROR, rank=rank)

    def corrupt_parity(self) -> FaultPlan:
        """A byte of the next parity flips after its checksum was taken."""
        return self._add(FaultKind.CORRUPT_PARITY)

    def keeper_crash(self) -> FaultPlan:
        """The keeper ends by SIGKILL."""
        return self._add(FaultKind.KEEPER_CRASH)

    def keeper_hang(self) -> FaultPlan:
        """The keeper is stopped by SIGSTOP."""
        return self._add(FaultKind.KEEPER_HANG)

    def arena_write_failure(self, *, rank: int) -> FaultPlan:
        """A step cannot be mirrored on one rank."""
        return self._add(FaultKind.ARENA_WRITE_FAILURE, rank=rank)

    def memory_exhausted(self, *, steps: int = 20) -> FaultPlan:
        """No frame of the arena is free for so many steps."""
        return self._add(FaultKind.MEMORY_EXHAUSTED, steps=steps)

    def standby_dead(self) -> FaultPlan:
        """A standby ends by SIGKILL."""
        return self._add(FaultKind.STANDBY_DEAD)

    def client_gone(self, *, at_token: int) -> FaultPlan:
        """A client leaves when it was shown so many tokens."""
        return self._add(FaultKind.CLIENT_GONE, when=When(token=at_token))

    # -- times, of the fault told last -----------------------------------------------------------------

    def at_step(self, n: int) -> FaultPlan:
        """In the n-th step from now, or from the fault before if that came with `then`; 1 is the next one."""
        return self._time(When(step=n))

    def at_absolute_step(self, n: int) -> FaultPlan:
        """In the n-th step of the server's life."""
        return self._time(When(absolute_step=n))

    def at_token(self, k: int) -> FaultPlan:
        """When a stream has shown k tokens."""
        return self._time(When(token=k))

    def in_request(self, phase: str) -> FaultPlan:
        """While a request is `queued`, in `prefill` or in `decode`."""
        return self._time(When(request=_one_of(phase, RequestPhase, "request phase")))

    def in_recovery(self, phase: str) -> FaultPlan:
        """In this phase of a recovery."""
        return self._time(When(recovery=_one_of(phase, Phase, "recovery phase")))

    @property
    def then(self) -> FaultPlan:
        """The time of the next fault counts from the one told last."""
        if not self.faults:
            raise UsageError("'then' follows a fault: name one first")
        return replace(self, _then=True)

    # -- files -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is not set is left out."""
        return {"faults": [_fault_as_dict(fault) for fault in self.faults]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        import yaml

        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_dict(cls, value: object) -> FaultPlan:
        """The plan of what `to_dict` gives. Raises UsageError naming the fault, counted from 1."""
        if (
            not isinstance(value, Mapping)
            or set(value) != {"faults"}
            or not isinstance(value["faults"], list)
        ):
            raise UsageError('a plan is an object {"faults": [...]}, and nothing beside')
        faults = []
        for number, item in enumerate(value["faults"], 1):
            try:
                faults.append(_fault_of(item))
            except UsageError as error:
                raise UsageError(f"fault {number}: {error}") from None
        if faults and faults[0].then:
            raise UsageError("fault 1: 'then' follows a fault: leave it out of the first one")
        return cls(tuple(faults))

    @classmethod
    def from_text(cls, text: str) -> FaultPlan:
        """A plan in JSON or YAML."""
        import yaml

        try:
            return cls.from_dict(yaml.safe_load(text))  # JSON is YAML, too
        except yaml.YAMLError as error:
            raise UsageError(f"neither JSON nor YAML: {' '.join(str(error).split())}") from None

    @classmethod
    def from_file(cls, path: Path) -> FaultPlan:
        """A plan in a .json, .yaml or .yml file. Raises UsageError naming the file."""
        try:
            return cls.from_text(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the plan {path} cannot be read: {error}") from None
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None

    # -- private ---------------------------------------------------------------------------------------

    def _add(self, kind: FaultKind, **values: Any) -> FaultPlan:
        return FaultPlan((*self.faults, PlannedFault(kind=kind, then=self._then, **values)))

    def _time(self, when: When) -> FaultPlan:
        if not self.faults or self._then:
            raise UsageError("a time follows its fault: name one first, for instance crash(rank=0)")
        last = self.faults[-1]
        if last.when != When():
            raise UsageError(f"{last.kind} has a time already; name the next fault first")
        return FaultPlan((*self.faults[:-1], replace(last, when=when)))


def _one_of(value: object, choices: type[Enum], what: str) -> Any:
    try:
        return choices(value)
    except ValueError:
        known = ", ".join(str(choice.value) for choice in choices)
        raise UsageError(f"there is no {what} {value!r}; choose one of {known}") from None


_TIMES = ("step", "absolute_step", "token", "request", "recovery")


def _fault_as_dict(fault: PlannedFault) -> dict[str, Any]:
    when = {name: getattr(fault.when, name) for name in _TIMES}
    at = {name: getattr(value, "value", value) for name, value in when.items() if value is not None}
    values = {"rank": fault.rank, "steps": fault.steps, "factor": fault.factor}
    return {
        "kind": fault.kind.value,
        **{name: value for name, value in values.items() if value is not None},
        **({"dies": True} if fault.dies else {}),
        **({"at": at} if at else {}),
        **({"then": True} if fault.then else {}),
    }


def _fault_of(item: object) -> PlannedFault:
    if not isinstance(item, Mapping):
        raise UsageError(f'{item!r} is no fault; write {{"kind": "crash", "rank": 0}}')
    _only(item, ("kind", "rank", "steps", "factor", "dies", "at", "then"))
    name = item.get("kind")
    kind = kind_of(name) if isinstance(name, str) else None
    if kind is None:
        raise UsageError(f"there is no kind {name!r}; choose one of {', '.join(FaultKind)}")
    flags = {name: item.get(name, False) for name in ("then", "dies")}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise UsageError(f"{name!r} is {flag!r}; write true or false")
    at = item.get("at", {})
    if not isinstance(at, Mapping):
        raise UsageError(f"'at' is {at!r}; write for example {{\"token\": 40}}")
    _only(at, _TIMES)
    when = dict(at)
    if "request" in when:
        when["request"] = _one_of(when["request"], RequestPhase, "request phase")
    if "recovery" in when:
        when["recovery"] = _one_of(when["recovery"], Phase, "recovery phase")
    values = {name: item[name] for name in ("rank", "steps", "factor") if name in item}
    return PlannedFault(kind=kind, when=When(**when), **flags, **values)


def _only(item: Mapping[Any, Any], names: Sequence[str]) -> None:
    unknown = [str(name) for name in item if name not in names]
    if unknown:
        raise UsageError(f"unknown field {unknown[0]!r}; known are {', '.join(names)}")
