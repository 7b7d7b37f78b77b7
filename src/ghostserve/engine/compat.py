"""Where vLLM 0.32.0 leaves no seam, or is wrong on CPU; each with its reason and a test that fails when it changes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import envs
from vllm.compilation import caching, decorators
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import set_current_vllm_config

logger = logging.getLogger(__name__)


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


def load_compiled_graphs(runner: Any) -> int:
    """Take the compiled graphs that this rank, or a predecessor, left in vLLM's cache. Returns how many.

    Stock vLLM loads such an artefact, too, but on a CPU it then calls a method that only its GPU backend's functions
    have (`finalize_loading`), takes the error for a broken file, and compiles again: 20 s in each replacement. The
    steps here are its own, without that call. Whatever goes wrong, the graph is compiled as before.
    """
    if runner.device.type != "cpu" or not envs.VLLM_USE_AOT_COMPILE or envs.VLLM_DISABLE_COMPILE_CACHE:
        return 0
    compiled = [
        module
        for module in runner.model.modules()
        if isinstance(module, TorchCompileWithNoGuardsWrapper) and not module.do_not_compile
    ]
    try:
        return sum(_load_compiled_graph(module, runner.vllm_config) for module in compiled)
    except Exception as error:
        logger.info("compiled graphs are not taken from the cache: %s", error)
        return 0


def _load_compiled_graph(module: Any, vllm_config: Any) -> bool:
    factors = [*caching.aot_compile_hash_factors(vllm_config), decorators._model_hash_key(module.forward)]
    directory = Path(
        envs.VLLM_CACHE_ROOT,
        "torch_compile_cache",
        "torch_aot_compile",
        hashlib.sha256(str(factors).encode()).hexdigest(),
    )
    parallel = vllm_config.parallel_config
    path = directory / f"rank_{parallel.rank}_{parallel.data_parallel_index}" / "model"
    if not path.exists():
        return False
    with set_current_vllm_config(vllm_config), path.open("rb") as file:
        loaded: Any = torch.compiler.load_compiled_function(file, f_globals=module.forward.__globals__)
        decorators._verify_source_unchanged(loaded.source_info(), vllm_config)
        if not vllm_config.compilation_config.dynamic_shapes_config.evaluate_guards:
            loaded.disable_guard_check()
        if hasattr(loaded._artifacts.compiled_fn, "finalize_loading"):
            return False  # then vLLM loads it by itself
    vllm_config.compilation_config.local_cache_dir = str(directory)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory / "inductor_cache")
    module.aot_compiled_fn = loaded
    module.was_aot_compile_fn_loaded_from_disk = True
    return True
