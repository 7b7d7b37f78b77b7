"""What the workers know of each request, kept where it survives them, and put back after a loss.

`WorkersView` runs in the engine core: it follows the same increments the workers follow, so that at a loss it
can say exactly what every rank knew before the failed step. `restore_requests` runs in each rank (Model Runner
V1) and rolls survivors back and brings newcomers up alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.sampling_params import SamplingType
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from ghostserve.engine.messages import RequestSnapshot, StateMessage
from ghostserve.engine.random_state import RandomState, short_id
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
    in_batch: bool = True

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

    def introduce(self, new: Any, *, in_batch: bool = True) -> None:
        """A request the workers are told of for the first time (or, unbatched, were about to be)."""
        self.requests[new.req_id] = KnownRequest(
            new_data=new,
            block_ids=tuple(list(ids) for ids in new.block_ids),
            computed_tokens=new.num_computed_tokens,
            in_batch=in_batch,
        )

    def leave_batch(self, request_ids: Iterable[str]) -> None:
        """These are known but hold no row until they are scheduled again."""
        for request_id in request_ids:
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
            in_batch=known.in_batch,
        )


def capture_random_state(runner: Any) -> RandomState:
    """The states of this rank after a step (Model Runner V1)."""
    generators = {
        name: state.generator for name, state in runner.requests.items() if state.generator is not None
    }
    return RandomState.capture(
        order=list(runner.input_batch.req_ids), generators=generators, device=runner.device
    )


def restore_requests(runner: Any, message: StateMessage) -> None:
    """Make this rank's requests exactly those of the message (Model Runner V1)."""
    random = None if message.random_state is None else RandomState.decode(message.random_state)
    own_generators = {name: state.generator for name, state in runner.requests.items()}
    _clear(runner)
    for snapshot in message.requests:
        new = snapshot.new_data
        generator = (
            own_generators.get(new.req_id) or _first_generator(new, runner.device)
            if random is None
            else random.generator(new.req_id, runner.device) or _first_generator(new, runner.device)
        )
        state = _request_state(snapshot, generator)
        runner.requests[new.req_id] = state
        _track_prompt_logprobs(runner, snapshot)
        if snapshot.in_batch:
            runner.input_batch.add_request(state)
    runner.input_batch.condense()
    runner.input_batch.refresh_metadata()
    _replay_thinking_budgets(runner)
    if random is not None:
        random.restore_globals(runner.device)


def _clear(runner: Any) -> None:
    """As if no request had ever been seen; whatever a failed step left half done goes too."""
    runner.execute_model_state = None
    runner.kv_connector_output = None
    batch = runner.input_batch
    for request_id in list(batch.req_id_to_index):
        batch.remove_request(request_id)
    batch.condense()
    batch.refresh_metadata()
    batch.prev_sampled_token_ids = None
    runner.requests.clear()
    runner.num_prompt_logprobs.clear()


def _replay_thinking_budgets(runner: Any) -> None:
    """Where a request stands in its thinking budget follows from its tokens, but only one after the other."""
    holder = runner.input_batch.thinking_budget_state_holder
    if holder is None:
        return
    for row, state in holder._state.items():
        output = runner.requests[runner.input_batch.req_ids[row]].output_token_ids
        for count in range(len(output)):  # with all of them it is the retried step that updates the state
            state["output_tok_ids"], state["force_index"] = output[:count], []
            holder._update_think_state(state)
        state["output_tok_ids"] = output


def _request_state(snapshot: RequestSnapshot, generator: torch.Generator | None) -> CachedRequestState:
    new = snapshot.new_data
    return CachedRequestState(
        req_id=new.req_id,
        prompt_token_ids=new.prompt_token_ids,
        prompt_embeds=new.prompt_embeds,
        prompt_is_token_ids=new.prompt_is_token_ids,
        mm_features=new.mm_features,
        sampling_params=new.sampling_params,
        pooling_params=new.pooling_params,
        generator=generator,
        block_ids=tuple(list(ids) for ids in snapshot.block_ids),
        num_computed_tokens=snapshot.computed_tokens,
        output_token_ids=list(snapshot.output_token_ids),
        lora_request=new.lora_request,
    )


def _first_generator(new: Any, device: torch.device) -> torch.Generator | None:
    """The generator a seeded request starts with, for one that has not sampled yet."""
    params = new.sampling_params
    if params is None or params.sampling_type is not SamplingType.RANDOM_SEED:
        return None
    generator = torch.Generator(device=device)
    generator.manual_seed(params.seed)
    return generator


def _track_prompt_logprobs(runner: Any, snapshot: RequestSnapshot) -> None:
    params = snapshot.new_data.sampling_params
    if params is None or params.prompt_logprobs is None:
        return
    if snapshot.reached_tokens < len(snapshot.new_data.prompt_token_ids or ()):
        everything = params.prompt_logprobs == -1
        runner.num_prompt_logprobs[snapshot.new_data.req_id] = (
            runner.input_batch.vocab_size if everything else params.prompt_logprobs
        )


def stuck_in_prompt_logprobs(view: WorkersView) -> Iterable[str]:
    """Requests whose prompt log-probabilities are half collected: only a recompute can collect them again."""
    for name, known in view.requests.items():
        params, prompt = known.new_data.sampling_params, known.new_data.prompt_token_ids or ()
        if params is None or params.prompt_logprobs is None:
            continue
        if 0 < known.reached_tokens < len(prompt):
            yield name
