"""One schedule: everything that happens, in an order that its seed decides, and a quiet end."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ghostserve.testing.simulation.cluster import Cluster, Violation
from ghostserve.testing.simulation.faults import Faults
from ghostserve.testing.simulation.invariants import Invariants
from ghostserve.testing.simulation.recovery import Recovery
from ghostserve.testing.simulation.setup import Setup, draw
from ghostserve.testing.simulation.suspicion import Suspicion
from ghostserve.testing.simulation.workers import Rank

QUIET_EVENTS_MAX = 3000
AMBUSH_EVENTS_MAX = 6  # after a preemption
HANG_S = 11.0  # longer than the keeper's client waits


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a schedule. `violation`: None if every invariant held."""

    seed: int
    setup: Setup
    events: int
    counts: dict[str, int]
    checksum: int
    violation: str | None
    trace: tuple[str, ...] = ()


@dataclass(slots=True)
class Schedule:
    """One cluster and what is about to happen to it."""

    seed: int
    trace: bool = False
    rng: random.Random = field(init=False)
    setup: Setup = field(init=False)
    cluster: Cluster = field(init=False)
    recovery: Recovery = field(init=False)
    faults: Faults = field(init=False)
    invariants: Invariants = field(init=False)
    suspicion: Suspicion = field(init=False)
    events: int = 0
    _preempted: int = 0  # preemptions seen
    _ambush_at: int | None = None  # event

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.setup = draw(self.rng)
        self.cluster = Cluster(self.setup, self.rng, log=[] if self.trace else None)
        self.recovery = Recovery(self.cluster, self.rng)
        self.faults = Faults(self.cluster, self.recovery, self.rng)
        self.suspicion = Suspicion(self.cluster)
        self.invariants = Invariants(self.cluster, self.recovery)

    def run(self) -> Result:
        """All of it, up to the first violation."""
        violation = None
        try:
            for _ in range(3):
                self.cluster.arrives()
            loss_at = self.rng.randint(self.setup.events // 4, self.setup.events // 2)
            while self.events < self.setup.events and not self.recovery.given_up:
                if self._loss_is_due(loss_at):
                    self.faults.strike("crash")
                elif self.rng.random() < self._fault_share():
                    self._fault()
                else:
                    self._happens()
                self._event_is_over()
            if not self.recovery.given_up:
                self._quiet_end()
        except Exception as error:  # the product's own assertions, and what a broken product stumbles over
            where = f"event {self.events}"
            violation = f"{where}: {type(error).__name__}: {error}"
            self.cluster.note(f"VIOLATION: {violation}")
        return Result(
            seed=self.seed,
            setup=self.setup,
            events=self.events,
            counts=dict(self.cluster.counts),
            checksum=self.cluster.checksum(),
            violation=violation,
            trace=tuple(self.cluster.log or ()),
        )

    def _event_is_over(self) -> None:
        self.events += 1
        self.cluster.now_s += self.rng.random() * 0.004
        if not self.recovery.healthy:
            self.recovery.events += 1
        if self.recovery.given_up:
            self.cluster.counts["gave up"] += 1
            return
        self.invariants.check()

    def _loss_is_due(self, first_at: int) -> bool:
        """One in each schedule; and after preemptions, if this one has ambushes: what was given up is overwritten at once."""
        preempted = self.cluster.scheduler.preempted_for_room
        if preempted != self._preempted:
            self._preempted = preempted
            if self.rng.random() < self.setup.ambush_share:
                self._ambush_at = self.events + self.rng.randint(0, AMBUSH_EVENTS_MAX)
        if self._ambush_at is not None and self.events >= self._ambush_at:
            self._ambush_at = None
            return True
        return self.events >= first_at and not self.cluster.counts["losses"]

    def _fault_share(self) -> float:
        """Losses during a recovery are rare if nobody sees to them."""
        share = self.setup.fault_share
        return 3 * share if self.recovery.working else share

    def _fault(self) -> None:
        kinds, weights = zip(*self.setup.weights, strict=True)
        self.faults.strike(self.rng.choices(kinds, weights)[0])

    # -- what happens without anybody's doing ----------------------------------------------------------

    def _happens(self) -> None:
        cluster = self.cluster
        if self.recovery.working:
            if self.rng.random() < 0.75:
                self.recovery.goes_on()
            else:
                self._keeper()
            return
        if self._notices():
            return
        able: list[tuple[Callable[[], object], int]] = [(self._ranks, 40), (self._keeper, 12)]
        if cluster.open_steps:
            able.append((self._accepts, self.setup.accepts))
        if self.recovery.healthy:
            if cluster.may_send:
                able.append((cluster.sends, 25))
            able += [(cluster.arrives, 5), (cluster.leaves, self.setup.leaves)]
            able.append((cluster.preempts, self.setup.preempts))
            if not cluster.open_steps:
                able.append((self._idle, 3))
        actions, weights = zip(*able, strict=True)
        self.rng.choices(actions, weights)[0]()

    def _ranks(self) -> None:
        """Some ranks go on, often all of them until they wait for something."""
        ranks = list(self.cluster.workers.ranks)
        stages = self.rng.choice((1, 2, 8, 8))
        if self.rng.random() < 0.4:
            ranks = self.rng.sample(ranks, self.rng.randint(1, len(ranks)))
        self._advance_all(ranks, stages)

    def _advance_all(self, ranks: list[Rank], stages: int) -> None:
        for _ in range(stages):
            went_on = False
            for rank in ranks:
                if rank.slow and self.rng.randrange(rank.slow):
                    went_on |= rank.alive and not rank.hung and bool(rank.queue)  # later
                    continue
                went_on |= self.cluster.workers.advance(rank, self.cluster.now_s)
            if not went_on:
                return

    def _accepts(self) -> None:
        if (step := self.cluster.accepts()) is not None:
            self.suspicion.accepted(step)
            self.recovery.accepted()

    def _idle(self) -> None:
        if self.rng.random() < 0.3:
            self.cluster.scheduler.reset_prefix_cache()
        self.cluster.protection.sweep()
        self.invariants.check_kv()

    def _notices(self) -> bool:
        """A death, a failed step or silence is noticed, sooner or later."""
        dead = frozenset(rank.index for rank in self.cluster.workers.ranks if not rank.alive)
        if dead and self.rng.random() < 0.3:
            self.cluster.counts["losses noticed"] += len(dead)
            self.recovery.lost(dead, "its process has ended")
            return True
        if self.cluster.open_steps and self.rng.random() < 0.3 and self.recovery.raised():
            return True
        if self.rng.random() < 0.3 and self._sees_the_stopped():
            return True
        if self.cluster.open_steps and self.cluster.hanging and self.rng.random() < 0.1:
            return self._waits_for_the_hung()
        return False

    def _sees_the_stopped(self) -> bool:
        """While nothing is asked of the ranks nobody waits for them; the monitor looks at their processes all the same."""
        stopped = frozenset(rank.index for rank in self.cluster.hanging if rank.stopped)
        if not stopped or self.cluster.open_steps:
            return False
        self.cluster.counts["stopped ones found in idle time"] += len(stopped)
        self.recovery.lost(stopped, "stopped while idle")
        return True

    def _waits_for_the_hung(self) -> bool:
        """Whoever can go on goes on, until a deadline has passed."""
        found = self.suspicion.wait(self._until_nothing_moves)
        if found:
            self.cluster.counts["fenced by the detector"] += len(found)
            self.recovery.lost(found, "silent for too long")
        return True

    def _until_nothing_moves(self) -> bool:
        """What goes on while a deadline runs; whether the wait is over, since a step failed."""
        self._advance_all(self.cluster.workers.ranks, 100)
        self._accepts()
        return self.recovery.raised()

    def _keeper(self) -> None:
        keeper = self.cluster.keeper
        if not keeper.alive:
            keeper.restarts(self.cluster.now_s)
            self.cluster.counts["keeper restarts"] += 1
        elif keeper.hung and self.rng.random() < 0.3:
            self.cluster.now_s += HANG_S
            if keeper.overdue(self.cluster.now_s):
                keeper.restarts(self.cluster.now_s)
                self.cluster.counts["keeper restarts"] += 1
            else:
                keeper.hung = False
        else:
            keeper.goes_on(self.cluster.now_s)

    # -- the end ---------------------------------------------------------------------------------------

    def _quiet_end(self) -> None:
        """Nothing more goes wrong: everything recovers, every request ends as it should, and a last one is served."""
        self.recovery.fails.clear()
        self.recovery.newcomers_die = 0
        for rank in self.cluster.workers.ranks:
            rank.slow = rank.raises = 0
        self._comes_to_rest()
        last = self.cluster.arrives()
        self._comes_to_rest()
        if self.recovery.given_up:
            return
        if (shown := self.cluster.shown[last.name]) != last.answer():
            raise Violation(f"the last request is shown {shown}; without failures it is {last.answer()}")
        if self.cluster.hanging:
            raise Violation(f"the last request is served, and ranks hang: {self._unrest()}")
        self.invariants.check_kv()
        self._empties()

    def _comes_to_rest(self) -> None:
        """Until there is nothing to do. One that spins may be left: nobody waits for it before the next step does."""
        for _ in range(QUIET_EVENTS_MAX):
            if self.recovery.given_up or self._at_rest():
                return
            self._goes_on_quietly()
            self._event_is_over()
        raise Violation(f"not at rest {QUIET_EVENTS_MAX} events after the last fault: {self._unrest()}")

    def _at_rest(self) -> bool:
        cluster = self.cluster
        ranks_seen_well = all(rank.alive and not rank.stopped for rank in cluster.workers.ranks)
        idle = not cluster.scheduler.requests and not cluster.open_steps and not self.recovery.working
        return idle and ranks_seen_well and not cluster.keeper.busy and self.recovery.healthy

    def _unrest(self) -> str:
        cluster = self.cluster
        ranks = [(rank.index, rank.alive, rank.hung, rank.stage.value) for rank in cluster.workers.ranks]
        return (
            f"requests {sorted(cluster.scheduler.requests)}, {len(cluster.open_steps)} steps in flight, ranks {ranks}, "
            f"{len(cluster.keeper.jobs)} jobs, {self.recovery.machine.state.value}"
        )

    def _goes_on_quietly(self) -> None:
        cluster = self.cluster
        self._keeper()
        if self.recovery.working:
            self.recovery.goes_on()
        elif not self._notices():
            if self.recovery.healthy and cluster.may_send:
                cluster.sends()
            self._advance_all(cluster.workers.ranks, 8)
            self._accepts()

    def _empties(self) -> None:
        """Everything is given up: every frame comes back, but for those that could not be wiped."""
        cluster = self.cluster
        cluster.protection.manifest.drop_all()
        cluster.protection.compact()
        cluster.keeper.hung, cluster.keeper.refuses_wipes = False, 0
        while cluster.keeper.busy:
            self._keeper()
        frames = cluster.protection.manifest.pool
        withheld = cluster.counts["frames withheld"]
        if frames.free_count + withheld != frames.frames:
            raise Violation(
                f"{frames.free_count} of {frames.frames} frames came back, {withheld} are withheld"
            )


def run_seed(seed: int, *, trace: bool = False) -> Result:
    """Run the schedule of a seed. The same seed gives the same result."""
    return Schedule(seed, trace).run()
