"""The books of the pool: who fills what, who uses what, who waits for whom, and what gives way. Pure.

    open ─▶ filling ──publish──▶ published ──last reference gone, evicted or dropped──▶ freed
               │
               └─ lease's connection ends ─▶ abandoned: freed, and the next waiter gets a lease on new memory

Every connection holds at most one thing: a lease, a place among those who follow a lease, or a reference. Each method
takes what happened and returns what is to be done about it, in order; `holder_server` does it. An entry that was never
published is never handed to anybody but its filler and those who follow it, and never twice: after an abandoned lease
the old filler may still write to the old memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from ghostserve.weights.eviction import Candidate, choose_victims
from ghostserve.weights.pool_entry import Entry, holdings, infos
from ghostserve.weights.pool_layout import total_bytes
from ghostserve.weights.pool_types import (
    Action,
    Counts,
    EntryInfo,
    Free,
    GiveFollow,
    GiveHit,
    GiveLease,
    Image,
    ImageKind,
    PoolStats,
    Refusal,
    Refuse,
)

PINS_MAX = 1000
LATE_S = 60.0
"""So long after its last use a file image waits for ranks that have not asked for it: they read by themselves, or died."""


class PoolBook:
    """All entries of one holder. Clients and entries are numbers that are never used twice."""

    def __init__(self, *, budget_bytes: int, began_s: float = 0.0) -> None:
        self.budget_bytes, self.began_s = budget_bytes, began_s
        self.counts = {kind: Counts() for kind in ImageKind}
        self.refusals = dict.fromkeys(Refusal, 0)
        self._entries: dict[int, Entry] = {}
        self._by_key: dict[str, int] = {}
        self._of_client: dict[int, int] = {}  # client -> the entry it leases, follows or refers to
        self._pins: set[str] = set()
        self._numbers = itertools.count(1)

    # -- what clients ask for ----------------------------------------------------------------------------------------

    def open(self, client: int, image: Image, *, free_bytes: int | None, now_s: float) -> list[Action]:
        """A client wants an image. `free_bytes`: so much memory may still be promised (None: not known).

        The client holds nothing yet.
        """
        assert client not in self._of_client, client
        number = self._by_key.get(image.key)
        if number is None:
            return self._lease(client, image, waiters=[], free_bytes=free_bytes, now_s=now_s)
        entry = self._entries[number]
        if (entry.image.nbytes, entry.image.kind) != (image.nbytes, image.kind):
            there = f"{entry.image.kind.value} image of {entry.image.nbytes} bytes"
            return [self._refuse(client, Refusal.OTHER, f"its key belongs to a {there}")]
        self._of_client[client] = number
        entry.asked(image.readers)
        if entry.lease is not None:
            entry.waiters.append(client)
            self.counts[image.kind].follows += 1
            return [GiveFollow(client=client, entry=number)]
        entry.references.add(client)
        self._use(entry, now_s)
        self.counts[image.kind].hits += 1
        return [GiveHit(client=client, entry=number)]

    def publish(self, client: int, *, meta_bytes: int, now_s: float) -> list[Action]:
        """The holder of a lease is done, and its memory was found sealed. Its lease becomes a reference."""
        entry = self._leased(client)
        assert entry is not None, f"client {client} has no lease"
        victims = self._room(meta_bytes, free_bytes=None, now_s=now_s)
        if isinstance(victims, Refuse):
            # Its followers would come to the same end: they are refused as well.
            return self._refuse_all(entry, Refusal.IN_USE, victims.reason)
        entry.charged_bytes += meta_bytes
        entry.lease = None
        entry.references = {client, *entry.waiters}
        given = [GiveHit(client=waiter, entry=entry.number) for waiter in (client, *entry.waiters)]
        self.counts[entry.image.kind].published += 1
        self.counts[entry.image.kind].hits += len(entry.waiters)
        for _ in given:
            self._use(entry, now_s)
        entry.waiters = []
        return [*victims, *given, *self._tidy(entry.image.label, now_s)]

    def leave(self, client: int, *, free_bytes: int | None, now_s: float) -> list[Action]:
        """A client gave back what it held, or its connection ended; nothing if it held nothing."""
        number = self._of_client.pop(client, None)
        if number is None:
            return []
        entry = self._entries[number]
        if entry.lease == client:
            return self._abandoned(entry, free_bytes=free_bytes, now_s=now_s)
        if client in entry.waiters:
            entry.waiters.remove(client)
            return []
        entry.references.remove(client)
        entry.used_s = now_s
        if not entry.listed and not entry.references:
            return [self._remove(entry)]
        return [*self._tidy(entry.image.label, now_s), *self._shrink(now_s)]

    def no_memory(self, client: int, reason: str) -> list[Action]:
        """The memory of a lease just granted could not be had."""
        entry = self._leased(client)
        assert entry is not None, f"client {client} has no lease"
        return self._refuse_all(entry, Refusal.MEMORY, reason)

    def tick(self, now_s: float) -> list[Action]:
        """Time has passed: nobody is waited for without an end."""
        labels = {one.image.label for one in self._entries.values() if one.awaited and not one.busy}
        return [action for label in sorted(labels) for action in self._tidy(label, now_s)]

    # -- what people ask for -----------------------------------------------------------------------------------------

    def pin(self, name: str) -> int | None:
        """Keep the entries with this key or label, those to come included. How many there are; None: too many pins."""
        if name not in self._pins and len(self._pins) >= PINS_MAX:
            return None
        self._pins.add(name)
        return sum(1 for _ in self._named(name))

    def unpin(self, name: str, *, now_s: float) -> tuple[bool, list[Action]]:
        """Whether it was pinned."""
        if name not in self._pins:
            return False, []
        self._pins.remove(name)
        labels = {entry.image.label for entry in self._named(name)}
        return True, [
            *(action for label in sorted(labels) for action in self._tidy(label, now_s)),
            *self._shrink(now_s),
        ]

    def drop(self, name: str) -> tuple[int, int, list[Action]]:
        """Forget published entries with this key or label, pinned or not: (how many, of those in use, what to do).

        As with a file that is removed: nobody finds it any more, and its memory goes with its last user.
        """
        found = [entry for entry in self._named(name) if entry.lease is None]
        actions: list[Action] = []
        for entry in found:
            del self._by_key[entry.image.key]
            entry.listed = False
            if not entry.references:
                actions.append(self._remove(entry))
        return len(found), sum(bool(entry.references) for entry in found), actions

    def set_budget(self, budget_bytes: int, *, now_s: float) -> list[Action]:
        """From now on; what is above it and may go goes, the least valuable first."""
        self.budget_bytes = budget_bytes
        return self._shrink(now_s)

    # -- what is so --------------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """What all entries are charged, those that are being filled included."""
        return sum(entry.charged_bytes for entry in self._entries.values())

    @property
    def idle(self) -> bool:
        """Nobody would miss the holder: no lease, no follower, no reference, no pin."""
        return not self._of_client and not self._pins

    @property
    def in_use(self) -> bool:
        """Somebody holds a lease, follows one or has a reference."""
        return bool(self._of_client)

    def holds(self, client: int) -> bool:
        return client in self._of_client

    def lease_of(self, client: int) -> tuple[int, Image] | None:
        """The entry that a client fills."""
        entry = self._leased(client)
        return None if entry is None else (entry.number, entry.image)

    def image(self, entry: int) -> Image:
        return self._entries[entry].image

    def filling(self) -> Iterator[tuple[int, int]]:
        """(entry, charged bytes) of what is being filled."""
        return ((one.number, one.charged_bytes) for one in self._entries.values() if one.lease is not None)

    def entries(self, *, after: int = 0) -> Iterator[EntryInfo]:
        """In the order in which they came; only those after entry `after`."""
        later = (entry for entry in self._entries.values() if entry.number > after)
        return infos(later, pins=self._pins)

    def stats(self) -> PoolStats:
        """The numbers for people and for metrics."""
        entries = list(self._entries.values())
        return PoolStats(
            began_s=self.began_s,
            budget_bytes=self.budget_bytes,
            used_bytes=self.used_bytes,
            referenced_bytes=sum(one.charged_bytes for one in entries if one.busy),
            pinned_bytes=sum(one.charged_bytes for one in entries if one.pinned_by(self._pins)),
            pins=len(self._pins),
            clients=len(self._of_client),
            bytes={k: sum(e.charged_bytes for e in entries if e.image.kind is k) for k in ImageKind},
            entries={k: sum(e.image.kind is k for e in entries) for k in ImageKind},
            counts={kind: counts.copy() for kind, counts in self.counts.items()},
            refusals=dict(self.refusals),
        )

    def check(self) -> None:
        """What always holds; for tests."""
        for number, entry in self._entries.items():
            assert number == entry.number
            assert entry.listed == (self._by_key.get(entry.image.key) == number), entry
        assert holdings(self._entries.values()) == self._of_client
        assert set(self._by_key.values()) <= set(self._entries)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _lease(
        self, client: int, image: Image, *, waiters: list[int], free_bytes: int | None, now_s: float
    ) -> list[Action]:
        """New memory for an image, or a refusal for everybody who wanted it."""
        need_bytes = total_bytes(image.nbytes)
        victims = self._room(need_bytes, free_bytes=free_bytes, now_s=now_s)
        if isinstance(victims, Refuse):
            for one in (client, *waiters):
                self._of_client.pop(one, None)
            return [self._refuse(one, victims.why, victims.reason) for one in (client, *waiters)]
        number = next(self._numbers)
        self._entries[number] = Entry(
            number=number,
            image=image,
            charged_bytes=need_bytes,
            made_s=now_s,
            used_s=now_s,
            lease=client,
            waiters=list(waiters),
        )
        self._entries[number].asked(image.readers)
        self._by_key[image.key] = number
        self._of_client |= dict.fromkeys((client, *waiters), number)
        self.counts[image.kind].misses += 1
        follow = [GiveFollow(client=waiter, entry=number) for waiter in waiters]
        return [*victims, GiveLease(client=client, entry=number), *follow]

    def _room(self, need_bytes: int, *, free_bytes: int | None, now_s: float) -> list[Action] | Refuse:
        """Make room by eviction; or why there is none, and then nothing is evicted."""
        if need_bytes > self.budget_bytes:
            return Refuse(
                why=Refusal.TOO_LARGE,
                reason=f"{need_bytes} bytes are more than the whole pool has ({self.budget_bytes} bytes): "
                "raise --weights-memory",
            )
        over_bytes = self.used_bytes + need_bytes - self.budget_bytes
        short_bytes = 0 if free_bytes is None else need_bytes - free_bytes
        candidates = self._candidates()
        victims = choose_victims(candidates, need_bytes=max(over_bytes, short_bytes), now_s=now_s)
        if victims.choice is not None:
            return self._evict(victims.choice)
        evictable_bytes = sum(one.size_bytes for one in candidates)
        if over_bytes > evictable_bytes:
            return Refuse(
                why=Refusal.IN_USE,
                reason=f"{need_bytes} bytes do not fit: of {self.budget_bytes} bytes {self.used_bytes - evictable_bytes} "
                "are in use or pinned; raise --weights-memory or unpin a model",
            )
        return Refuse(
            why=Refusal.MEMORY,
            reason=f"{need_bytes} bytes would leave this machine or cgroup too little memory: {free_bytes} bytes may "
            f"still be taken, and {evictable_bytes} could be freed",
        )

    def _shrink(self, now_s: float) -> list[Action]:
        """What is above a budget that was lowered goes as soon as it may."""
        candidates = self._candidates()
        over_bytes = min(self.used_bytes - self.budget_bytes, sum(one.size_bytes for one in candidates))
        return self._evict(choose_victims(candidates, need_bytes=over_bytes, now_s=now_s).choice or ())

    def _candidates(self) -> list[Candidate]:
        return [
            Candidate(
                entry=entry.number,
                size_bytes=entry.charged_bytes,
                reload_cost_s=entry.image.reload_cost_s,
                used_s=entry.used_s,
                transient=entry.image.kind is ImageKind.FILE,
            )
            for entry in self._entries.values()
            if not entry.busy and not entry.pinned_by(self._pins)
        ]

    def _evict(self, victims: Iterable[Candidate]) -> list[Action]:
        entries = [self._entries[victim.entry] for victim in victims]
        for entry in entries:
            self.counts[entry.image.kind].evictions += 1
        return [self._remove(entry) for entry in entries]

    def _abandoned(self, entry: Entry, *, free_bytes: int | None, now_s: float) -> list[Action]:
        """The filler is gone: its memory is given up, and the first who follows fills new memory."""
        waiters = entry.waiters
        entry.lease, entry.waiters = None, []
        for waiter in waiters:
            del self._of_client[waiter]
        self.counts[entry.image.kind].abandoned += 1
        free = self._remove(entry, abandoned=True)
        if not waiters:
            return [free, *self._tidy(entry.image.label, now_s)]
        if free_bytes is not None:  # what it had, and what was kept for it, is free again
            free_bytes += entry.charged_bytes
        again = self._lease(waiters[0], entry.image, waiters=waiters[1:], free_bytes=free_bytes, now_s=now_s)
        if (successor := self._leased(waiters[0])) is not None:
            successor.awaited = entry.awaited
        return [free, *again]

    def _refuse_all(self, entry: Entry, why: Refusal, reason: str) -> list[Action]:
        """The filler of an entry and all who follow it are refused, and the entry is gone."""
        clients = [client for client in (entry.lease, *entry.waiters) if client is not None]
        for client in clients:
            del self._of_client[client]
        free = self._remove(entry, abandoned=True)
        return [free, *(self._refuse(client, why, reason) for client in clients)]

    def _tidy(self, label: str, now_s: float) -> list[Action]:
        """File images that nobody needs any more: a rank image of their model is there, none is being made, and no rank is late.

        Who pins a model wants it to start quickly, not to be kept twice: only a pin of its own keeps a file image.
        """
        same = [entry for entry in self._entries.values() if entry.image.label == label]
        ranks = [entry for entry in same if entry.image.kind is ImageKind.RANK and entry.listed]
        if not ranks or any(entry.lease is not None for entry in ranks):
            return []
        files = [entry for entry in same if entry.image.kind is ImageKind.FILE]
        return [
            self._remove(one)
            for one in files
            if not one.busy
            and one.image.key not in self._pins
            and (one.awaited == 0 or now_s - one.used_s >= LATE_S)
        ]

    def _remove(self, entry: Entry, *, abandoned: bool = False) -> Free:
        del self._entries[entry.number]
        if self._by_key.get(entry.image.key) == entry.number:
            del self._by_key[entry.image.key]
        return Free(entry=entry.number, abandoned=abandoned)

    def _use(self, entry: Entry, now_s: float) -> None:
        entry.uses += 1
        entry.used_s = now_s

    def _refuse(self, client: int, why: Refusal, reason: str) -> Refuse:
        self.refusals[why] += 1
        return Refuse(client=client, why=why, reason=reason)

    def _leased(self, client: int) -> Entry | None:
        number = self._of_client.get(client)
        entry = None if number is None else self._entries[number]
        return entry if entry is not None and entry.lease == client else None

    def _named(self, name: str) -> Iterator[Entry]:
        return (e for e in self._entries.values() if e.listed and name in (e.image.key, e.image.label))
