"""What our routes take and answer, as OpenAPI says it: for tests that call them with everything that fits, and what does not.

Bodies are read by hand (`web.bodies`), so their schemas stand here; both are made of the same names. No server publishes this
unless `build_router` is told so: vLLM's document keeps to vLLM's routes.
"""

from __future__ import annotations

from typing import Any

from ghostserve.arena.fault_kinds import KINDS, NAMES, FaultKind, Victim, kind_of
from ghostserve.arena.names import FaultAction, FaultPoint, Switch
from ghostserve.web.bodies import FACTOR_MAX

Schema = dict[str, Any]

_RANK: Schema = {"type": "integer", "minimum": 0}
_COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": (1 << 63) - 1}


def _object(properties: Schema, *, required: tuple[str, ...] = ()) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _kill_of(name: str, kind: FaultKind) -> Schema:
    """The order of one kind: only what concerns it may be said."""
    facts = KINDS[kind]
    of_rank = facts.victim is Victim.RANK
    properties: Schema = {"how": {"const": name}}
    properties["rank"] = _RANK if of_rank else {"type": "null"}
    if facts.lasts:
        properties["steps"] = _COUNT
    if kind is FaultKind.SLOW:
        properties["factor"] = {"type": "integer", "minimum": 2, "maximum": FACTOR_MAX}
    required = [*([] if kind is FaultKind.CRASH else ["how"]), *(["rank"] if of_rank else [])]
    return _object(properties, required=tuple(required))


KILL: Schema = {
    "anyOf": [
        _kill_of(str(name), kind)
        for name in NAMES
        if (kind := kind_of(name)) is not None and KINDS[kind].victim is not Victim.CLIENT
    ]
}
FAULT = _object(
    {
        "point": {"enum": [point.value for point in FaultPoint]},
        "rank": _RANK,
        "action": {"enum": [action.value for action in FaultAction]},
        "skip": _COUNT,
        "argument": _COUNT,
        "count": _COUNT,
    },
    required=("point", "rank", "action"),
)
SWITCHES = _object({switch.name.lower(): {"type": "boolean"} for switch in Switch}) | {"minProperties": 1}

REFUSALS = {
    401: "the key is missing or wrong",
    403: "from here, or on this server, it is not allowed",
    409: "not at the moment",
    413: "the body is too long",
    422: "what was asked for cannot be",
    503: "the server is still starting",
}


def documented(body: Schema | None = None) -> dict[str, Any]:
    """Arguments for a route's decorator: its body, and what it may answer instead of 200."""
    said: dict[str, Any] = {
        "responses": {status: {"description": sentence} for status, sentence in REFUSALS.items()}
    }
    if body is not None:
        content = {"application/json": {"schema": body}}
        said["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return said
