"""Brings request state and KV of lost ranks back: decides per block, moves bytes in bounded batches.

A block comes from its mirror, or from survivors and parity. What cannot be rebuilt is given up: requests that
use it recompute from their tokens, the prefix cache forgets it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ghostserve.arena.control import Counter, Switch
from ghostserve.clock import monotonic_s
from ghostserve.engine import request_events
from ghostserve.engine.budget import REBUILD_BLOCKS
from ghostserve.engine.in_flight import unwritten, without
from ghostserve.engine.messages import RestoreReport, StateMessage
from ghostserve.engine.random_state import RandomState
from ghostserve.engine.request_state import stuck_in_prompt_logprobs
from ghostserve.recovery.plan import RecoveryPlan, needed_by_others
from ghostserve.recovery.plan import plan as choose
from ghostserve.shadow.restore import decide, restores
from ghostserve.shadow.unwritten import Unwritten

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildResult:
    """Counted by the newcomers (blocks, bytes) and the scheduler (tokens, requests)."""

    blocks_from_mirrors: int = 0
    blocks_from_parity: int = 0
    bytes_rebuilt: int = 0
    tokens_recomputed: int = 0
    requests_recomputed: int = 0
    requests_by_choice: int = 0  # of these: what could be rebuilt, and was slower to rebuild
    blocks_forgotten: int = 0  # only the prefix cache held them
    different_blocks: tuple[int, ...] = ()

    def plus(self, other: RebuildResult) -> RebuildResult:
        return RebuildResult(
            blocks_from_mirrors=self.blocks_from_mirrors + other.blocks_from_mirrors,
            blocks_from_parity=self.blocks_from_parity + other.blocks_from_parity,
            bytes_rebuilt=self.bytes_rebuilt + other.bytes_rebuilt,
            tokens_recomputed=self.tokens_recomputed + other.tokens_recomputed,
            requests_recomputed=self.requests_recomputed + other.requests_recomputed,
            requests_by_choice=self.requests_by_choice + other.requests_by_choice,
            blocks_forgotten=self.blocks_forgotten + other.blocks_forgotten,
            different_blocks=self.different_blocks + other.different_blocks,
        )

    def with_report(self, report: RestoreReport) -> RebuildResult:
        return self.plus(
            RebuildResult(
                blocks_from_mirrors=report.blocks_from_mirrors,
                blocks_from_parity=report.blocks_from_parity,
                bytes_rebuilt=report.bytes_rebuilt,
                different_blocks=report.different_blocks,
            )
        )


class Rebuild:
    """One pass over the state of one epoch."""

    def __init__(self, executor: Any, *, lost: frozenset[int], epoch: int) -> None:
        self._executor = executor
        self._session = executor.session
        self._guard = executor.session.guard
        self._page = executor.session.page
        self._lost = lost
        self._epoch = epoch
        self._every = range(executor.world_size)

    # -- state -----------------------------------------------------------------------------------------

    def roll_back(self, *, timeout_s: float) -> None:
        """Every rank takes on the request state after the last accepted step."""
        survivors = [rank for rank in self._every if rank not in self._lost]
        record = self._guard.random_record([*survivors, *sorted(self._lost)])
        if record is None and survivors:
            # What is sampled next may change, but never differ between the ranks.
            states = self._executor.ring.ask("ghost_random_state", ranks=self._every, timeout_s=timeout_s)
            record = states[survivors[0]]
        order = RandomState.decode(record).order if record is not None else []
        if self._page.get_switch(Switch.SKIP_RNG_RESTORE):
            record = None
        message = StateMessage(
            epoch=self._epoch, requests=self._executor.view.snapshot(order), random_state=record
        )
        self._executor.ring.ask("ghost_state", message, ranks=self._every, timeout_s=timeout_s)

    # -- KV --------------------------------------------------------------------------------------------

    def restore_kv(self, *, timeout_s: float) -> RebuildResult:
        """Restore every block that is still of use; recompute the requests of those that cannot be."""
        scheduler = self._session.scheduler
        if scheduler is None or self._page.get_switch(Switch.SKIP_RESTORE):
            return RebuildResult()
        coming = self._unwritten()
        needed, used = scheduler.needed_slots(self._executor.view, coming)
        with self._guard.held():
            result = self._restore_needed(needed, used, coming, timeout_s=timeout_s)
        # Blocks that nothing may read any more were not restored: on a newcomer they differ from what the manifest says.
        self._guard.sweep()
        return result

    def recompute_half_collected(self, *, timeout_s: float) -> RebuildResult:
        """Where no KV was lost: prompt log-probabilities collected so far went with the roll-back all the same."""
        scheduler = self._session.scheduler
        if scheduler is None:
            return RebuildResult()
        _, used = scheduler.needed_slots(self._executor.view, self._unwritten())
        return self._recompute(set(), used, RebuildResult(), timeout_s=timeout_s)

    def refuse(self, blocks: set[int], *, timeout_s: float) -> RebuildResult:
        """Their KV was found wrong and cannot be put right: who uses it recomputes, the prefix cache forgets it."""
        _, used = self._session.scheduler.needed_slots(self._executor.view, self._unwritten())
        return self._recompute(blocks, used, RebuildResult(), timeout_s=timeout_s)

    def _unwritten(self) -> Unwritten:
        return unwritten(
            self._executor.view, self._executor.open_steps, self._session.scheduler.block_sizes()
        )

    def _restore_needed(
        self,
        needed: dict[int, tuple[int, int]],
        used: dict[str, set[int]],
        coming: Unwritten,
        *,
        timeout_s: float,
    ) -> RebuildResult:
        with self._guard.lock:
            plan = decide(
                self._guard.manifest,
                {block: slots for block, (_, slots) in needed.items()},
                lost=self._lost,
                forced=self._page.get_switch(Switch.FORCE_RECOMPUTE),
            )
        for block, reason in plan.lost.items():
            logger.warning("block %d cannot be rebuilt: %s", block, reason)
        in_use = set().union(*used.values())
        costs = self._executor.watch.costs
        restorable = [block for block in plan.restored if block in in_use]
        chosen = self._choose(restorable, plan.lost.keys(), used, coming)
        began_s = monotonic_s()
        result, refused = self._restore_blocks(chosen.rebuilt, timeout_s=timeout_s)
        costs.learn_restore(len(chosen.rebuilt) * len(self._lost), monotonic_s() - began_s)
        result = result.plus(RebuildResult(requests_by_choice=len(chosen.by_choice)))
        cached, forgotten = self._restore_cached(set(plan.restored) - in_use, refused, timeout_s=timeout_s)
        result = result.plus(cached)
        if result.different_blocks:
            logger.error("restored blocks differ from what was lost: %s", result.different_blocks)
            self._page.add(Counter.SHADOW_ERRORS_TOTAL, len(result.different_blocks))
        gone = plan.lost.keys() | chosen.left.keys() | refused | forgotten
        return self._recompute(gone, used, result, timeout_s=timeout_s)

    def _choose(
        self, restorable: Sequence[int], lost: Collection[int], used: dict[str, set[int]], coming: Unwritten
    ) -> RecoveryPlan:
        """What of it is worth rebuilding."""
        contexts = self._session.scheduler.contexts(coming)
        costs = self._executor.watch.costs
        by_choice = self._executor.settings.config.recovery_plan == "fastest" and costs.known
        chosen = choose(
            contexts,
            restorable,
            lost,
            others=needed_by_others(contexts, used),
            prefix_cache=bool(self._executor.vllm_config.cache_config.enable_prefix_caching),
            costs=costs if by_choice else None,
        )
        for request, reason in chosen.by_choice.items():
            logger.warning("request %s computes its context again, that is faster: %s", request, reason)
        return chosen

    def _restore_blocks(self, blocks: Sequence[int], *, timeout_s: float) -> tuple[RebuildResult, set[int]]:
        """On every lost rank; also returns the blocks whose checksum did not hold."""
        result = RebuildResult()
        refused: set[int] = set()
        for rank in sorted(self._lost):
            for batch in self._batches(blocks):
                report = self._restore_batch(rank, batch, timeout_s=timeout_s)
                result = result.with_report(report)
                refused.update(report.refused)
        return result, refused

    def _restore_cached(
        self, blocks: set[int], refused: set[int], *, timeout_s: float
    ) -> tuple[RebuildResult, set[int]]:
        """What only the prefix cache holds, the latest used first. Streams that wait for us do not wait for all of it:
        the rest is forgotten, and computed again where it is asked for. Returns that, too.
        """
        within_s = self._executor.settings.config.restore_cached_within
        until_s = monotonic_s() + within_s if self._session.scheduler.requests else math.inf
        order = [block for block in self._guard.latest_cached_first() if block in blocks]
        order += sorted(blocks.difference(order))  # about to be free
        result = RebuildResult()
        for batch in self._batches(order):
            if monotonic_s() > until_s:
                break
            report, wrong = self._restore_blocks(batch, timeout_s=timeout_s)
            result, blocks = result.plus(report), blocks - set(batch)
            refused.update(wrong)
        if blocks:
            logger.warning(
                "%d blocks that only the prefix cache held are forgotten: no time for them", len(blocks)
            )
        return result.plus(RebuildResult(blocks_forgotten=len(blocks))), blocks

    def _batches(self, blocks: Sequence[int]) -> Iterable[Sequence[int]]:
        for first in range(0, len(blocks), REBUILD_BLOCKS):
            yield blocks[first : first + REBUILD_BLOCKS]

    def _restore_batch(self, rank: int, batch: Sequence[int], *, timeout_s: float) -> RestoreReport:
        """Survivors export what the parity needs, then the newcomer adopts."""
        survivors = [r for r in self._every if r not in self._lost]
        with self._guard.lock:
            items = restores(
                self._guard.manifest,
                batch,
                rank=rank,
                survivors=survivors,
                reserve=self._guard.export_frames(),
            )
        coded = [item for item in items if item.survivors]
        try:
            if coded:
                self._executor.ring.ask("ghost_export", coded, ranks=self._every, timeout_s=timeout_s)
            reports = self._executor.ring.ask(
                "ghost_adopt", rank, items, ranks=self._every, timeout_s=timeout_s
            )
        finally:
            if coded:
                self._guard.wipe_exports()
        report: RestoreReport = reports[rank]
        return report

    def _recompute(
        self, lost_blocks: set[int], used: dict[str, set[int]], result: RebuildResult, *, timeout_s: float
    ) -> RebuildResult:
        """Rung 3 for the requests that use a block which is gone."""
        view = self._executor.view
        coming = self._unwritten()
        affected = {name for name, blocks in used.items() if blocks & lost_blocks}
        affected |= {name for name in stuck_in_prompt_logprobs(view) if name in used}
        for block in lost_blocks:
            with self._guard.lock:
                self._guard.manifest.drop(block)
        if not affected and not lost_blocks:
            return result
        affected = coming.with_sharers(affected, used)
        tokens = _count_recomputed(self._session, affected, coming)
        reason = (
            f"{len(lost_blocks)} KV blocks were not rebuilt" if lost_blocks else "log-probabilities are gone"
        )
        scheduler = self._session.scheduler
        request_events.recomputed(self._page.events, scheduler, affected, coming.scheduled, reason)
        leave_steps(self._executor, affected, coming, lost_blocks)
        self.roll_back(timeout_s=timeout_s)
        if affected:
            logger.warning("recomputing %d requests, %d tokens", len(affected), tokens)
        return result.plus(RebuildResult(tokens_recomputed=tokens, requests_recomputed=len(affected)))


def _count_recomputed(session: Any, requests: set[str], coming: Unwritten) -> int:
    """What these requests have in their KV, before they start over; counted and returned."""
    tokens = sum(
        request.num_computed_tokens - coming.scheduled.get(request.request_id, 0)
        for request in session.scheduler.running
        if request.request_id in requests
    )
    session.page.add(Counter.TOKENS_RECOMPUTED_TOTAL, tokens)
    session.page.add(Counter.REQUESTS_RECOMPUTED_TOTAL, len(requests))
    return tokens


def leave_steps(executor: Any, requests: set[str], coming: Unwritten, lost_blocks: set[int]) -> None:
    """Take requests out of every step in flight and out of the batch; those that go on start over from their tokens."""
    gone = coming.blocks(requests).keys()
    guard, view = executor.session.guard, executor.view
    executor.session.scheduler.recompute(requests, forget=lost_blocks | gone, known=view.requests)
    for step in executor.open_steps:
        step.pieces = guard.without_blocks(step.pieces, gone)
        step.sent = without(step.sent, requests)
    view.leave_batch(requests)


def give_up_steps(executor: Any, *, failing: set[str]) -> None:
    """No step in flight will run. Of their requests those that are not `failing` start over from their tokens."""
    scheduler, guard, view = executor.session.scheduler, executor.session.guard, executor.view
    coming = unwritten(view, executor.open_steps, scheduler.block_sizes())
    _, used = scheduler.needed_slots(view, coming)
    requests = coming.with_sharers(coming.scheduled.keys(), used) - failing
    gone = coming.blocks().keys()
    events, reason = executor.session.page.events, "its step was given up for another request"
    request_events.recomputed(events, scheduler, requests, coming.scheduled, reason)
    _count_recomputed(executor.session, requests, coming)
    scheduler.recompute(requests, forget=gone, known=view.requests)
    for step in executor.open_steps:
        guard.withdraw(step.pieces, gone)
        scheduler.tell_again(step.scheduler_output)
    view.leave_batch(requests)
