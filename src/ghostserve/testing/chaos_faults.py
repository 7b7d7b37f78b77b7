"""Which fault comes next in a chaos run, and when. Pure: the generator of random numbers is an argument.

A recipe makes a plan for one kind, timed at random; some kinds come with a loss, since they show only then. Kinds are
drawn so that all of them come up about as often.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ghostserve.arena.fault_kinds import NEWCOMER_POINTS, SURVIVOR_POINTS, FaultKind
from ghostserve.testing.fault_plan import FaultPlan
from ghostserve.testing.fault_runner import LOSING
from ghostserve.types import Decision

KEEPER_KINDS = frozenset({FaultKind.KEEPER_CRASH, FaultKind.KEEPER_HANG})
KEEPER_REST_S = 15.0  # a keeper that dies more than five times in a minute is given up, as it should be
STEPS_MAX = 25
IN_RECOVERY_SHARE = 0.25  # of losses, those that come with a second one in their recovery


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """One plan, and what its kind is counted as."""

    kind: FaultKind
    plan: FaultPlan

    @property
    def is_single_loss(self) -> bool:
        """One rank is lost once and nothing else is wrong: its KV can be rebuilt, all of it."""
        return len(self.plan.faults) == 1 and (self.plan.faults[0].kind in LOSING or self.plan.faults[0].dies)


def choose(
    rng: random.Random,
    *,
    done: Mapping[FaultKind, int],
    kinds: Collection[FaultKind],
    ranks: int,
    keeper_rested: bool,
) -> Decision[Injection]:
    """The next injection: of a kind that came up least so far, so that every run has all of them. One must be strikable."""
    possible = strikable(kinds, keeper_rested=keeper_rested)
    fewest = min(done.get(kind, 0) for kind in possible)
    kind = rng.choice([kind for kind in possible if done.get(kind, 0) == fewest])
    plan = _RECIPES[kind](rng, ranks)
    return Decision(
        choice=Injection(kind=kind, plan=plan), reason=f"{kind.value} came up {done.get(kind, 0)} times"
    )


def strikable(kinds: Collection[FaultKind], *, keeper_rested: bool) -> list[FaultKind]:
    """Those that may strike now; none, if only keepers are to suffer and one has just done so."""
    return [kind for kind in kinds if keeper_rested or kind not in KEEPER_KINDS]


def counted(plans: Collection[FaultPlan]) -> Counter[FaultKind]:
    """How often each kind is in these plans."""
    return Counter(fault.kind for plan in plans for fault in plan.faults)


# -- recipes -------------------------------------------------------------------------------------------

Recipe = Callable[[random.Random, int], FaultPlan]


def _timed(rng: random.Random, plan: FaultPlan) -> FaultPlan:
    """At once, wherever the step is by then, or at the beginning of a step soon."""
    return plan if rng.random() < 0.5 else plan.at_step(rng.randint(1, STEPS_MAX))


def _loss(kind: FaultKind) -> Recipe:
    """The rank is lost by this kind; now and then another one, or its replacement, is lost meanwhile."""

    def recipe(rng: random.Random, ranks: int) -> FaultPlan:
        rank = rng.randrange(ranks)
        plan = _timed(rng, _word(FaultPlan(), kind, rank))
        if rng.random() >= IN_RECOVERY_SHARE:
            return plan
        second = rng.randrange(ranks)
        phases = NEWCOMER_POINTS if second == rank else SURVIVOR_POINTS
        # Not each recovery comes by everywhere: where all is mirrored nothing is exported. Then it does not count.
        phase = rng.choice(list(phases))
        return plan.then.crash(rank=second).in_recovery(phase.value)

    return recipe


def _word(plan: FaultPlan, kind: FaultKind, rank: int) -> FaultPlan:
    word: Callable[..., FaultPlan] = getattr(plan, kind.value)
    return word(rank=rank)


def _exception(rng: random.Random, ranks: int) -> FaultPlan:
    return FaultPlan().exception(rank=rng.randrange(ranks)).at_step(rng.randint(1, STEPS_MAX))


def _slow(rng: random.Random, ranks: int) -> FaultPlan:
    return FaultPlan().slow(rank=rng.randrange(ranks), factor=rng.randint(2, 6), steps=rng.randint(3, 15))


def _corrupt_kv(rng: random.Random, ranks: int) -> FaultPlan:
    """With a true oracle: the rank dies before anybody reads what it holds."""
    return FaultPlan().corrupt_kv(rank=rng.randrange(ranks), dies=True).at_step(rng.randint(1, STEPS_MAX))


def _corrupt_mirror(rng: random.Random, ranks: int) -> FaultPlan:
    rank, step = rng.randrange(ranks), rng.randint(1, STEPS_MAX)
    plan = FaultPlan().corrupt_mirror(rank=rank).at_step(step)
    return plan if rng.random() < 0.3 else plan.then.crash(rank=rank).at_step(rng.randint(1, 5))


def _corrupt_parity(rng: random.Random, ranks: int) -> FaultPlan:
    return FaultPlan().corrupt_parity().crash(rank=rng.randrange(ranks)).at_step(rng.randint(20, 45))


def _keeper(kind: FaultKind) -> Recipe:
    def recipe(rng: random.Random, ranks: int) -> FaultPlan:
        word: Callable[[], FaultPlan] = getattr(FaultPlan(), kind.value)
        plan = word()
        if rng.random() < 0.5:
            plan = plan.crash(rank=rng.randrange(ranks)).at_step(rng.randint(1, STEPS_MAX))
        return plan

    return recipe


def _arena_write_failure(rng: random.Random, ranks: int) -> FaultPlan:
    rank, step = rng.randrange(ranks), rng.randint(1, STEPS_MAX)
    plan = FaultPlan().arena_write_failure(rank=rank).at_step(step)
    return (
        plan if rng.random() < 0.3 else plan.then.crash(rank=rng.randrange(ranks)).at_step(rng.randint(1, 10))
    )


def _memory_exhausted(rng: random.Random, ranks: int) -> FaultPlan:
    steps = rng.randint(10, 40)
    plan = FaultPlan().memory_exhausted(steps=steps)
    return (
        plan if rng.random() < 0.3 else plan.crash(rank=rng.randrange(ranks)).at_step(rng.randint(5, steps))
    )


def _standby_dead(rng: random.Random, ranks: int) -> FaultPlan:
    plan = FaultPlan().standby_dead()
    return plan if rng.random() < 0.5 else plan.then.crash(rank=rng.randrange(ranks))


def _client_gone(rng: random.Random, ranks: int) -> FaultPlan:
    """Whose stream, and at which of its tokens, is left to chance."""
    plan = FaultPlan().client_gone(at_token=1)
    return plan if rng.random() < 0.5 else plan.crash(rank=rng.randrange(ranks)).at_step(rng.randint(1, 4))


_RECIPES: dict[FaultKind, Recipe] = {
    **{kind: _loss(kind) for kind in LOSING},
    FaultKind.EXCEPTION: _exception,
    FaultKind.SLOW: _slow,
    FaultKind.CORRUPT_KV: _corrupt_kv,
    FaultKind.CORRUPT_MIRROR: _corrupt_mirror,
    FaultKind.CORRUPT_PARITY: _corrupt_parity,
    FaultKind.KEEPER_CRASH: _keeper(FaultKind.KEEPER_CRASH),
    FaultKind.KEEPER_HANG: _keeper(FaultKind.KEEPER_HANG),
    FaultKind.ARENA_WRITE_FAILURE: _arena_write_failure,
    FaultKind.MEMORY_EXHAUSTED: _memory_exhausted,
    FaultKind.STANDBY_DEAD: _standby_dead,
    FaultKind.CLIENT_GONE: _client_gone,
}
