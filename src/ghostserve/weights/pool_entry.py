"""One entry of the pool's books, and how it looks from outside. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from ghostserve.weights.pool_types import EntryInfo, EntryState, Image


@dataclass(slots=True, kw_only=True)
class Entry:
    """`listed` and `lease` say what it is; clients are numbers of connections."""

    number: int
    image: Image
    charged_bytes: int
    made_s: float
    lease: int | None  # the client that fills it; None once published
    listed: bool = True  # found by its key; False: dropped while in use
    waiters: list[int] = field(default_factory=list)  # who follows, in the order in which they came
    references: set[int] = field(default_factory=set)
    uses: int = 0
    used_s: float = 0.0
    awaited: int = 0  # who wants it for the same load as somebody who has asked, and has not asked yet

    def asked(self, readers: int) -> None:
        """One of so many processes that want it for one load."""
        if readers > 1:
            self.awaited = (self.awaited or readers) - 1

    @property
    def state(self) -> EntryState:
        if self.lease is not None:
            return EntryState.FILLING
        return EntryState.PUBLISHED if self.listed else EntryState.DROPPED

    def pinned_by(self, pins: Collection[str]) -> bool:
        return self.image.key in pins or self.image.label in pins

    @property
    def busy(self) -> bool:
        """Being filled, or used by somebody."""
        return self.lease is not None or bool(self.references)


def infos(entries: Iterable[Entry], *, pins: Collection[str]) -> Iterator[EntryInfo]:
    """For `ghostserve models ls`."""
    for entry in entries:
        yield EntryInfo(
            number=entry.number,
            key=entry.image.key,
            kind=entry.image.kind,
            label=entry.image.label,
            nbytes=entry.image.nbytes,
            charged_bytes=entry.charged_bytes,
            state=entry.state,
            references=len(entry.references) + (entry.lease is not None) + len(entry.waiters),
            pinned=entry.pinned_by(pins),
            uses=entry.uses,
            made_s=entry.made_s,
            used_s=entry.used_s,
        )


def holdings(entries: Iterable[Entry]) -> dict[int, int]:
    """The entry of each client, told from the entries; asserts what always holds of each."""
    held: dict[int, int] = {}
    for entry in entries:
        if entry.lease is not None:
            assert not entry.references, entry
            assert entry.listed, entry
        else:
            assert not entry.waiters, entry
            assert entry.listed or entry.references, entry
        clients = [*entry.waiters, *entry.references, *([] if entry.lease is None else [entry.lease])]
        assert len(clients) == len(set(clients)), entry
        assert not held.keys() & set(clients), entry
        held |= dict.fromkeys(clients, entry.number)
    return held
