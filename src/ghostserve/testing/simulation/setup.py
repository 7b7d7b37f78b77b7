"""What a seed decides before anything happens: the cluster, its limits, and which faults come how often."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ghostserve.testing.simulation.contents import SLOT_BYTES

PROMPT_TOKENS_MAX, OUTPUT_TOKENS_MAX = 18, 12
REQUEST_TOKENS_MAX = PROMPT_TOKENS_MAX + OUTPUT_TOKENS_MAX
EXPORT_BLOCKS = 3  # decoded at a time
TIGHT_SHARE = 0.4  # of all schedules
FAULT_KINDS = (
    "crash",
    "crash several",
    "crash in recovery",
    "hang",
    "slow",
    "raise",
    "raise always",
    "spawn fails",
    "phase fails",
    "staging fails",
    "torn record",
    "torn stamp",
    "late message",
    "corrupt mirror",
    "corrupt parity",
    "corrupt kv",
    "keeper dies",
    "keeper hangs",
    "wipe fails",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One cluster. `weights`: how often each kind of fault strikes, relative to the others; many are 0."""

    ranks: int
    parity_shards: int
    block_sizes: tuple[int, ...]
    block_bytes: int  # of one rank: KV memory is cut by the largest block
    blocks: int
    frames: int
    batches: int  # in flight
    compact: bool
    zeroes: bool  # new blocks are zeroed by the step that uses them first
    tokens_per_step: int
    requests_running: int
    shared_prompts: int
    jobs_max: int
    attempts: int
    events: int
    fault_share: float
    weights: tuple[tuple[str, float], ...]
    accepts: int  # how often the engine core looks for a result, relative to the ranks' going on (40)
    leaves: int  # clients, likewise
    preempts: int
    ambush_share: float  # of preemptions while steps are in flight, after which a loss strikes soon

    @property
    def parts(self) -> int:
        """Shards of a position's KV: one per group and rank."""
        return self.ranks * len(self.block_sizes)

    @property
    def block_cost(self) -> float:
        """What a block costs to rebuild, in tokens computed; 0: nothing is computed again by choice. Not drawn, so that
        a seed stays the schedule it was.
        """
        return (0.0, 0.0, 2.0, 8.0)[self.events % 4]

    @property
    def reserve(self) -> range:
        """Frames behind the budgeted ones, for survivors' exports."""
        return range(self.frames, self.frames + EXPORT_BLOCKS * (self.ranks - 1))

    def __str__(self) -> str:
        faults = ", ".join(kind for kind, weight in self.weights if weight)
        return (
            f"n={self.ranks} m={self.parity_shards} block sizes {self.block_sizes} blocks={self.blocks} "
            f"frames={self.frames} in flight={self.batches} compact={self.compact} faults: {faults}"
        )


def draw(rng: random.Random) -> Setup:
    """Swarm testing: every schedule has a few kinds of faults, rarely all of them.

    Some are *tight*: no block to spare, several steps in flight whose results the engine core is slow to take, requests
    that lose their blocks all the time, losses just then, and few kinds of faults.
    """
    tight = rng.random() < TIGHT_SHARE
    ranks = rng.choice((2, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8))
    parity = rng.choice((0, 1, 1, 1, 1, 2, 2, 2, 3))
    sizes = rng.choice(((4,), (4,), (2,), (3,), (4, 2), (4, 4), (2, 6)))
    largest = sum(-(-REQUEST_TOKENS_MAX // size) for size in sizes)  # so many blocks a request needs at most
    blocks = int(largest * (1.0 if tight else rng.choice((1.0, 1.5, 2.0, 3.0))))
    least = ranks + parity
    plenty = 4 * least + (parity or ranks) * blocks + 6 * ranks * len(sizes)
    frames = max(least, int(plenty * rng.choice((0.3, 1.5, 1.5) if tight else (0.15, 0.3, 0.6, 1.0, 1.5))))
    few = rng.sample(FAULT_KINDS, rng.randint(2, 4))
    weights = tuple(
        (kind, 3.0 if kind == "crash" else _weight(rng, kind in few if tight else None))
        for kind in FAULT_KINDS
    )
    return Setup(
        ranks=ranks,
        parity_shards=parity,
        block_sizes=sizes,
        block_bytes=max(sizes) * SLOT_BYTES,
        blocks=blocks,
        frames=frames,
        batches=rng.choice((2, 2, 3) if tight else (1, 2, 2, 2, 3)),
        compact=parity > 0 and rng.random() < 0.9,  # mirrors are all there is without parity
        zeroes=rng.random() < 0.3,
        tokens_per_step=rng.choice((6, 10, 16)),
        requests_running=rng.choice((3, 4) if tight else (2, 3, 4)),
        shared_prompts=rng.choice((1, 2, 3)),
        jobs_max=rng.choice((1, 2, 8)),
        attempts=rng.choice((4, 8, 12, 16)),
        events=rng.randint(200, 280),
        fault_share=rng.choice((0.02, 0.04, 0.08) if tight else (0.02, 0.04, 0.04, 0.08)),
        weights=weights,
        accepts=rng.choice((3, 6, 14)) if tight else 14,
        leaves=rng.choice((1, 4)) if tight else 1,
        preempts=rng.choice((1, 6)) if tight else 1,
        ambush_share=rng.choice((0.0, 0.8, 0.8)) if tight else 0.0,
    )


def _weight(rng: random.Random, chosen: bool | None) -> float:
    """Of a kind of fault; `chosen`: whether it is one of the few, None where nothing was chosen."""
    some = rng.choice((0.0, 1.0, 1.0, 3.0))
    return some if chosen is None else 3.0 if chosen else 0.0
