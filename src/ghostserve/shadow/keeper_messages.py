"""What crosses between the engine core and the keeper, one JSON object per packet.

    engine ── Geometry, EncodeJob, ScrubJob, WipeJob ──▶ keeper          once connected, Geometry first
    engine ◀── EncodeDone, ScrubDone, WipeDone, KeeperError ──           jobs are answered in the order they came

Jobs may be sent again: doing one twice has the effect of doing it once, as long as it is not answered. What
opens a connection (hello, role) is the arena's: `arena.handoff`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

from ghostserve.errors import ProtocolError

MESSAGE_MAX_BYTES = 64 << 10  # well below the kernel's default socket buffer, which bounds a packet
WIPE_FRAMES_MAX = 4096  # of one WipeJob, so that it fits a packet


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How the pool is cut, told once the workers know it; sent again to a restarted keeper.

    `element`: what the KV in a mirror consists of, as in `nonfinite.ELEMENTS`; another name if it is not to be looked at.
    """

    frame_bytes: int
    frames: int
    ranks: int
    parity_shards: int
    element: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeJob:
    """Turn the first `nbytes` of the frames `mirrors` (one per rank) into those of the frames `parity`.

    `checksums` are the crc32 expected of each mirror. Neither kind of frame is touched by others until the
    answer, except to be read.
    """

    job: int
    block: int
    generation: int
    mirrors: tuple[int, ...]
    parity: tuple[int, ...]
    nbytes: int
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubJob:
    """Compare the first `nbytes[i]` bytes of frame `frames[i]` with their crc32 `checksums[i]`; nothing is written.

    Frames may be given up meanwhile: they are wiped by a later job, so what is read here is what was asked for.
    """

    job: int
    frames: tuple[int, ...]
    nbytes: tuple[int, ...]
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WipeJob:
    """Make frames read as zeros; at most WIPE_FRAMES_MAX.

    `give_back`: their memory goes back to the system. Otherwise it is overwritten in place and stays mapped,
    which is an order of magnitude cheaper for whoever writes the frame next.
    """

    job: int
    frames: tuple[int, ...]
    give_back: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeDone:
    """The answer to an EncodeJob. If not `ok`, the parity frames hold nothing of worth.

    `bad_ranks` are those whose mirror failed its checksum; empty if it was something else (`reason`).
    """

    job: int
    ok: bool
    bad_ranks: tuple[int, ...] = ()
    parity_checksums: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubDone:
    """The answer to a ScrubJob: the places in its `frames` of those that differ. If not `ok`, nothing is known."""

    job: int
    ok: bool = True
    wrong: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WipeDone:
    """The answer to a WipeJob. If not `ok`, the frames may still hold bytes and must not be used again."""

    job: int
    ok: bool = True
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperError:
    """The keeper understood a message not at all, or could not use it; `job` if it named one."""

    job: int | None
    reason: str


Job: TypeAlias = EncodeJob | ScrubJob | WipeJob
Answer: TypeAlias = EncodeDone | ScrubDone | WipeDone
Message: TypeAlias = (
    Geometry | EncodeJob | ScrubJob | WipeJob | EncodeDone | ScrubDone | WipeDone | KeeperError
)

_KINDS: dict[str, type[Message]] = {
    "geometry": Geometry,
    "encode": EncodeJob,
    "scrub": ScrubJob,
    "wipe": WipeJob,
    "encode-done": EncodeDone,
    "scrub-done": ScrubDone,
    "wipe-done": WipeDone,
    "error": KeeperError,
}
_NAMES = {cls: kind for kind, cls in _KINDS.items()}


def to_json(message: Message) -> bytes:
    """One packet. ProtocolError if it is longer than MESSAGE_MAX_BYTES."""
    data = json.dumps({"kind": _NAMES[type(message)], **asdict(message)}, separators=(",", ":")).encode()
    if len(data) > MESSAGE_MAX_BYTES:
        raise ProtocolError(f"a message of {len(data)} bytes; {MESSAGE_MAX_BYTES} at most")
    return data


def from_json(data: bytes) -> Message:
    """The message in a packet. ProtocolError names what is wrong with it."""
    doc = _parse(data)
    cls = _KINDS.get(str(doc.pop("kind", None)))
    if cls is None:
        raise ProtocolError(f"no message of ours: {data[:80]!r}")
    types = {field.name: str(field.type) for field in fields(cls)}
    if doc.keys() != types.keys():
        raise ProtocolError(f"{cls.__name__} with fields {sorted(doc)}; {sorted(types)} expected")
    return cls(
        **{name: _convert(value, types[name], f"{cls.__name__}.{name}") for name, value in doc.items()}
    )


def job_of(data: bytes) -> int | None:
    """The job number in a packet that `from_json` refused, so that the refusal can name it."""
    try:
        job = _parse(data).get("job")
    except ProtocolError:
        return None
    return job if _is_count(job) else None


def _parse(data: bytes) -> dict[str, Any]:
    try:
        doc = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from None
    if not isinstance(doc, dict):
        raise ProtocolError(f"a JSON object expected: {data[:80]!r}")
    return doc


def _convert(value: Any, type_name: str, what: str) -> Any:
    """`value` as JSON carries it, turned into the field's type; numbers are never negative here."""
    match type_name:
        case "int" if _is_count(value):
            return value
        case "int | None" if value is None or _is_count(value):
            return value
        case "bool" if isinstance(value, bool):
            return value
        case "str" if isinstance(value, str):
            return value
        case "tuple[int, ...]" if isinstance(value, list) and all(map(_is_count, value)):
            return tuple(value)
    raise ProtocolError(f"{what} is {value!r:.80}; {type_name} expected")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
