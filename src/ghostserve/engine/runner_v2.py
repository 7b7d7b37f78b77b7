"""Request state in a rank that runs Model Runner V2: what a step leaves behind, and how it is put back.

V2 keeps requests in fixed slots of tensors and samples from (seed, position), without states of its own. So a request that is
added anew with all its tokens goes on as if nothing had been: the runner does that itself after a preemption. What it
then would draw or count differently is set afterwards: the seed of a request without one, which is drawn from numpy's
global state when it is added, and where its prefill ends.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch

from ghostserve.engine.messages import RequestSnapshot, StateMessage
from ghostserve.engine.random_state import RandomState, short_id


def capture(runner: Any) -> RandomState:
    """The states of this rank after a step."""
    slots, seeds = runner.req_states.req_id_to_index, runner.sampler.sampling_states.seeds.np
    return RandomState.capture(
        order=[], device=runner.device, seeds={name: int(seeds[slot]) for name, slot in slots.items()}
    )


def restore(runner: Any, message: StateMessage) -> None:
    """Make this rank's requests exactly those of the message."""
    random = None if message.random_state is None else RandomState.decode(message.random_state)
    states, sampling = runner.req_states, runner.sampler.sampling_states
    own_seeds = {
        short_id(name): int(sampling.seeds.np[slot]) for name, slot in states.req_id_to_index.items()
    }
    _settle(runner.device)  # what is in flight there reads the buffers that are written below
    runner.execute_model_state = None
    for name in list(states.req_id_to_index):
        runner._remove_request(name)
    # The same slots on all ranks: some of the runner's features divide the requests by them.
    states.free_indices[:] = range(states.max_num_reqs)
    known = [snapshot for snapshot in message.requests if not snapshot.preempted]
    runner.add_requests(SimpleNamespace(scheduled_new_reqs=[_added(snapshot) for snapshot in known]))
    seeds = own_seeds if random is None else random.seeds
    for snapshot in known:
        name, slot = snapshot.new_data.req_id, states.req_id_to_index[snapshot.new_data.req_id]
        sampling.seeds.np[slot] = seeds.get(short_id(name), sampling.seeds.np[slot])
        _end_prefill(states, slot, snapshot)
    sampling.seeds.copy_to_uva()
    states.prefill_len.copy_to_uva()
    runner.block_tables.apply_staged_writes()
    _settle(runner.device)
    if random is not None:
        random.restore_globals(runner.device)


def _settle(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _added(snapshot: RequestSnapshot) -> Any:
    """The request as one that starts where it stands."""
    new = snapshot.new_data
    prompt = new.prefill_token_ids[: new.prompt_len]
    return dataclasses.replace(
        new,
        prefill_token_ids=[*prompt, *snapshot.output_token_ids],
        block_ids=snapshot.block_ids,
        num_computed_tokens=snapshot.reached_tokens,
    )


def _end_prefill(states: Any, slot: int, snapshot: RequestSnapshot) -> None:
    """Its prefill ended where it did: what came after was sampled, and is taken as such."""
    assert snapshot.prefill_tokens is not None
    states.prefill_len.np[slot] = snapshot.prefill_tokens
    if snapshot.new_data.prompt_len + len(snapshot.output_token_ids) > snapshot.prefill_tokens:
        states.last_sampled_tokens[slot] = snapshot.output_token_ids[-1]


def output_ids(runner: Any) -> dict[str, list[int]]:
    """The output tokens that this rank knows of each request; for debugging."""
    states = runner.req_states
    return {
        name: states.all_token_ids.gpu[
            slot, int(states.prompt_len.np[slot]) : int(states.total_len.gpu[slot])
        ].tolist()
        for name, slot in states.req_id_to_index.items()
    }
