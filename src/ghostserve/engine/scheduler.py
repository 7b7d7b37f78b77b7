"""vLLM's scheduler, plus the shadow's plan on each step and the recipe for recomputing selected requests.

Mutating the scheduler is the main thread's alone while a step is open, that is from `schedule()` to the end of
`update_from_output()`; a recovery in idle time holds the same lock.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput

from ghostserve.arena.control import Counter
from ghostserve.clock import monotonic_s
from ghostserve.engine import session

logger = logging.getLogger(__name__)


class FailedStep(ModelRunnerOutput):
    """Stands for the output of a step that was given up: its requests end with an error."""

    @classmethod
    def of(cls, scheduler_output: Any) -> FailedStep:
        """For all requests of this step."""
        names = list(scheduler_output.num_scheduled_tokens)
        return cls(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[] for _ in names],
        )


class GhostScheduler(Scheduler):
    """The stock synchronous scheduler with our plan attached to what it hands out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._session = session.current()
        self._session.attach_scheduler(self)
        self.open = False

    # -- the step --------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        with self._session.lock:
            self.open = True
            output = super().schedule(throttle_prefills)
            output.ghost_pieces = self._session.guard.plan(output)
            return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        with self._session.lock:
            if isinstance(model_runner_output, FailedStep):
                self._fail_requests(scheduler_output, model_runner_output)
            outputs = super().update_from_output(scheduler_output, model_runner_output)
            self.open = False
            self._count_open()
            return outputs

    def _fail_requests(self, scheduler_output: Any, failed_step: FailedStep) -> None:
        """End the requests of a step that was given up with an error."""
        failed = set(failed_step.req_ids)
        self._session.count_failed_requests(len(failed))
        self.grammar_compile_error_reqs.update(failed)
        # The workers were never told, or were rolled back to before they were.
        self.finished_req_ids |= scheduler_output.finished_req_ids

    # -- other ways in ---------------------------------------------------------------------------------

    def add_request(self, request: Any) -> None:
        with self._session.lock:
            super().add_request(request)
            self._count_open()

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        with self._session.lock:
            finished = super().finish_requests(request_ids, finished_status)
            self._count_open()
            return finished

    def _count_open(self) -> None:
        self._session.page.set(Counter.REQUESTS_OPEN, len(self.requests))

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        with self._session.lock:
            done: bool = super().reset_prefix_cache(*args, **kwargs)
            self._session.guard.sweep()
            return done

    # -- after a loss ----------------------------------------------------------------------------------

    def needed_slots(self, open_step: Any | None) -> tuple[dict[int, tuple[int, int]], dict[str, set[int]]]:
        """What must be restored: (block -> (group, written slots)), and the blocks each running request uses.

        `open_step`: the step that was interrupted; what it was to write was not written, also not for those
        that found it in the prefix cache, which knows a block as soon as it is scheduled.
        """
        needed: dict[int, tuple[int, int]] = {}
        used: dict[str, set[int]] = {}
        scheduled = {} if open_step is None else open_step.num_scheduled_tokens
        unwritten = self.unwritten_blocks(open_step, set(scheduled))
        sizes = [group.kv_cache_spec.block_size for group in self.kv_cache_config.kv_cache_groups]
        for request in self.running:
            computed = request.num_computed_tokens - scheduled.get(request.request_id, 0)
            mine = used.setdefault(request.request_id, set())
            tables = self.kv_cache_manager.get_block_ids(request.request_id)
            for group, (size, blocks) in enumerate(zip(sizes, tables, strict=True)):
                for index, block in enumerate(blocks):
                    slots = min(max(computed - index * size, 0), size)
                    if block == self.kv_cache_manager.block_pool.null_block.block_id or slots == 0:
                        continue
                    mine.add(block)
                    slots = min(slots, unwritten.get(block, slots))
                    if slots:
                        needed[block] = (group, max(slots, needed.get(block, (group, 0))[1]))
        self._add_cached(needed, sizes, unwritten.keys())
        return needed, used

    def _add_cached(
        self, needed: dict[int, tuple[int, int]], sizes: list[int], unwritten: Collection[int]
    ) -> None:
        """Blocks that only the prefix cache holds are data too: as far as their hash covers them."""
        groups = self._session.groups_of_blocks()
        for block in self.kv_cache_manager.block_pool.blocks:
            if block.block_hash is None or block.block_id in needed or block.block_id in unwritten:
                continue
            group = groups.get(block.block_id, 0)
            needed[block.block_id] = (group, min(block.block_hash_num_tokens or sizes[group], sizes[group]))

    def recompute(
        self, request_ids: Collection[str], lost_blocks: Iterable[int], open_step: Any | None
    ) -> SchedulerOutput | None:
        """Rung 3: these running requests start over from their tokens; nothing they showed is taken back.

        Returns the interrupted step without them, to be sent to the workers; the engine core keeps the
        original, whose output for them is dropped. (Steps as in the stock forced preemption.)
        """
        removed = set(request_ids)
        self.evict_unwritten(open_step, removed)
        self.kv_cache_manager.evict_blocks(set(lost_blocks))
        now_s = monotonic_s()
        for request in reversed([request for request in self.running if request.request_id in removed]):
            self.running.remove(request)
            self._preempt_request(request, now_s, drop_stale_output=True)
            self.prev_step_scheduled_req_ids.discard(request.request_id)
        return None if open_step is None else _without(open_step, removed)

    def evict_unwritten(self, open_step: Any | None, request_ids: set[str] | None = None) -> None:
        """The prefix cache forgets what the step was to write, for these requests or for all."""
        if open_step is not None:
            wanted = set(open_step.num_scheduled_tokens) if request_ids is None else request_ids
            self.kv_cache_manager.evict_blocks(set(self.unwritten_blocks(open_step, wanted)))

    def unwritten_blocks(self, open_step: Any | None, request_ids: set[str]) -> dict[int, int]:
        """Blocks that the step was to write for these requests -> slots written before it.

        The prefix cache knows them already by hash.
        """
        if open_step is None:
            return {}
        unwritten: dict[int, int] = {}
        sizes = [group.kv_cache_spec.block_size for group in self.kv_cache_config.kv_cache_groups]
        for request_id, scheduled in open_step.num_scheduled_tokens.items():
            request = self.requests.get(request_id)
            if request is None or request_id not in request_ids:
                continue
            first = request.num_computed_tokens - scheduled
            tables = self.kv_cache_manager.get_block_ids(request_id)
            for size, blocks in zip(sizes, tables, strict=True):
                for index in range(max(first, 0) // size, len(blocks)):
                    unwritten[blocks[index]] = max(first - index * size, 0)
        unwritten.pop(self.kv_cache_manager.block_pool.null_block.block_id, None)
        return unwritten


def _without(output: SchedulerOutput, removed: set[str]) -> SchedulerOutput:
    """A copy of a step without some of its requests."""
    cached = output.scheduled_cached_reqs
    keep = [index for index, name in enumerate(cached.req_ids) if name not in removed]
    scheduled = {name: count for name, count in output.num_scheduled_tokens.items() if name not in removed}
    return dataclasses.replace(
        output,
        scheduled_new_reqs=[new for new in output.scheduled_new_reqs if new.req_id not in removed],
        scheduled_cached_reqs=dataclasses.replace(
            cached,
            req_ids=[cached.req_ids[index] for index in keep],
            resumed_req_ids=cached.resumed_req_ids - removed,
            new_token_ids=[cached.new_token_ids[index] for index in keep] if cached.new_token_ids else [],
            all_token_ids={name: ids for name, ids in cached.all_token_ids.items() if name not in removed},
            new_block_ids=[cached.new_block_ids[index] for index in keep],
            num_computed_tokens=[cached.num_computed_tokens[index] for index in keep],
            num_output_tokens=[cached.num_output_tokens[index] for index in keep],
        ),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
    )
