"""What host memory the shadow may use, and how it is cut up. Pure: numbers in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass

from ghostserve.arena.control import CONTROL_BYTES
from ghostserve.arena.staging import StagingArea
from ghostserve.engine.messages import RankLayout
from ghostserve.errors import UsageError
from ghostserve.types import STEPS_IN_FLIGHT_MAX

STAGING_RING = 2 * (STEPS_IN_FLIGHT_MAX + 1)  # two records per step; the last accepted one's are needed too
GENERATOR_BYTES = 5200  # a CPU generator's state and its request id, with room
JOBS_IN_FLIGHT_MAX = 8
REBUILD_BLOCKS = 16  # decoded at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardLimits:
    """What the arena is sized by. `host_memory_bytes` bounds everything."""

    parity_shards: int
    compact: bool
    host_memory_bytes: int
    max_requests: int
    max_batched_tokens: int
    backlog_blocks: int

    @property
    def staging_record_bytes(self) -> int:
        """Room for the random states of a step: the default generators, and one per request, twice as many as
        run at once, for those that were preempted.
        """
        return (64 << 10) + 2 * GENERATOR_BYTES * self.max_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameCount:
    """`frames` of the `wanted` ones fit into the budget; `reserve` lie behind them, for a rebuild."""

    frames: int
    wanted: int
    reserve: int
    needed_bytes: int  # of host memory, for all wanted ones


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBound:
    """parity + mirror bytes <= m*S*B + n*(T+K)*B, as it stands now."""

    sealed_live_blocks: int
    tail_blocks: int
    bound_bytes: int
    used_bytes: int

    @property
    def holds(self) -> bool:
        return self.used_bytes <= self.bound_bytes


def reserve_frames(ranks: int) -> int:
    """Frames behind the manifest's, for survivors' exports during a rebuild: always there when needed."""
    return REBUILD_BLOCKS * (ranks - 1)


def count_frames(limits: GuardLimits, layout: RankLayout, *, ranks: int) -> FrameCount:
    """Frames for the whole pool's parity, a tail per request and what two full steps seal; within budget.

    Two, because a step is planned while the keeper has only begun to encode the one before. What that one
    replaced in a full pool is parity that waits to be wiped.

    Raises UsageError if not even one block could be protected.
    """
    groups, block = len(layout.block_sizes), min(layout.block_sizes)
    burst = groups * (-(-limits.max_batched_tokens // block) + limits.max_requests)
    mirrored = 2 * burst + limits.backlog_blocks + JOBS_IN_FLIGHT_MAX
    if not limits.compact:
        mirrored = layout.num_blocks + burst
    wanted = limits.parity_shards * (layout.num_blocks + burst) + ranks * mirrored
    staging = StagingArea.required_bytes(
        ranks=ranks, ring=STAGING_RING, record_bytes=limits.staging_record_bytes
    )
    fixed = CONTROL_BYTES + staging + reserve_frames(ranks) * layout.frame_bytes
    affordable = (limits.host_memory_bytes - fixed) // layout.frame_bytes
    if affordable < ranks + limits.parity_shards:
        raise UsageError(
            f"--host-memory {limits.host_memory_bytes} leaves no room for one KV block of "
            f"{layout.frame_bytes} bytes on {ranks} ranks; give at least "
            f"{fixed + max(4 * ranks, ranks + limits.parity_shards) * layout.frame_bytes} bytes, or use --protection none"
        )
    return FrameCount(
        frames=min(wanted, affordable),
        wanted=wanted,
        reserve=reserve_frames(ranks),
        needed_bytes=fixed + wanted * layout.frame_bytes,
    )
