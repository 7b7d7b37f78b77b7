"""Request state in a rank that runs Model Runner V1: what a step leaves behind, and how it is put back.

Survivors are rolled back and newcomers brought up alike. A request has a row in the persistent batch, and a generator of its
own if it is seeded; all others draw from torch's default one, which is why the order of the rows matters.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.sampling_params import SamplingType
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from ghostserve.engine.messages import RequestSnapshot, StateMessage
from ghostserve.engine.random_state import RandomState


def capture(runner: Any) -> RandomState:
    """The states of this rank after a step."""
    generators = {
        name: state.generator for name, state in runner.requests.items() if state.generator is not None
    }
    return RandomState.capture(
        order=list(runner.input_batch.req_ids), generators=generators, device=runner.device
    )


def restore(runner: Any, message: StateMessage) -> None:
    """Make this rank's requests exactly those of the message."""
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
    # Of the step before, for asynchronous scheduling; what replaces it is known in full.
    batch.prev_sampled_token_ids = batch.prev_req_id_to_index = None
    batch.sampled_token_ids_cpu = batch.async_copy_ready_event = None
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


def output_ids(runner: Any) -> dict[str, list[int]]:
    """The output tokens that this rank knows of each request (-1: sampled, and still on the device); for debugging."""
    return {name: list(state.output_token_ids) for name, state in runner.requests.items()}
