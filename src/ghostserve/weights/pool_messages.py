"""What goes over a connection to the holder: one JSON object per packet, some with one descriptor. Pure.

    client ── hello ──▶ holder ── welcome ──▶ client          (refused: another version; the client then has no holder)
    client ── open ──▶ holder ── lease + fd | follow + fd | hit + fd | refused ──▶ client
    a lease:   client ── publish ──▶ holder ── hit + fd | refused ──▶ client
    a follow:  holder ── hit + fd | lease + fd | follow + fd | refused ──▶ client      (when the filler is done, or gone)
    client ── status | list | pin | unpin | drop ──▶ holder ── numbers | entries | done ──▶ client

A connection carries one open at a time; what it gave ends with the connection. Every field is checked on arrival.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from ghostserve.errors import ProtocolError
from ghostserve.weights.pool_layout import META_BYTES_MAX
from ghostserve.weights.pool_types import (
    Counts,
    EntryInfo,
    EntryState,
    Image,
    ImageKind,
    PoolStats,
    Refusal,
)

VERSION = 2
REQUEST_BYTES_MAX = 8192
ANSWER_BYTES_MAX = 65536
_PAGE_BYTES = 32768  # of a list; with one entry more it is still an answer
NAME_CHARACTERS_MAX = 256
NBYTES_MAX = 1 << 50
READERS_MAX = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Always first. A budget that is given holds from now on, for everybody."""

    version: int = VERSION
    budget_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """See `pool_types.Image`."""

    key: str
    nbytes: int
    kind: str
    label: str
    reload_cost_s: float
    readers: int = 1

    @property
    def image(self) -> Image:
        return Image(
            key=self.key,
            nbytes=self.nbytes,
            kind=ImageKind(self.kind),
            label=self.label,
            reload_cost_s=self.reload_cost_s,
            readers=self.readers,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """The memory of the lease is whole and sealed, with so much meta at its end."""

    meta_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """For people and metrics; `after` goes with list, `name` (a key or label) with pin, unpin and drop."""

    what: str  # status, list, pin, unpin, drop
    name: str = ""
    after: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    version: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Memory, its descriptor with it: `how` is lease, follow or hit."""

    how: str
    nbytes: int
    meta_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Nothing, and why."""

    why: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Of pin, unpin and drop: how many entries it concerned, and how many of them are in use."""

    entries: int
    in_use: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    status: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    entries: list[Any]
    more: bool


Request = Hello | Open | Publish | Ask
Answer = Welcome | Given | Refused | Done | Numbers | Entries
_REQUESTS: dict[str, type[Request]] = {"hello": Hello, "open": Open, "publish": Publish, "ask": Ask}
_ANSWERS: dict[str, type[Answer]] = {
    "welcome": Welcome,
    "given": Given,
    "refused": Refused,
    "done": Done,
    "numbers": Numbers,
    "entries": Entries,
}
_NAMES = {kind: name for name, kind in (*_REQUESTS.items(), *_ANSWERS.items())}
_ASKS = ("status", "list", "pin", "unpin", "drop")
_GIVEN = ("lease", "follow", "hit")
M = TypeVar("M")


def to_json(message: Request | Answer) -> bytes:
    fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    return json.dumps({"is": _NAMES[type(message)], **fields}, separators=(",", ":")).encode()


def request_from_json(data: bytes) -> Request:
    """ProtocolError, naming what is wrong, unless it is a request with fields as they must be."""
    message = _from_json(data, _REQUESTS)
    if isinstance(message, Open):
        _check(0 < len(message.key) <= NAME_CHARACTERS_MAX, "key", message.key)
        _check(len(message.label) <= NAME_CHARACTERS_MAX, "label", message.label)
        _check(0 < message.nbytes <= NBYTES_MAX, "nbytes", message.nbytes)
        _check(message.kind in {kind.value for kind in ImageKind}, "kind", message.kind)
        _check(0 <= message.reload_cost_s < math.inf, "reload_cost_s", message.reload_cost_s)
        _check(0 < message.readers <= READERS_MAX, "readers", message.readers)
    elif isinstance(message, Publish):
        _check(0 <= message.meta_bytes <= META_BYTES_MAX, "meta_bytes", message.meta_bytes)
    elif isinstance(message, Ask):
        _check(message.what in _ASKS, "what", message.what)
        _check(len(message.name) <= NAME_CHARACTERS_MAX, "name", message.name)
        _check(bool(message.name) or message.what in _ASKS[:2], "name", message.name)
    elif message.budget_bytes is not None:
        _check(0 <= message.budget_bytes <= NBYTES_MAX, "budget_bytes", message.budget_bytes)
    return message


def answer_from_json(data: bytes) -> Answer:
    """ProtocolError unless it is an answer."""
    message = _from_json(data, _ANSWERS)
    if isinstance(message, Given):
        _check(message.how in _GIVEN, "how", message.how)
        _check(0 < message.nbytes <= NBYTES_MAX, "nbytes", message.nbytes)
        _check(0 <= message.meta_bytes <= META_BYTES_MAX, "meta_bytes", message.meta_bytes)
    elif isinstance(message, Refused):
        _check(message.why in {why.value for why in Refusal}, "why", message.why)
    return message


_TYPES: dict[Any, tuple[type, ...]] = {  # by annotation; bool is an int to Python, and not to us
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "dict[str, Any]": (dict,),
    "list[Any]": (list,),
}


def _from_json(data: bytes, kinds: Mapping[str, type[M]]) -> M:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"no message: {data[:80]!r} ({error})") from None
    if not isinstance(document, dict) or not isinstance(document.get("is"), str):
        raise ProtocolError(f"no message: {data[:80]!r}")
    kind = kinds.get(document.pop("is"))
    if kind is None:
        raise ProtocolError(f"not to be said here: {data[:80]!r}")
    fields = {field.name: _TYPES[field.type] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    _check(set(document) == set(fields), "fields", sorted(document))
    for name, types in fields.items():
        value = document[name]
        _check(isinstance(value, types) and (bool in types or not isinstance(value, bool)), name, value)
    return kind(**document)


def _check(holds: bool, name: str, value: object) -> None:
    if not holds:
        raise ProtocolError(f"{name} {str(value)[:80]!r} is not allowed")


# -- what people see ---------------------------------------------------------------------------------------------------


def page_of(entries: Iterable[EntryInfo]) -> Entries:
    """As many as fit into one answer."""
    page: list[dict[str, Any]] = []
    length = 0
    for entry in entries:
        if length > _PAGE_BYTES:
            return Entries(entries=page, more=True)
        fields = _plain(dataclasses.asdict(entry))
        length += len(json.dumps(fields))
        page.append(fields)
    return Entries(entries=page, more=False)


def entries_of(page: Entries) -> list[EntryInfo]:
    """ProtocolError if they are none."""
    try:
        return [
            EntryInfo(**(one | {"kind": ImageKind(one["kind"]), "state": EntryState(one["state"])}))
            for one in page.entries
        ]
    except (TypeError, ValueError, KeyError) as error:
        raise ProtocolError(f"no entries: {error}") from None


def numbers_of(stats: PoolStats) -> Numbers:
    return Numbers(status=_plain(dataclasses.asdict(stats)))


def stats_of(numbers: Numbers) -> PoolStats:
    """ProtocolError if they are none."""
    try:
        status = dict(numbers.status)
        return PoolStats(
            bytes={ImageKind(kind): int(value) for kind, value in status.pop("bytes").items()},
            entries={ImageKind(kind): int(value) for kind, value in status.pop("entries").items()},
            counts={ImageKind(kind): Counts(**value) for kind, value in status.pop("counts").items()},
            refusals={Refusal(why): int(value) for why, value in status.pop("refusals").items()},
            **status,
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ProtocolError(f"no numbers: {error}") from None


def _plain(value: Any) -> Any:
    """Enums as their values, keys included."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {_plain(name): _plain(one) for name, one in value.items()}
    return value
