"""Silent corruption: which block is compared with its checksums next, and what a difference means. Pure: no bytes of the
arena, no time of its own, no process.

    part      where it lies                 compared by    made right again from
    KV        the ranks' own memory         each rank      its mirror, or the other ranks and the parity
    MIRROR    frames, one per rank          the keeper     the rank's live KV
    PARITY    frames, one per shard         the keeper     live KV: mirrored anew, then coded anew

Every mirror, parity and rank's block has a checksum of its own, so what is wrong is known to be wrong by itself: an
erasure at a known place, of which m parities make good m. Nothing is believed that has no proof: live KV is put right
only by bytes that have the recorded checksum, and a frame only by live KV that has it.

A check is of one generation of a block; what was learnt about another says nothing about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from ghostserve.shadow.manifest import BlockState, Entry, Manifest, Source
from ghostserve.types import Decision

ROUND_S_MIN = 1.0  # a small shadow is not read over and over
PATIENCE_S = 1.0  # a wrong frame waits so long for idle time, in which it can be made right with proof


class Part(Enum):
    """What of a block is compared."""

    KV = "kv"  # what the ranks compute with
    MIRROR = "mirror"
    PARITY = "parity"


class Remedy(Enum):
    """What is done about a part that differs from its checksum."""

    FORGET = "forget"  # nothing: it is of a block that was given up or reused meanwhile
    WAIT = "wait"  # nothing yet: live KV can be asked only in idle time
    FROM_MIRROR = "from its mirror"  # live KV is overwritten
    FROM_PARITY = "from the other ranks and parity"  # live KV is overwritten
    FROM_KV = "from live KV"  # a mirror is overwritten
    PROTECT_ANEW = "mirrored anew from live KV"  # and then coded like any other
    GIVE_UP = "given up"  # unprotected until a later step catches up on it; its KV is not in doubt
    REFUSE = "refused"  # its KV must not be used any more: whoever uses it recomputes


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One part of one block as it is to be found, by whoever has the bytes.

    `checksums`: crc32 over the first `nbytes` of the packed log of each rank, or of each parity. `frames`: where those
    logs lie in the arena, as many; none for live KV, of which it is the first `slots` slots.
    """

    part: Part
    block: int
    group: int
    generation: int
    slots: int
    nbytes: int
    checksums: tuple[int, ...]
    frames: tuple[int, ...] = ()

    @property
    def total_bytes(self) -> int:
        return self.nbytes * len(self.checksums)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A difference, and what became of it. For the log and the status."""

    part: str
    block: int
    index: int  # of the rank, or of the parity shard
    layers: tuple[str, ...]  # where known: only a comparison with the right bytes tells
    slots: tuple[int, ...]
    remedy: str
    repaired: bool
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        whose = "parity" if self.part == Part.PARITY.value else "rank"
        layers = f"layer {', '.join(self.layers)}" if self.layers else "layer unknown"
        slots = f", slots {_ranges(self.slots)}" if self.slots else ""
        outcome = "repaired" if self.repaired else "NOT repaired"
        why = f": {self.reason}" if self.reason else ""
        return (
            f"{self.part} of block {self.block}, {whose} {self.index}, differs from its checksum "
            f"({layers}{slots}): {outcome} ({self.remedy}){why}"
        )


@dataclass(slots=True, kw_only=True)
class Round:
    """Every protected block, one after the other, over and over: its live KV, or its frames."""

    of_kv: bool
    rounds: int = 0  # gone through
    _blocks: list[int] = field(default_factory=list)  # of the round that is under way
    _next: int = 0
    _began_s: float = float("-inf")

    @property
    def progress(self) -> tuple[int, int]:
        """Blocks of this round that were looked at, and all of them."""
        return self._next, len(self._blocks)

    def next_checks(
        self, manifest: Manifest, *, bytes_max: int, now_s: float, idle: bool, frames_max: int | None = None
    ) -> list[Check]:
        """Checks of `bytes_max` bytes together, or of one block that has more; none between two rounds.

        `frames_max` bounds their frames as well.

        Called under the manifest's lock. Not `idle`: tails are left out, for nothing could be done about them.
        """
        if self._next == len(self._blocks):
            if now_s < self._began_s + ROUND_S_MIN:
                return []
            self.rounds += bool(self._blocks)
            self._blocks, self._next, self._began_s = list(manifest.entries), 0, now_s
        checks: list[Check] = []
        spent = frames = 0
        while self._next < len(self._blocks):
            entry = manifest.entries.get(self._blocks[self._next])
            check = None if entry is None else self._check_of(manifest, entry, idle=idle)
            if check is not None:
                spent, frames = spent + check.total_bytes, frames + len(check.frames)
                if checks and (spent > bytes_max or (frames_max is not None and frames > frames_max)):
                    break
                checks.append(check)
            self._next += 1
        return checks

    def _check_of(self, manifest: Manifest, entry: Entry, *, idle: bool) -> Check | None:
        if self.of_kv:
            return kv_check(manifest, entry)
        if entry.state is BlockState.MIRRORED and not idle:
            return None
        return frames_check(manifest, entry)


def kv_check(manifest: Manifest, entry: Entry) -> Check | None:
    """Of the live KV of a block; None while a step may be writing to it, or before one did."""
    if entry.open_pieces or not entry.slots:
        return None
    return _check(manifest, entry, Part.KV, entry.checksums, ())


def frames_check(manifest: Manifest, entry: Entry) -> Check | None:
    """Of the mirrors of a block as far as they were committed, or of its parity."""
    if not entry.slots:
        return None
    if entry.state is BlockState.CODED:
        return _check(manifest, entry, Part.PARITY, entry.parity_checksums, entry.parity)
    return _check(manifest, entry, Part.MIRROR, entry.checksums, entry.mirrors)


def _check(
    manifest: Manifest, entry: Entry, part: Part, checksums: tuple[int, ...], frames: tuple[int, ...]
) -> Check:
    return Check(
        part=part,
        block=entry.block,
        group=entry.group,
        generation=entry.generation,
        slots=entry.slots,
        nbytes=entry.slots * manifest.slot_bytes[entry.group],
        checksums=checksums,
        frames=frames,
    )


# -- what a difference means -----------------------------------------------------------------------------------------------


def subject_of(manifest: Manifest, check: Check) -> Entry | None:
    """The entry that a check was made for, if it still is about what it was."""
    entry = manifest.entries.get(check.block)
    if entry is None or entry.generation != check.generation:
        return None
    frames = {Part.KV: (), Part.MIRROR: entry.mirrors, Part.PARITY: entry.parity}[check.part]
    checksums = entry.parity_checksums if check.part is Part.PARITY else entry.checksums
    same = frames == check.frames and (check.part is Part.MIRROR or checksums == check.checksums)
    return entry if same else None


def remedy_for_kv(manifest: Manifest, check: Check, *, wrong: frozenset[int]) -> Decision[Remedy]:
    """The live KV of the ranks `wrong` differs: as if these ranks had lost just this block."""
    assert wrong
    if subject_of(manifest, check) is None:
        return _gone(check)
    source = manifest.source(check.block, needed=check.slots, lost=wrong)
    remedies = {Source.MIRROR: Remedy.FROM_MIRROR, Source.PARITY: Remedy.FROM_PARITY}
    return Decision(choice=remedies.get(source.choice, Remedy.REFUSE), reason=source.reason)


def remedy_for_frames(
    manifest: Manifest, check: Check, *, idle: bool, known_for_s: float
) -> Decision[Remedy]:
    """Frames of a check differ, and it has been known for so long."""
    entry = subject_of(manifest, check)
    if entry is None:
        return _gone(check)
    if entry.job is not None:
        return Decision(choice=Remedy.WAIT, reason="the keeper is at it and will refuse it")
    if idle and check.part is Part.MIRROR:
        return Decision(choice=Remedy.FROM_KV, reason="idle")
    if idle:
        return Decision(choice=Remedy.PROTECT_ANEW, reason="idle")
    if entry.state is BlockState.MIRRORED or known_for_s < PATIENCE_S:
        return Decision(choice=Remedy.WAIT, reason="steps are running")
    return Decision(choice=Remedy.GIVE_UP, reason=f"no idle time within {PATIENCE_S:g} s; a step catches up")


def _gone(check: Check) -> Decision[Remedy]:
    return Decision(
        choice=Remedy.FORGET,
        reason=f"block {check.block} of generation {check.generation} was given up or changed meanwhile",
    )


# -- how fast --------------------------------------------------------------------------------------------------------------


def pause_s(spent_bytes: int, *, rate_bytes_s: int, shortest_s: float, nothing_due_s: float) -> float:
    """How long to wait after so many bytes, so that the rate holds; `nothing_due_s` after none."""
    if not spent_bytes:
        return nothing_due_s
    return max(shortest_s, spent_bytes / rate_bytes_s)


@dataclass(slots=True, kw_only=True)
class Bursts:
    """When live KV may be compared: for `burst_s` out of every `period_s`, the first at once.

    Every question keeps vLLM's ranks spinning on their message ring for some seconds afterwards, so that asking slowly
    and steadily would keep an idle machine busy for ever.
    """

    burst_s: float = 2.0
    period_s: float = 60.0
    _until_s: float = float("-inf")
    _next_s: float = float("-inf")

    def allowed(self, now_s: float) -> bool:
        """Asked only when the ranks have nothing else to do."""
        if now_s >= self._next_s:
            self._until_s, self._next_s = now_s + self.burst_s, now_s + self.period_s
        return now_s < self._until_s

    def start_over(self) -> None:
        """The next one may begin at once."""
        self._until_s = self._next_s = float("-inf")


# -- where exactly ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where two packed logs of one block differ."""

    layers: tuple[str, ...]
    slots: tuple[int, ...]
    words: int


def difference(
    one: npt.NDArray[np.uint8],
    other: npt.NDArray[np.uint8],
    *,
    word_bytes: int,
    layers: Sequence[tuple[str, int]],
) -> Place:
    """Layers and slots whose words differ. `layers`: names and words per slot, in the order of a slot's words."""
    words_per_slot = sum(words for _, words in layers)
    differs = (one != other).reshape(-1, words_per_slot, word_bytes).any(axis=2)
    ends = np.cumsum([words for _, words in layers])
    hit = np.unique(np.searchsorted(ends, np.flatnonzero(differs.any(axis=0)), side="right"))
    return Place(
        layers=tuple(layers[index][0] for index in hit.tolist()),
        slots=tuple(np.flatnonzero(differs.any(axis=1)).tolist()),
        words=int(np.count_nonzero(differs)),
    )


def _ranges(numbers: Sequence[int]) -> str:
    """`3`, `0-31`, `0-3, 7`: ascending numbers for people."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
