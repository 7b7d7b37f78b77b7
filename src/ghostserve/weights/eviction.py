"""Which entries of the pool give way. Pure: sizes, reload costs and last uses in, victims and the reason out.

What an entry is worth is what a byte of it would save, per second, if it were used again after as long as it has been idle:

    worth = reload cost / (size * time since its last use)

The least worth goes first. Where each byte costs the same to have again, this is LRU; what comes from further away stays longer.
It needs no counts and no state that would have to age. `bench/eviction.py` compares it with LRU, LFU, GreedyDual-Size and what
a clairvoyant could do.

File images go before all others: once their rank images exist nobody needs them, and the page cache may still hold them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ghostserve.types import Decision

_IDLE_S_MIN = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An entry that may go: published, and neither referenced nor pinned."""

    entry: int
    size_bytes: int
    reload_cost_s: float
    used_s: float  # when its last user came or went
    transient: bool  # a file image


def worth(candidate: Candidate, *, now_s: float) -> float:
    """What keeping a byte of it saves, in seconds per second."""
    idle_s = max(now_s - candidate.used_s, _IDLE_S_MIN)
    return candidate.reload_cost_s / (max(candidate.size_bytes, 1) * idle_s)


def choose_victims(
    candidates: Iterable[Candidate], *, need_bytes: int, now_s: float
) -> Decision[tuple[Candidate, ...] | None]:
    """Entries of `need_bytes` together, the least worth first; None, and nothing goes, if all are not enough.

    What turns out not to be needed, since a larger one goes as well, stays: what is worth most first.
    """
    if need_bytes <= 0:
        return Decision(choice=(), reason="there is room")
    order = sorted(
        candidates, key=lambda one: (not one.transient, worth(one, now_s=now_s), one.used_s, one.entry)
    )
    chosen: list[Candidate] = []
    freed_bytes = 0
    for candidate in order:
        if freed_bytes >= need_bytes:
            break
        chosen.append(candidate)
        freed_bytes += candidate.size_bytes
    if freed_bytes < need_bytes:
        return Decision(choice=None, reason=f"{need_bytes} bytes are needed, {freed_bytes} could be freed")
    for candidate in reversed(chosen[:]):
        if freed_bytes - candidate.size_bytes >= need_bytes:
            chosen.remove(candidate)
            freed_bytes -= candidate.size_bytes
    return Decision(choice=tuple(chosen), reason="what saves least per byte and second")
