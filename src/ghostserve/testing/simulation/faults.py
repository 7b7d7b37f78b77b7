"""What goes wrong, by name. Each returns whether it could strike just then."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ghostserve.arena.control import StampStatus
from ghostserve.shadow.manifest import Entry
from ghostserve.testing.simulation.cluster import Cluster
from ghostserve.testing.simulation.contents import SLOT_BYTES
from ghostserve.testing.simulation.recovery import Recovery
from ghostserve.testing.simulation.workers import Rank, Stage
from ghostserve.types import Phase

ALWAYS = 1 << 30


@dataclass(slots=True)
class Faults:
    """Strikes one cluster."""

    cluster: Cluster
    recovery: Recovery
    rng: random.Random

    def strike(self, kind: str) -> bool:
        """A fault of this kind, if it is possible now."""
        action: Callable[[], bool] = getattr(self, "_" + kind.replace(" ", "_"))
        if not action():
            return False
        self.cluster.counts[kind] += 1
        self.cluster.note(f"FAULT: {kind}")
        self.recovery.events = 0
        return True

    # -- ranks -----------------------------------------------------------------------------------------

    def _alive(self) -> list[Rank]:
        return [rank for rank in self.cluster.workers.ranks if rank.alive]

    def _crash(self) -> bool:
        alive = self._alive()
        if alive:
            self._kill(self.rng.choice(alive))
        return bool(alive)

    def _kill(self, rank: Rank) -> None:
        """It may be in the middle of its staging."""
        if rank.stage is Stage.COMPUTED and rank.queue and self.rng.random() < 0.5:
            self.cluster.workers.tear_staging(rank)
        rank.dies()
        self.cluster.counts["losses"] += 1

    def _crash_several(self) -> bool:
        alive = self._alive()
        if len(alive) < 2:
            return False
        most = min(len(alive), max(2, self.cluster.setup.parity_shards + 1))
        for rank in self.rng.sample(alive, self.rng.randint(2, most)):
            self._kill(rank)
        return True

    def _crash_in_recovery(self) -> bool:
        return self.recovery.working and self._crash()

    def _hang(self) -> bool:
        """It is stopped, or it spins; in a step or while nothing is asked of it."""
        able = [rank for rank in self._alive() if not rank.hung]
        if not able:
            return False
        rank = self.rng.choice(able)
        rank.hung, rank.stopped = True, self.rng.random() < 0.5
        rank.hung_alone = rank.stage is not Stage.BEGUN or self.rng.random() < 0.5
        if rank.hung_alone and rank.stage is Stage.BEGUN:
            rank.met -= 1
        self.cluster.counts["losses"] += 1
        self.cluster.counts["hangs in idle time"] += not self.cluster.open_steps
        return True

    def _slow(self) -> bool:
        alive = self._alive()
        if alive:
            self.rng.choice(alive).slow = self.rng.choice((0, 3, 6))
        return bool(alive)

    def _raise(self) -> bool:
        alive = self._alive()
        if not alive or self.recovery.working:
            return False
        self.rng.choice(alive).raises = self.rng.choice((1, 1, 2, ALWAYS))
        return True

    def _raise_always(self) -> bool:
        """A step that raises wherever it is run; one that was done already, when it is run again after a loss."""
        cluster = self.cluster
        if self.recovery.working or not cluster.open_steps:
            return False
        steps = [step.step for step in cluster.open_steps]
        done = [
            step for step in steps if any((cluster.epoch, step) in rank.finished for rank in self._alive())
        ]
        cluster.workers.poisoned = self.rng.choice(done or steps)
        if done:
            self._crash()
        return True

    def _late_message(self) -> bool:
        self.recovery.late_messages = True
        return True

    def _spawn_fails(self) -> bool:
        self.recovery.newcomers_die = 1
        return True

    def _phase_fails(self) -> bool:
        phase = self.rng.choice((Phase.LEAVE, Phase.REGROUP, Phase.WEIGHTS, Phase.STATE))
        self.recovery.fails[phase] = 1
        return True

    # -- the arena -------------------------------------------------------------------------------------

    def _staging_fails(self) -> bool:
        """The arena takes nothing of a rank, for some steps."""
        alive = self._alive()
        if alive:
            self.rng.choice(alive).fails_to_stage = self.rng.choice((1, 2, 4, 16))
        return bool(alive)

    def _torn_record(self) -> bool:
        """A rank dies while it stages."""
        able = [rank for rank in self._alive() if rank.stage is Stage.COMPUTED and rank.queue]
        if not able:
            return False
        rank = self.rng.choice(able)
        self.cluster.workers.tear_staging(rank)
        rank.dies()
        self.cluster.counts["losses"] += 1
        return True

    def _torn_stamp(self) -> bool:
        """A rank dies while it stamps DONE: the copy it was writing is rubbish, the one before holds."""
        able = [rank for rank in self._alive() if rank.stage is Stage.STAGED and rank.queue]
        if not able:
            return False
        rank = self.rng.choice(able)
        message = rank.queue[0]
        record = self.cluster.page._stamps[rank.index]
        self.cluster.page.stamp(
            rank.index,
            epoch=message.epoch,
            step=message.step,
            status=StampStatus.DONE,
            now_s=self.cluster.now_s,
        )
        record._copies[record._latest][24 + self.rng.randrange(16)] ^= 0x5A
        record._written = 0
        rank.dies()
        self.cluster.counts["losses"] += 1
        return True

    def _entries(self, *, coded: bool) -> list[Entry]:
        entries = self.cluster.protection.manifest.entries.values()
        return [entry for entry in entries if entry.slots and bool(entry.mirrors) is not coded]

    def _flip(self, frame: int, nbytes: int) -> bool:
        if frame in self.cluster.corrupted:
            return False
        at = frame * self.cluster.setup.block_bytes + self.rng.randrange(nbytes)
        self.cluster.pool.array[at] ^= 1 << self.rng.randrange(8)
        self.cluster.corrupted.add(frame)
        return True

    def _corrupt_mirror(self) -> bool:
        entries = self._entries(coded=False)
        if not entries:
            return False
        entry = self.rng.choice(entries)
        return self._flip(self.rng.choice(entry.mirrors), entry.slots * SLOT_BYTES)

    def _corrupt_parity(self) -> bool:
        entries = [entry for entry in self._entries(coded=True) if entry.parity]
        if not entries:
            return False
        entry = self.rng.choice(entries)
        return self._flip(self.rng.choice(entry.parity), entry.slots * SLOT_BYTES)

    def _corrupt_kv(self) -> bool:
        """A survivor's live KV, during a recovery; healed when that ends: what a step reads is not checked."""
        able = [rank for rank in self._alive() if rank.index not in self.recovery.machine.lost]
        entries = self._entries(coded=True)
        if not self.recovery.working or not able or not entries:
            return False
        rank, entry = self.rng.choice(able), self.rng.choice(entries)
        at = entry.block * self.cluster.setup.block_bytes + self.rng.randrange(entry.slots * SLOT_BYTES)
        rank.kv[at] ^= 0xFF
        self.recovery.flipped.append((rank, at))
        return True

    # -- the keeper ------------------------------------------------------------------------------------

    def _keeper_dies(self) -> bool:
        alive = self.cluster.keeper.alive
        self.cluster.keeper.dies()
        return alive

    def _keeper_hangs(self) -> bool:
        able = self.cluster.keeper.alive and not self.cluster.keeper.hung
        self.cluster.keeper.hung = True
        return able

    def _wipe_fails(self) -> bool:
        self.cluster.keeper.refuses_wipes += 1
        return True
