"""Performs what the product's recovery machine decides, in pieces between which anything can happen.

machine (recovery/machine.py)       here, one event each
Fence, RaiseEpoch                   at once
Run(leave)                          survivors drop what is queued
Run(spawn, regroup, weights)        a newcomer at a time, then the groups
Run(state, kv)                      all roll back; blocks come back in batches (shadow/restore.py)
RetryStep / Resume / FailStep       what is in flight is sent again, nothing, or given up
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ghostserve.codec.choose import host_codec
from ghostserve.errors import CorruptionError
from ghostserve.recovery.machine import (
    Event,
    FailStep,
    Fence,
    GiveUp,
    PhaseDone,
    PhaseFailed,
    RaiseEpoch,
    RanksLost,
    RecoveryMachine,
    Resume,
    RetryStep,
    Run,
    State,
    StepAccepted,
    StepRaised,
)
from ghostserve.shadow import commit_rule, restore
from ghostserve.shadow.restore import BlockRestore
from ghostserve.shadow.unwritten import Unwritten
from ghostserve.testing.simulation.choosing import choose
from ghostserve.testing.simulation.cluster import Cluster, Violation
from ghostserve.testing.simulation.contents import SLOT_BYTES
from ghostserve.testing.simulation.setup import EXPORT_BLOCKS
from ghostserve.testing.simulation.workers import Rank, Stage
from ghostserve.types import Phase


@dataclass(slots=True)
class Recovery:
    """Of one cluster. `planned`: faults of the phases, by the injector; each is taken once."""

    cluster: Cluster
    rng: random.Random
    machine: RecoveryMachine = field(init=False)
    todo: deque[Callable[[], None]] = field(default_factory=deque)  # of the current Run
    fails: dict[Phase, int] = field(default_factory=dict)  # phase -> times it fails
    newcomers_die: int = 0
    flipped: list[tuple[Rank, int]] = field(default_factory=list)  # bytes of live KV, to be healed
    late_messages: bool = False
    given_up: bool = False
    events: int = 0  # since it was healthy
    _run: Run | None = None
    _refused: set[int] = field(default_factory=set)
    _adopted: list[tuple[int, int, int]] = field(default_factory=list)  # (rank, block, slots)

    def __post_init__(self) -> None:
        setup = self.cluster.setup
        self.machine = RecoveryMachine(setup.ranks, setup.parity_shards, max_attempts=setup.attempts)

    @property
    def working(self) -> bool:
        """A phase is being performed: the engine core sends and accepts nothing."""
        return bool(self.todo)

    @property
    def healthy(self) -> bool:
        return self.machine.state is State.HEALTHY

    # -- what it is told -------------------------------------------------------------------------------

    def lost(self, ranks: frozenset[int], reason: str) -> None:
        in_flight = bool(self.cluster.open_steps)
        self._handle(
            RanksLost(ranks=ranks, reason=reason, epoch=self.machine.epoch, step_in_flight=in_flight)
        )

    def raised(self) -> bool:
        """The oldest step failed on a rank, by its stamp; whether that is so."""
        cluster = self.cluster
        if not cluster.open_steps:
            return False
        epoch, step = cluster.epoch, cluster.open_steps[0].step
        stamps = [cluster.page.read_stamp(rank) for rank in range(cluster.setup.ranks)]
        if not any(commit_rule.has_failed(stamp, epoch=epoch, step=step) for stamp in stamps):
            return False
        own = frozenset(
            rank
            for rank, stamp in enumerate(stamps)
            if commit_rule.raised_itself(stamp, epoch=epoch, step=step)
        )
        cluster.counts["steps raised"] += 1
        self._handle(StepRaised(ranks=own, reason="the step raised", epoch=self.machine.epoch))
        return True

    def accepted(self) -> None:
        self._handle(StepAccepted(self.machine.epoch))

    # -- what it does ----------------------------------------------------------------------------------

    def goes_on(self) -> None:
        """The next piece of the current phase."""
        dead = frozenset(
            rank.index
            for rank in self.cluster.workers.ranks
            if not rank.alive and rank.index not in self._waiting_for()
        )
        silent = frozenset(rank.index for rank in self.cluster.hanging) - self._waiting_for()
        if dead or silent:
            self._break_off()
            self.lost(dead or silent, "found dead in a recovery" if dead else "silent in a recovery")
            return
        self.todo.popleft()()

    def _waiting_for(self) -> frozenset[int]:
        """Ranks nobody has yet, before the newcomers are started."""
        assert self._run is not None
        before = self._run.phases[0] in (Phase.LEAVE, Phase.SPAWN)
        return self.machine.lost if before else frozenset()

    def _handle(self, event: Event) -> None:
        was_healthy = self.healthy
        for action in self.machine.handle(event, self.cluster.now_s):
            self._perform(action)
        if was_healthy and not self.healthy:
            self.events = 0

    def _perform(self, action: object) -> None:
        cluster = self.cluster
        if not isinstance(action, Run):
            cluster.note(str(action))
        match action:
            case Fence(ranks=ranks):
                for rank in ranks:
                    cluster.rank(rank).dies()
            case RaiseEpoch(epoch=epoch):
                cluster.epoch = cluster.page.epoch = epoch
            case Run():
                self._start(action)
            case RetryStep() | Resume():
                self._heal()
                self._send_again()
            case FailStep():
                self._heal()
                self._fail_step()
            case GiveUp():
                self.given_up = True
                self.todo.clear()

    def _start(self, run: Run) -> None:
        self._run = run
        self.cluster.note(f"{', '.join(phase.value for phase in run.phases)}")
        if Phase.LEAVE in run.phases:
            self.todo.append(self._leave)
        elif Phase.REGROUP in run.phases:
            if Phase.SPAWN in run.phases:
                for rank in sorted(self.machine.lost):
                    self.todo.append(lambda rank=rank: self._spawn(rank))  # type: ignore[misc]
                self.todo.append(lambda: self._phase(Phase.SPAWN))
                self.todo.append(lambda: self._phase(Phase.WEIGHTS))
            self.todo.append(lambda: self._phase(Phase.REGROUP))
        else:
            self.todo.append(self._state)
            if Phase.KV in run.phases:
                self.todo.append(self._begin_kv)

    def _phase(self, phase: Phase) -> None:
        """A phase has been performed; or not, if that was planned."""
        if self.fails.get(phase, 0):
            self.fails[phase] -= 1
            self.cluster.counts[f"{phase.value} fails"] += 1
            self._break_off()
            self._handle(PhaseFailed(phase=phase, reason="a fault was injected", epoch=self.machine.epoch))
        else:
            self._handle(PhaseDone(phase, self.machine.epoch))

    def _break_off(self) -> None:
        """The current Run is not finished: as the performer unwinds."""
        self.todo.clear()
        self._end_restore()

    # -- phases ----------------------------------------------------------------------------------------

    def _leave(self) -> None:
        for rank in self.cluster.workers.ranks:
            rank.queue.clear()
            rank.stage = Stage.QUEUED
        self._phase(Phase.LEAVE)

    def _spawn(self, index: int) -> None:
        cluster = self.cluster
        cluster.workers.ranks[index] = newcomer = cluster.workers.new_rank(index)
        cluster.counts["replacements"] += 1
        if self.newcomers_die:
            self.newcomers_die -= 1
            newcomer.dies()
            cluster.counts["newcomers that died"] += 1
            self._break_off()
            self.lost(frozenset({index}), "the replacement ended while starting")

    def _state(self) -> None:
        """Every rank takes on the state after the last accepted step."""
        cluster = self.cluster
        self._roll_back()
        for rank in cluster.workers.ranks:
            rank.gate.reformed(epoch=cluster.epoch)
            rank.met = 0
            if self.late_messages:  # held up on their way for all that time
                rank.queue.extend(cluster.sent_before(cluster.epoch))
        cluster.counts["late messages"] += self.late_messages
        self.late_messages = False
        self._phase(Phase.STATE)

    def _roll_back(self) -> None:
        cluster = self.cluster
        cluster.workers.state = cluster.view.copy()
        records = set(cluster.protection.random_records(range(cluster.setup.ranks)))
        expected = cluster.view.random.to_bytes(4, "little")
        if records - {expected}:
            raise Violation(f"random states {records} are restored, {expected!r} were accepted")
        if cluster.protection.accepted[1] and not records:
            raise Violation("no rank's random states after the last accepted step are known")

    # -- KV --------------------------------------------------------------------------------------------

    def unwritten(self) -> Unwritten:
        cluster = self.cluster
        return Unwritten.of(
            cluster.view.copied_tables(),
            (step.sent.increment for step in cluster.open_steps),
            cluster.setup.block_sizes,
        )

    def needed(self, coming: Unwritten) -> tuple[dict[int, tuple[int, int]], dict[str, set[int]]]:
        """As the product's scheduler asks for it."""
        scheduler, view = self.cluster.scheduler, self.cluster.view
        running = ((request.name, request.computed, request.tables) for request in scheduler.running)
        users = coming.users(running, lambda name: (view.reached[name], view.tables.tables[name]))
        return coming.needed_slots(users, scheduler.cached(), self.cluster.setup.block_sizes)

    def _begin_kv(self) -> None:
        cluster = self.cluster
        coming = self.unwritten()
        needed, used = self.needed(coming)
        cluster.protection.hold()
        lost = self.machine.lost
        slots = {block: count for block, (_, count) in needed.items()}
        plan = restore.decide(cluster.protection.manifest, slots, lost=lost)
        rebuilt, self._refused = choose(cluster, plan, coming, used)
        self._adopted = []
        for rank in sorted(lost):
            for first in range(0, len(rebuilt), EXPORT_BLOCKS):
                batch = rebuilt[first : first + EXPORT_BLOCKS]
                self.todo.append(lambda rank=rank, batch=batch: self._restore(rank, batch))  # type: ignore[misc]
        self.todo.append(lambda: self._end_kv(needed, used))

    def _restore(self, index: int, batch: tuple[int, ...]) -> None:
        """Survivors export what the parity needs, then the newcomer adopts."""
        cluster, lost = self.cluster, self.machine.lost
        items = restore.restores(
            cluster.protection.manifest,
            batch,
            rank=index,
            survivors=[rank for rank in range(cluster.setup.ranks) if rank not in lost],
            reserve=cluster.setup.reserve,
        )
        size = cluster.setup.block_bytes
        pool = cluster.pool.array.data
        for item in items:
            if item.frame is None and len(lost) > cluster.setup.parity_shards:
                raise Violation(f"block {item.block}: its mirrors are gone while they are restored from")
            for rank, frame in item.survivors.items():
                nbytes = cluster.setup.block_sizes[item.group] * SLOT_BYTES
                at = item.block * size
                pool[frame * size : frame * size + nbytes] = cluster.rank(rank).kv[at : at + nbytes]
        for item in items:
            self._adopt(cluster.rank(index), item)
        cluster.pool.punch(cluster.setup.reserve.start * size, len(cluster.setup.reserve) * size)

    def _adopt(self, newcomer: Rank, item: BlockRestore) -> None:
        cluster = self.cluster
        nbytes = item.slots * SLOT_BYTES
        frame = self._array
        if item.frame is not None:
            log, kind = frame(item.frame, nbytes), "blocks from mirrors"
            clean = item.frame not in cluster.corrupted
        else:
            rebuilt = restore.rebuild_log(
                host_codec(cluster.setup.ranks, cluster.setup.parity_shards),
                rank=newcomer.index,
                data=[
                    frame(item.survivors[rank], nbytes) if rank in item.survivors else None
                    for rank in range(cluster.setup.ranks)
                ],
                parity=[frame(parity, nbytes) for parity in item.parity],
                parity_checksums=item.parity_checksums,
                checksum=item.checksum,
            )
            log, kind = rebuilt.log, "blocks from parity"
            clean = not cluster.corrupted & set(item.parity) and not self.flipped
            cluster.counts["parities left out"] += rebuilt.left_out
        try:
            restore.check_log(log, block=item.block, checksum=item.checksum)
        except CorruptionError as error:
            if clean:
                raise Violation(f"rank {newcomer.index}: {error}, and nothing was corrupted") from None
            cluster.counts["blocks refused"] += 1
            self._refused.add(item.block)
            return
        at = item.block * cluster.setup.block_bytes
        newcomer.kv[at : at + nbytes] = log.tobytes()
        if item.frame is not None:
            newcomer.progress.seed(item.frame, slots=item.slots, checksum=item.checksum)
        cluster.counts[kind] += 1
        self._adopted.append((newcomer.index, item.block, item.slots))

    def _array(self, frame: int, nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        at = frame * self.cluster.setup.block_bytes
        return self.cluster.pool.array[at : at + nbytes]

    def _end_kv(self, needed: dict[int, tuple[int, int]], used: dict[str, set[int]]) -> None:
        self._check_rebuilt()
        self._end_restore()
        self._recompute(set(self._refused), used)
        self._phase(Phase.KV)

    def _check_rebuilt(self) -> None:
        """What is rebuilt equals what was lost, byte for byte."""
        cluster = self.cluster
        for rank, block, slots in self._adopted:
            at = block * cluster.setup.block_bytes
            found = bytes(cluster.rank(rank).kv[at : at + slots * SLOT_BYTES])
            if found != cluster.truth_of(block, rank, slots):
                raise Violation(
                    f"rank {rank}, block {block}: {slots} slots are rebuilt, and not what was lost"
                )
        cluster.counts["bytes rebuilt"] += sum(slots * SLOT_BYTES for _, _, slots in self._adopted)

    def _end_restore(self) -> None:
        protection, setup = self.cluster.protection, self.cluster.setup
        if protection._held is not None:
            protection.release()
        size = setup.block_bytes
        self.cluster.pool.punch(setup.reserve.start * size, len(setup.reserve) * size)
        self._heal()

    def _heal(self) -> None:
        """What was flipped in live KV for the time of a recovery is put right: a step would read it unchecked."""
        for rank, at in self.flipped:
            rank.kv[at] ^= 0xFF
        self.flipped.clear()

    def _recompute(self, lost_blocks: set[int], used: dict[str, set[int]]) -> None:
        """Rung 3 for the requests that use a block which is gone."""
        cluster, coming = self.cluster, self.unwritten()
        for block in lost_blocks:
            cluster.protection.manifest.drop(block)
        affected = {name for name, blocks in used.items() if blocks & lost_blocks}
        if not affected and not lost_blocks:
            return
        affected = coming.with_sharers(affected, used)
        gone = coming.blocks(affected).keys()
        cluster.scheduler.recompute(affected, forget=lost_blocks | gone)
        for step in cluster.open_steps:
            step.pieces = cluster.protection.without_blocks(step.pieces, gone)
            step.sent = step.sent.without(affected)
        self._roll_back()
        cluster.counts["requests recomputed"] += len(affected)
        cluster.note(f"recomputed: {sorted(affected)}, for blocks {sorted(lost_blocks)}")

    # -- the end ---------------------------------------------------------------------------------------

    def _send_again(self) -> None:
        for step in self.cluster.open_steps:
            self.cluster.send(step)

    def _fail_step(self) -> None:
        """The oldest step is given up: its requests end, the others in flight start over from their tokens."""
        cluster = self.cluster
        coming = self.unwritten()
        _, used = self.needed(coming)
        failing = {request.request_id for request in cluster.open_steps[0].sent.increment.requests}
        others = coming.with_sharers(coming.scheduled.keys(), used) - failing
        gone = coming.blocks().keys()
        cluster.scheduler.recompute(others, forget=gone)
        for step in cluster.open_steps:
            cluster.protection.withdraw(step.pieces, gone)
            cluster.scheduler.tell_again(step.scheduled)
        cluster.fail(failing)
