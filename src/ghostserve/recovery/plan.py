"""Which lost KV is rebuilt and which is computed again, request by request; pure.

A rank rebuilds or computes, one after the other, so the time to full service is the sum of both; it is least when every
request takes the way that is shorter for it. What requests share is rebuilt as long as one of them needs it.

By default only what serves nobody is left out: what lies behind a lost block and is not shared. To compute a context
again may give other bits, and with them other tokens, where kernels depend on the batch; so it is done by choice only
when asked (`--recovery-plan fastest`). After GhostServe (MLSys 2026), hybrid recovery.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ghostserve.shadow.step_plan import NULL_BLOCK


class Costs(Protocol):
    """Seconds, as measured on this server."""

    def rebuild_s(self, blocks: int) -> float:
        """To restore so many blocks on every lost rank."""
        ...

    def compute_s(self, tokens: int, context: int) -> float:
        """To compute so many tokens that follow a context of so many."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """KV of one running request: `tokens` of it, in blocks by KV group, each in the order of its tokens."""

    request: str
    tokens: int
    tables: Sequence[Sequence[int]]
    block_sizes: tuple[int, ...]

    @property
    def blocks(self) -> set[int]:
        """Those that hold any of it."""
        return {block for block, _ in self.placed()}

    def placed(self) -> Iterator[tuple[int, int]]:
        """(block, position of its first token)."""
        for size, table in zip(self.block_sizes, self.tables, strict=True):
            for index, block in enumerate(table[: math.ceil(self.tokens / size)]):
                if block != NULL_BLOCK:
                    yield block, index * size

    def first_of(self, blocks: Collection[int]) -> int:
        """The first token that lies in one of these blocks; `tokens` if none does."""
        return min((at for block, at in self.placed() if block in blocks), default=self.tokens)


def needed_by_others(contexts: Iterable[Context], used: Mapping[str, set[int]]) -> set[int]:
    """Of the blocks that each request uses, those that are not in its context: a step in flight still names them."""
    own = {context.request: context.blocks for context in contexts}
    return set[int]().union(*(blocks - own.get(name, set()) for name, blocks in used.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """`rebuilt`: blocks, in the order given. `left`: block -> why it is not rebuilt though it could be.

    `by_choice`: request -> why it computes its context again though it need not.
    """

    rebuilt: tuple[int, ...]
    left: Mapping[int, str]
    by_choice: Mapping[str, str]


def plan(
    contexts: Sequence[Context],
    restorable: Sequence[int],
    lost: Collection[int],
    *,
    others: Collection[int] = (),
    prefix_cache: bool = True,
    costs: Costs | None = None,
) -> RecoveryPlan:
    """What becomes of the `restorable` blocks, when those in `lost` are lost for good.

    `others`: blocks that somebody else needs. `prefix_cache`: who computes again finds what it still holds.
    `costs`: given, requests compute again by choice where that is faster.
    """
    wanted = Counter(block for context in contexts for block in context.blocks)
    wanted.update(others)
    left: dict[int, str] = {}
    by_choice: dict[str, str] = {}

    def leave(blocks: Iterable[int], reason: str) -> None:
        for block in blocks:
            wanted[block] -= 1
            if not wanted[block]:
                left[block] = reason

    going_on = []
    for context in contexts:
        if context.blocks.isdisjoint(lost):
            going_on.append(context)
        else:
            first = context.first_of(lost) if prefix_cache else 0
            behind = {block for block, at in context.placed() if at >= first}
            leave(behind, f"request {context.request} computes it again: its token {first} is lost")
    while costs is not None and going_on:
        gains = [(_gain(context, wanted, costs, prefix_cache=prefix_cache), context) for context in going_on]
        gain, best = max(gains, key=lambda found: found[0].seconds)
        if gain.seconds <= 0:
            break
        by_choice[best.request] = gain.reason
        leave(best.blocks, f"request {best.request} computes it again: {gain.reason}")
        going_on.remove(best)
    return RecoveryPlan(
        rebuilt=tuple(block for block in restorable if block not in left),
        left={block: left[block] for block in restorable if block in left},
        by_choice=by_choice,
    )


@dataclass(frozen=True, slots=True)
class _Gain:
    seconds: float
    reason: str


def _gain(context: Context, wanted: Counter[int], costs: Costs, *, prefix_cache: bool) -> _Gain:
    """Of computing again what nobody else wants; not having to is no gain."""
    mine = {block for block in context.blocks if wanted[block] == 1}
    if not mine:
        return _Gain(0.0, "")
    context_left = context.first_of(mine) if prefix_cache else 0
    tokens = context.tokens - context_left
    compute_s, rebuild_s = costs.compute_s(tokens, context_left), costs.rebuild_s(len(mine))
    return _Gain(
        rebuild_s - compute_s,
        f"{compute_s * 1e3:.1f} ms for {tokens} tokens, {rebuild_s * 1e3:.1f} ms for {len(mine)} blocks",
    )
