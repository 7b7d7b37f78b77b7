"""A whole pass through the engine at the least cost: one token of prompt, one of answer."""

from __future__ import annotations

import uuid
from typing import Any

from vllm.sampling_params import SamplingParams

from ghostserve.errors import GhostserveError

PROMPT_TOKEN_ID = 1  # any that every model has; what it means does not matter


async def generate_one_token(engine: Any) -> None:
    """Through scheduler, every rank and sampler: too short for the prefix cache. Raises if no token comes.

    Not bounded: whoever cancels it has the request aborted.
    """
    parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True)
    prompt = {"prompt_token_ids": [PROMPT_TOKEN_ID]}
    tokens = 0
    async for output in engine.generate(prompt, parameters, f"ghostserve-health-{uuid.uuid4().hex}"):
        tokens = len(output.outputs[0].token_ids)
    if not tokens:
        raise GhostserveError("the engine ended the probe without a token")
