"""Where vLLM 0.32.0 leaves no seam, or is wrong on CPU; each with its reason and a test that fails when it changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

VLLM_VERSION = "0.32.0"


@contextlib.contextmanager
def chunked_generators_set_aside(runner: Any) -> Iterator[None]:
    """Keep seeded requests that are still in a prompt chunk away from the sampler.

    Stock V1 samples such rows, throws the token away and winds the generator back with `set_offset`, which a
    CPU generator does not have: a seeded request whose prompt is chunked ends the engine. Without its generator
    the row draws from the default one, its token is thrown away all the same, and the seeded sequence is
    untouched, as it is on a GPU after winding back.
    """
    if runner.device.type != "cpu":
        yield
        return
    batch = runner.input_batch
    chunked = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs])
    aside = {int(row): batch.generators.pop(int(row)) for row in chunked if int(row) in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(aside)
