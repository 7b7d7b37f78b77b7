"""What our POST routes accept: JSON objects, read by hand into frozen nouns. Pure but for `read_object`.

The server's own validation answers 400 in its own words; reading by hand keeps 422 and sentences that name
the range or the choice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from fastapi import Request

from ghostserve.arena.fault_kinds import KINDS, NAMES, FaultKind, Victim, kind_of
from ghostserve.arena.names import Fault, FaultAction, FaultPoint, Switch
from ghostserve.errors import UsageError

BODY_BYTES_MAX = 4096
DEFAULT_STEPS, DEFAULT_FACTOR, FACTOR_MAX = 20, 5, 1000


E = TypeVar("E", bound=Enum)


class TooLong(UsageError):
    """The body is longer than anything we understand; the rest of it was not read."""


async def read_object(request: Request) -> dict[str, Any]:
    """The request's JSON object; raises UsageError if it is none, TooLong beyond BODY_BYTES_MAX."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > BODY_BYTES_MAX:
            raise TooLong(f"the body must not exceed {BODY_BYTES_MAX} bytes")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise UsageError("the body must be a JSON object") from None
    if not isinstance(value, dict):
        raise UsageError("the body must be a JSON object")
    return value


def _only(body: Mapping[str, Any], *names: str) -> None:
    unknown = sorted(set(body) - set(names))
    if unknown:
        raise UsageError(f"unknown field {unknown[0]!r}; known are {', '.join(names)}")


def _whole(body: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = body.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name!r} must be a whole number")
    return value


def _from_zero(body: Mapping[str, Any], name: str, default: int) -> int:
    value = _whole(body, name, default)
    if not 0 <= value < 1 << 63:
        raise UsageError(f"{name!r} must be a whole number from 0 on")
    return value


def _one_of(body: Mapping[str, Any], name: str, choices: type[E]) -> E:
    try:
        return choices(body.get(name))
    except ValueError:
        known = ", ".join(str(choice.value) for choice in choices)
        raise UsageError(f"{name} {body.get(name)!r} does not exist; known are {known}") from None


def _rank_in(body: Mapping[str, Any], ranks_total: int) -> int:
    rank = _whole(body, "rank")
    if not 0 <= rank < ranks_total:
        raise UsageError(f"rank {rank} does not exist; ranks are 0 to {ranks_total - 1}")
    return rank


@dataclass(frozen=True, slots=True, kw_only=True)
class KillOrder:
    """A fault that is wanted now."""

    kind: FaultKind
    rank: int | None  # of the kinds that a rank suffers
    steps: int  # of the kinds that last; 0: until it is disarmed
    factor: int  # of SLOW


def parse_kill(body: Mapping[str, Any], *, ranks_total: int) -> KillOrder:
    """The order of `{"rank": R, "how": KIND, "steps": N, "factor": K}`; `how` defaults to crash. Raises UsageError."""
    _only(body, "rank", "how", "steps", "factor")
    how = body.get("how", FaultKind.CRASH.value)
    kind = kind_of(how) if isinstance(how, str) else None
    if kind is None:
        raise UsageError(f"how {how!r} does not exist; known are {', '.join(NAMES)}")
    facts = KINDS[kind]
    for name, is_known in (("steps", facts.lasts), ("factor", kind is FaultKind.SLOW)):
        if name in body and not is_known:
            raise UsageError(f"{name!r} says nothing about {kind.value}: leave it out")
    if facts.victim is not Victim.RANK and body.get("rank") is not None:
        raise UsageError(f"{kind.value} concerns no rank: leave 'rank' out")
    factor = _from_zero(body, "factor", DEFAULT_FACTOR)
    if not 2 <= factor <= FACTOR_MAX:
        raise UsageError(f"'factor' must be a whole number from 2 to {FACTOR_MAX}")
    return KillOrder(
        kind=kind,
        rank=_rank_in(body, ranks_total) if facts.victim is Victim.RANK else None,
        steps=_from_zero(body, "steps", DEFAULT_STEPS if facts.lasts else 1),
        factor=factor,
    )


def parse_fault(body: Mapping[str, Any], *, ranks_total: int) -> Fault:
    """The fault of `{"point", "rank", "action", "skip", "argument", "count"}`; the last three default to 0, 0
    and 1. Raises UsageError.
    """
    _only(body, "point", "rank", "action", "skip", "argument", "count")
    return Fault(
        point=_one_of(body, "point", FaultPoint),
        rank=_rank_in(body, ranks_total),
        action=_one_of(body, "action", FaultAction),
        skip=_from_zero(body, "skip", 0),
        argument=_from_zero(body, "argument", 0),
        count=_from_zero(body, "count", 1),
    )


def parse_switches(body: Mapping[str, Any]) -> dict[Switch, bool]:
    """The switches of `{NAME: true | false, ...}`, names in lower case. Raises UsageError; none is set
    halfway.
    """
    if not body:
        raise UsageError("name at least one switch")
    switches: dict[Switch, bool] = {}
    for name, value in body.items():
        if name.upper() not in Switch.__members__:
            known = ", ".join(switch.name.lower() for switch in Switch)
            raise UsageError(f"switch {name!r} does not exist; known are {known}")
        if not isinstance(value, bool):
            raise UsageError(f"switch {name!r} must be true or false")
        switches[Switch[name.upper()]] = value
    return switches
