"""The nouns of the pool: what is asked of its books, what they answer, and what can be seen of them. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class ImageKind(Enum):
    """What an entry holds; also the label of its metrics."""

    FILE = (
        "file"  # the bytes of one .safetensors file, at the same offsets; needed until the rank images exist
    )
    RANK = "rank"  # the parameters of one rank as they are after loading


class EntryState(Enum):
    """What others may do with an entry."""

    FILLING = "filling"  # somebody has the lease; others may follow what is ready
    PUBLISHED = "published"  # sealed and whole: handed to whoever asks
    DROPPED = "dropped"  # not found any more; goes with its last reference


class Refusal(Enum):
    """Why a client gets no memory; also the label of a metric."""

    TOO_LARGE = "too_large"  # more than the whole budget
    IN_USE = "in_use"  # what there is is referenced or pinned
    MEMORY = "memory"  # the machine or cgroup has not enough left
    OTHER = "other"  # the request itself, or memory that was not sealed as it must be


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What a client wants. `key` says what the bytes are: whoever gives the same key wants the same bytes."""

    key: str
    nbytes: int
    kind: ImageKind
    label: str  # the model, for people, and for pinning and dropping all of its entries
    reload_cost_s: float  # what it would take to have it again
    readers: int = (
        1  # so many processes want it for one load: the ranks of a server, of which one may be late
    )


# -- what is to be done ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveLease:
    """Make memory for the entry; the client fills it."""

    client: int
    entry: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveFollow:
    """The client may read along while somebody fills the entry."""

    client: int
    entry: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveHit:
    """The client refers to the published entry from now on."""

    client: int
    entry: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """The client gets nothing, and holds nothing. Client 0 is nobody yet."""

    why: Refusal
    reason: str
    client: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Free:
    """Close the entry's memory. `abandoned`: first tell those who watch it that nothing more comes."""

    entry: int
    abandoned: bool = False


Action = GiveLease | GiveFollow | GiveHit | Refuse | Free


# -- what can be seen --------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Counts:
    """How often, since the holder started, of one kind of image."""

    hits: int = 0  # handed out published, those included who followed until then
    misses: int = 0  # leases
    follows: int = 0  # came while somebody else filled it
    published: int = 0
    abandoned: int = 0  # leases whose holder went away
    evictions: int = 0

    def copy(self) -> Counts:
        return dataclasses.replace(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryInfo:
    """One entry, for `ghostserve models ls`."""

    number: int
    key: str
    kind: ImageKind
    label: str
    nbytes: int
    charged_bytes: int
    state: EntryState
    references: int  # connections: filler, followers, users
    pinned: bool
    uses: int
    made_s: float  # monotonic, of this machine
    used_s: float  # when its last user came or went


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """The pool in numbers."""

    budget_bytes: int
    used_bytes: int  # what entries are charged, those being filled included
    referenced_bytes: int
    pinned_bytes: int
    pins: int
    clients: int  # connections that hold something
    bytes: Mapping[ImageKind, int]
    entries: Mapping[ImageKind, int]
    counts: Mapping[ImageKind, Counts]
    refusals: Mapping[Refusal, int]
    began_s: float = 0.0  # when the holder started (monotonic, of this machine): another one counts anew
