"""What the workers know of each request, kept where it survives them: in the engine core.

`WorkersView` follows the same increments the workers follow, so that at a loss it can say exactly what every rank knew
before the failed step. `runner_v1.py` and `runner_v2.py` put that back in each rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ghostserve.engine.messages import RequestSnapshot
from ghostserve.engine.random_state import short_id
from ghostserve.shadow.step_plan import RequestStep, StepIncrement


def increment_of(scheduler_output: Any) -> StepIncrement:
    """A step's KV increments, from vLLM's SchedulerOutput."""
    scheduled = scheduler_output.num_scheduled_tokens
    requests = [
        RequestStep(
            request_id=new.req_id,
            computed=new.num_computed_tokens,
            scheduled=scheduled[new.req_id],
            blocks=tuple(tuple(blocks) for blocks in new.block_ids),
            replaces=True,
        )
        for new in scheduler_output.scheduled_new_reqs
    ]
    cached = scheduler_output.scheduled_cached_reqs
    for request_id, computed, blocks in zip(
        cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
    ):
        requests.append(
            RequestStep(
                request_id=request_id,
                computed=computed,
                scheduled=scheduled[request_id],
                blocks=None if blocks is None else tuple(tuple(ids) for ids in blocks),
                replaces=request_id in cached.resumed_req_ids,
            )
        )
    copies = scheduler_output.kv_cache_block_copies or ()
    return StepIncrement(
        requests=tuple(requests),
        finished=frozenset(scheduler_output.finished_req_ids),
        copied_blocks=tuple(copy.dst_block_id for copy in copies),
        zeroed_blocks=tuple(scheduler_output.new_block_ids_to_zero or ()),
    )


@dataclass(slots=True, kw_only=True)
class KnownRequest:
    """One request as the workers know it."""

    new_data: Any
    block_ids: tuple[list[int], ...]
    computed_tokens: int  # as the last step that named it began
    scheduled_tokens: int = 0  # of that step
    output_token_ids: list[int] = field(default_factory=list)
    prefill_tokens: int | None = None  # Model Runner V2: tokens it was (re)started with
    in_batch: bool = True
    preempted: bool = False  # Model Runner V2 has forgotten it, and is told of it anew

    @property
    def reached_tokens(self) -> int:
        """Tokens whose KV there is now."""
        return self.computed_tokens + self.scheduled_tokens


@dataclass(slots=True)
class WorkersView:
    """The workers' request state after the last accepted step."""

    requests: dict[str, KnownRequest] = field(default_factory=dict)

    def accept(self, scheduler_output: Any, model_output: Any) -> None:
        """Advance by one accepted step, as each worker's own update does."""
        for request_id in scheduler_output.finished_req_ids:
            self.requests.pop(request_id, None)
        scheduled = scheduler_output.num_scheduled_tokens
        for request_id, request in self.requests.items():
            request.in_batch = request_id in scheduled
            request.preempted &= not request.in_batch
        for request_id in scheduler_output.preempted_req_ids or ():
            if request_id in self.requests:
                self.requests[request_id].preempted = request_id not in scheduled
        for new in scheduler_output.scheduled_new_reqs:
            self.introduce(new)
        cached = scheduler_output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            self._advance(cached, index, self.requests[request_id], request_id in cached.resumed_req_ids)
        for request_id, tokens in scheduled.items():
            self.requests[request_id].scheduled_tokens = tokens
        for request_id, tokens in zip(
            model_output.req_ids, model_output.sampled_token_ids or (), strict=False
        ):
            self.requests[request_id].output_token_ids.extend(tokens)

    def introduce(self, new: Any) -> None:
        """A request the workers are told of for the first time, or (Model Runner V2) anew after a preemption."""
        prefill = new.prefill_token_ids
        self.requests[new.req_id] = KnownRequest(
            new_data=new,
            block_ids=tuple(list(ids) for ids in new.block_ids),
            computed_tokens=new.num_computed_tokens,
            output_token_ids=[] if prefill is None else list(prefill[new.prompt_len :]),
            prefill_tokens=None if prefill is None else len(prefill),
        )

    def leave_batch(self, request_ids: Iterable[str]) -> None:
        """These are known but hold no row until they are scheduled again."""
        for request_id in request_ids:
            if request_id in self.requests:
                self.requests[request_id].in_batch = False

    @staticmethod
    def _advance(cached: Any, index: int, request: KnownRequest, resumed: bool) -> None:
        request.computed_tokens = cached.num_computed_tokens[index]
        del request.output_token_ids[cached.num_output_tokens[index] :]
        new_blocks = cached.new_block_ids[index]
        if resumed:
            request.block_ids = tuple(list(ids) for ids in new_blocks)
        elif new_blocks is not None:
            for known, new in zip(request.block_ids, new_blocks, strict=True):
                known.extend(new)

    def snapshot(self, order: Sequence[bytes]) -> list[RequestSnapshot]:
        """All requests, those in the batch first and in row order (`short_id`s)."""
        batched = {short_id(name): name for name, known in self.requests.items() if known.in_batch}
        rows = [batched.pop(row) for row in order if row in batched]
        rows += batched.values()
        rest = [name for name, known in self.requests.items() if not known.in_batch]
        return [self._snapshot(name) for name in (*rows, *rest)]

    def _snapshot(self, request_id: str) -> RequestSnapshot:
        known = self.requests[request_id]
        return RequestSnapshot(
            new_data=known.new_data,
            block_ids=tuple(list(ids) for ids in known.block_ids),
            computed_tokens=known.computed_tokens,
            reached_tokens=known.reached_tokens,
            output_token_ids=list(known.output_token_ids),
            prefill_tokens=known.prefill_tokens,
            in_batch=known.in_batch,
            preempted=known.preempted,
        )


def stuck_in_prompt_logprobs(view: WorkersView) -> Iterable[str]:
    """Requests whose prompt log-probabilities are half collected: only a recompute can collect them again."""
    for name, known in view.requests.items():
        params, prompt = known.new_data.sampling_params, known.new_data.prompt_token_ids or ()
        if params is None or (params.prompt_logprobs is None and params.prompt_logprob_token_ids is None):
            continue
        if 0 < known.reached_tokens < len(prompt):
            yield name
