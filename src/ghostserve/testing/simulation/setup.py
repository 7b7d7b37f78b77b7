"""What a seed decides before anything happens: the cluster, its limits, and which faults come how often."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ghostserve.testing.simulation.contents import SLOT_BYTES

PROMPT_TOKENS_MAX, OUTPUT_TOKENS_MAX = 18, 12
REQUEST_TOKENS_MAX = PROMPT_TOKENS_MAX + OUTPUT_TOKENS_MAX
EXPORT_BLOCKS = 3  # decoded at a time
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

    @property
    def parts(self) -> int:
        """Shards of a position's KV: one per group and rank."""
        return self.ranks * len(self.block_sizes)

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
    """Swarm testing: every schedule has a few kinds of faults, rarely all of them."""
    ranks = rng.choice((2, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8))
    parity = rng.choice((0, 1, 1, 1, 1, 2, 2, 2, 3))
    sizes = rng.choice(((4,), (4,), (2,), (3,), (4, 2), (4, 4), (2, 6)))
    largest = sum(-(-REQUEST_TOKENS_MAX // size) for size in sizes)  # so many blocks a request needs at most
    blocks = int(largest * rng.choice((1.0, 1.5, 2.0, 3.0)))
    least = ranks + parity
    plenty = 4 * least + (parity or ranks) * blocks + 6 * ranks * len(sizes)
    frames = max(least, int(plenty * rng.choice((0.15, 0.3, 0.6, 1.0, 1.5))))
    weights = tuple(
        (kind, rng.choice((0.0, 1.0, 1.0, 3.0)) if kind != "crash" else 3.0) for kind in FAULT_KINDS
    )
    return Setup(
        ranks=ranks,
        parity_shards=parity,
        block_sizes=sizes,
        block_bytes=max(sizes) * SLOT_BYTES,
        blocks=blocks,
        frames=frames,
        batches=rng.choice((1, 2, 2, 2, 3)),
        compact=parity > 0 and rng.random() < 0.9,  # mirrors are all there is without parity
        zeroes=rng.random() < 0.3,
        tokens_per_step=rng.choice((6, 10, 16)),
        requests_running=rng.choice((2, 3, 4)),
        shared_prompts=rng.choice((1, 2, 3)),
        jobs_max=rng.choice((1, 2, 8)),
        attempts=rng.choice((4, 8, 12, 16)),
        events=rng.randint(200, 280),
        fault_share=rng.choice((0.02, 0.04, 0.04, 0.08)),
        weights=weights,
    )
