"""vLLM's scheduler, plus the shadow's plan on each step and the recipe for recomputing selected requests.

Mutating the scheduler is the main thread's alone while a step is open, that is from `schedule()` to the end of its
`update_from_output()`; a recovery in idle time holds the same lock.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from ghostserve.arena.control import Counter, FaultAction, FaultPoint
from ghostserve.clock import monotonic_s
from ghostserve.engine import request_events, session
from ghostserve.engine.drought import ENGINE_RANK
from ghostserve.engine.request_state import WorkersView
from ghostserve.recovery.plan import Context
from ghostserve.shadow.commit_rule import defers_frees
from ghostserve.shadow.step_plan import NULL_BLOCK
from ghostserve.shadow.unwritten import CachedBlock, Tables, Unwritten

logger = logging.getLogger(__name__)


class FailedStep(ModelRunnerOutput):
    """Stands for the output of a step that was given up: its requests end with an error."""

    @classmethod
    def of(cls, names: Sequence[str]) -> FailedStep:
        """For these requests; others of the step are answered elsewhere."""
        return cls(
            req_ids=list(names),
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[] for _ in names],
        )


class GhostSchedulerMixin(Scheduler):
    """What we add to a stock scheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.defer_block_free = defers_frees(self.vllm_config.max_concurrent_batches).choice
        self._session = session.current()
        self._session.attach_scheduler(self)
        self._open_steps = 0

    # -- the step --------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        with self._session.lock:
            self._open_steps += 1
            output = super().schedule(throttle_prefills)
            if output.total_num_scheduled_tokens:
                self._pause_if_armed()
            output.ghost_pieces = self._session.guard.plan(output)
            return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        with self._session.lock:
            if isinstance(model_runner_output, FailedStep):
                self._fail_requests(model_runner_output)
            outputs = super().update_from_output(scheduler_output, model_runner_output)
            self._open_steps -= 1
            self._count_open()
            return outputs

    def _pause_if_armed(self) -> None:
        """As vLLM's `POST /pause?mode=keep`, but by the number of the step: a client that asks for it may be late."""
        fault = self._session.page.take_fault(FaultPoint.SCHEDULED, ENGINE_RANK)
        if fault is not None and fault.action is FaultAction.PAUSE:
            self.set_pause_state(PauseState.PAUSED_ALL)

    @property
    def open(self) -> bool:
        """Whether a step was scheduled whose output is not processed yet: then the main thread is the owner."""
        return self._open_steps > 0

    def _fail_requests(self, failed_step: FailedStep) -> None:
        """End the requests of a step that was given up with an error."""
        failed = set(failed_step.req_ids)
        self._session.count_failed_requests(len(failed))
        self.grammar_compile_error_reqs.update(failed)

    # -- other ways in ---------------------------------------------------------------------------------

    def add_request(self, request: Any) -> None:
        with self._session.lock:
            super().add_request(request)
            self._count_open()
            request_events.admitted(self._session.page.events, request)

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        with self._session.lock:
            finished = super().finish_requests(request_ids, finished_status)
            self._count_open()
            return finished

    def _free_request(self, request: Any, delay_free_blocks: bool = False) -> Any:
        """Stock vLLM's last word about a request, whatever it ended by: its status says so by then."""
        request_events.ended(self._session.page.events, request)
        return super()._free_request(request, delay_free_blocks)

    def _count_open(self) -> None:
        self._session.page.set(Counter.REQUESTS_OPEN, len(self.requests))

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        with self._session.lock:
            done: bool = super().reset_prefix_cache(*args, **kwargs)
            self._session.guard.sweep()
            return done

    # -- after a loss ----------------------------------------------------------------------------------

    def needed_slots(
        self, view: WorkersView, unwritten: Unwritten
    ) -> tuple[dict[int, tuple[int, int]], dict[str, set[int]]]:
        """What must be restored: (block -> (group, written slots)), and the blocks each request uses."""
        running = (
            (request.request_id, request.num_computed_tokens, self._tables(request.request_id))
            for request in self.running
        )
        users = unwritten.users(running, lambda name: self._as_workers_know(view, name))
        return unwritten.needed_slots(users, self._cached(), self.block_sizes())

    def contexts(self, unwritten: Unwritten) -> list[Context]:
        """What each running request has in its KV, without what steps in flight are to write."""
        return [
            Context(
                request=request.request_id,
                tokens=request.num_computed_tokens - unwritten.scheduled.get(request.request_id, 0),
                tables=self._tables(request.request_id),
                block_sizes=self.block_sizes(),
            )
            for request in self.running
        ]

    def _tables(self, request_id: str) -> Tables:
        tables: Tables = self.kv_cache_manager.get_block_ids(request_id)
        return tables

    def _as_workers_know(self, view: WorkersView, request_id: str) -> tuple[int, Tables]:
        """Tokens with KV and block tables of a request that only a step in flight names."""
        known = view.requests[request_id]
        managers = self.kv_cache_manager.coordinator.single_type_managers
        # Blocks that left a sliding window are others' by now; the scheduler does not tell workers.
        skipped = [manager.get_num_skipped_tokens(known.reached_tokens) for manager in managers]
        return known.reached_tokens, [
            [NULL_BLOCK] * (first // size) + ids[first // size :]
            for ids, first, size in zip(known.block_ids, skipped, self.block_sizes(), strict=True)
        ]

    def block_sizes(self) -> tuple[int, ...]:
        """Tokens per block, by KV group."""
        return tuple(group.kv_cache_spec.block_size for group in self.kv_cache_config.kv_cache_groups)

    def _cached(self) -> Iterator[CachedBlock]:
        """What the prefix cache knows is data, too: as far as the hash of a block covers it."""
        groups, sizes = self._session.groups_of_blocks(), self.block_sizes()
        for block in self.kv_cache_manager.block_pool.blocks:
            if block.block_hash is not None:
                group = groups.get(block.block_id, 0)
                slots = min(block.block_hash_num_tokens or sizes[group], sizes[group])
                yield CachedBlock(block=block.block_id, group=group, slots=slots)

    def recompute(
        self, request_ids: Collection[str], *, forget: Collection[int], known: Collection[str]
    ) -> None:
        """Rung 3: these requests start over from their tokens; nothing they showed is taken back.

        What steps in flight answer for them is dropped. The prefix cache forgets the blocks `forget`. Requests that are
        not `known` to the workers start as new ones. (Otherwise as in the stock forced preemption.)
        """
        removed = set(request_ids)
        self.kv_cache_manager.evict_blocks(set(forget))
        now_s = monotonic_s()
        for request in reversed([request for request in self.running if request.request_id in removed]):
            self.running.remove(request)
            self._preempt_request(request, now_s, drop_stale_output=True)
            self.prev_step_scheduled_req_ids.discard(request.request_id)
        for name in removed & self.requests.keys():
            request = self.requests[name]
            if request.num_stale_output_tokens:  # an answer is on its way
                request.drop_stale_output = True
            if request.status is RequestStatus.PREEMPTED and name not in known:
                request.status = RequestStatus.WAITING

    def tell_again(self, scheduler_output: Any) -> None:
        """A step that will not run was to tell the workers who has left: the next one does."""
        self.finished_req_ids |= scheduler_output.finished_req_ids
        self.reset_preempted_req_ids |= scheduler_output.preempted_req_ids or set()


class GhostScheduler(GhostSchedulerMixin, Scheduler):
    """The stock synchronous scheduler with our plan attached to what it hands out."""


class GhostAsyncScheduler(GhostSchedulerMixin, AsyncScheduler):
    """The stock asynchronous scheduler with our plan attached to what it hands out."""


def make_scheduler(*args: Any, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """Ours for this configuration; vLLM calls what `--scheduler-cls` names as if it were a class."""
    kind = GhostAsyncScheduler if vllm_config.scheduler_config.async_scheduling else GhostScheduler
    return kind(*args, vllm_config=vllm_config, **kwargs)
