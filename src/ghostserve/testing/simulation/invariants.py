"""What must hold after every event. Each check raises Violation (or AssertionError, from the product's own `check`)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ghostserve.arena.frames import FrameState
from ghostserve.codec.choose import host_codec
from ghostserve.shadow.manifest import BlockState, Entry
from ghostserve.testing.simulation.cluster import Cluster, Held, Violation
from ghostserve.testing.simulation.contents import SLOT_BYTES
from ghostserve.testing.simulation.recovery import Recovery

RECOVERY_EVENTS_MAX = 400  # without a further fault


@dataclass(slots=True)
class Invariants:
    """Of one cluster. What a block should hold is computed once per generation and length."""

    cluster: Cluster
    recovery: Recovery
    _logs: dict[tuple[int, int, int], tuple[Held, list[bytes], tuple[int, ...]]] = field(default_factory=dict)
    _parity: dict[tuple[int, int], list[bytes]] = field(default_factory=dict)
    _seen: dict[int, tuple[object, ...]] = field(default_factory=dict)  # claims, as they were looked at last
    _frames: npt.NDArray[np.uint8] | None = None  # after the last event
    _free: int = 0

    def check(self) -> None:
        """All of them."""
        self.cluster.protection.check()
        self.recovery.machine.check()
        self.cluster.keeper.jobs.check()
        self.cluster.scheduler.check()
        pool = self.cluster.pool.array.tobytes()
        changed = self._changed_frames(pool)
        self._check_claims(pool, changed)
        self._check_frames(pool, changed)
        if self.recovery.events > RECOVERY_EVENTS_MAX:
            raise Violation(f"a recovery has not ended after {self.recovery.events} events")

    # -- what the manifest says of blocks --------------------------------------------------------------

    def _check_claims(self, pool: bytes, changed: set[int]) -> None:
        """No committed stripe is wrong: mirrors and parity hold what accepted steps wrote, on every rank.

        What has not changed since it was looked at last is not looked at again.
        """
        held, seen = self.cluster.held, self._seen
        self._seen = {}
        for block, entry in self.cluster.protection.manifest.entries.items():
            if not entry.slots:
                continue
            coded = entry.state is BlockState.CODED
            frames = entry.parity if coded else entry.mirrors
            claim = (entry.generation, entry.slots, coded, entry.checksums, held.get(block))
            if seen.get(block) != claim or not changed.isdisjoint(frames):
                self._check_claim(pool, block, entry)
            self._seen[block] = claim

    def _check_claim(self, pool: bytes, block: int, entry: Entry) -> None:
        logs, checksums = self._should(block, entry)
        if checksums != entry.checksums:
            raise Violation(f"block {block}: checksums {entry.checksums}, {checksums} are right")
        if entry.state is BlockState.CODED:
            self._check_bytes(pool, entry.parity, self._parities(entry, logs), f"block {block}: parity shard")
        else:
            self._check_bytes(pool, entry.mirrors, logs, f"block {block}: mirror of rank")

    def _check_bytes(self, pool: bytes, frames: tuple[int, ...], should: list[bytes], what: str) -> None:
        size = self.cluster.setup.block_bytes
        for index, (frame, log) in enumerate(zip(frames, should, strict=True)):
            at = frame * size
            if pool[at : at + len(log)] != log and frame not in self.cluster.corrupted:
                raise Violation(f"{what} {index} is not what accepted steps wrote")

    def _should(self, block: int, entry: Entry) -> tuple[list[bytes], tuple[int, ...]]:
        """The logs of all ranks, and their checksums."""
        held = self.cluster.held.get(block)
        if held is None or held.slots < entry.slots:
            raise Violation(
                f"block {block}: {entry.slots} slots are protected, {held and held.slots} are written"
            )
        key = (block, entry.generation, entry.slots)
        known = self._logs.get(key)
        if known is None or known[0] is not held:
            logs = [
                self.cluster.truth_of(block, rank, entry.slots) for rank in range(self.cluster.setup.ranks)
            ]
            known = self._logs[key] = (held, logs, tuple(map(zlib.crc32, logs)))
        return known[1], known[2]

    def _parities(self, entry: Entry, logs: list[bytes]) -> list[bytes]:
        """What the parity of these logs is; encoded once more, from the truth."""
        setup = self.cluster.setup
        key = (entry.block, entry.generation)
        if key not in self._parity:
            rows = [np.empty(len(logs[0]), dtype=np.uint8) for _ in range(setup.parity_shards)]
            data = [np.frombuffer(log, dtype=np.uint8) for log in logs]
            host_codec(setup.ranks, setup.parity_shards).encode(data, rows)
            self._parity[key] = [row.tobytes() for row in rows]
        return self._parity[key]

    # -- frames ----------------------------------------------------------------------------------------

    def _changed_frames(self, pool: bytes) -> set[int]:
        """Frames of which a byte differs from what it was after the last event."""
        now = np.frombuffer(pool, dtype=np.uint8).reshape(-1, self.cluster.setup.block_bytes)
        before, self._frames = self._frames, now
        return set(np.flatnonzero((now != before).any(axis=1)).tolist()) if before is not None else set()

    def _check_frames(self, pool: bytes, changed: set[int]) -> None:
        """The budget is kept, and what is free holds nobody's text."""
        setup, frames = self.cluster.setup, self.cluster.protection.manifest.pool
        taken = frames.used_count + frames.retired_count + frames.free_count
        if taken != setup.frames:
            raise Violation(f"{taken} frames, {setup.frames} are budgeted")
        freed, self._free = frames.free_count > self._free, frames.free_count
        zeros, size = bytes(setup.block_bytes), setup.block_bytes
        for frame in range(setup.frames) if freed else changed:
            if frame >= setup.frames:
                if not self.recovery.working and pool[frame * size : (frame + 1) * size] != zeros:
                    raise Violation("survivors' exports are left after a restore")
            elif frames.state(frame) is FrameState.FREE and pool[frame * size : (frame + 1) * size] != zeros:
                raise Violation(f"frame {frame} is free and not empty")

    # -- live KV ---------------------------------------------------------------------------------------

    def check_kv(self) -> None:
        """Every block that is of use is there on every rank; between two steps only."""
        coming = self.recovery.unwritten()
        needed, _ = self.recovery.needed(coming)
        for block, (_, slots) in needed.items():
            for rank in self.cluster.workers.ranks:
                at = block * self.cluster.setup.block_bytes
                if bytes(rank.kv[at : at + slots * SLOT_BYTES]) != self.cluster.truth_of(
                    block, rank.index, slots
                ):
                    raise Violation(
                        f"block {block}: {slots} slots on rank {rank.index} are not what was written"
                    )
