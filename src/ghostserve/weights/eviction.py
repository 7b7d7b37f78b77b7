"""Which entries of the pool give way. Pure: sizes, reload costs and use in, victims and the reason out.

GreedyDual-Size with frequencies (Cao and Irani 1997, Cherkasova 1998). At each use an entry is worth

    value = age + uses * reload cost / size

that is, what a byte of it saves, plus the pool's age at that time. The least valuable goes first, and the age rises to
its value: what was worth much and is not used any more is overtaken by what is used now. With equal costs per byte and
one use each this is LRU. File images go before all others: once their rank images exist nobody needs them, and the
page cache may still hold them. How it compares with LRU, LFU and what a clairvoyant could do: `bench/eviction.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ghostserve.types import Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An entry that may go: published, and neither referenced nor pinned."""

    entry: int
    size_bytes: int
    value: float  # as `value_of_use` gave it at its last use
    transient: bool  # a file image


def value_of_use(*, age: float, uses: int, reload_cost_s: float, size_bytes: int) -> float:
    """What an entry is worth from now on, having been used `uses` times, now included."""
    return age + uses * reload_cost_s / max(size_bytes, 1)


def choose_victims(
    candidates: Iterable[Candidate], *, need_bytes: int
) -> Decision[tuple[Candidate, ...] | None]:
    """Entries of `need_bytes` together, the least valuable first; None, and nothing goes, if all are not enough.

    What turns out not to be needed, since a larger one goes as well, stays: the most valuable of them first.
    """
    if need_bytes <= 0:
        return Decision(choice=(), reason="there is room")
    chosen, freed_bytes = [], 0
    for candidate in sorted(candidates, key=lambda one: (not one.transient, one.value, one.entry)):
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
    return Decision(choice=tuple(chosen), reason="the least valuable per byte")


def age_after(age: float, victims: Iterable[Candidate]) -> float:
    """The pool's age once these have gone. File images do not count: they went for what they are, not for their value."""
    return max((victim.value for victim in victims if not victim.transient), default=age)
