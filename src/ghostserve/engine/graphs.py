"""Compiled code and what a device has recorded of a group: CUDA graphs replay its collectives, so they go with it.

Survivors drop theirs as they leave; after the regroup all ranks capture together, as at the start. Graphs of a CPU do
not exist. Written without a GPU and not run on one yet.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform


def drop_graphs(runner: Any) -> None:
    """Forget every captured graph; nothing on a CPU. `ncclCommAbort` waits until they are gone."""
    if runner.device.type != "cuda":
        return
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    manager = getattr(runner, "cudagraph_manager", None)  # Model Runner V2's
    if manager is not None:
        manager.release_graphs()
    CUDAGraphWrapper.clear_all_graphs()
    BreakableCUDAGraphWrapper.clear_all_graphs()


def warm_up(runner: Any, *, v2: bool) -> None:
    """One run of the compiled model, on every rank at the same time: its code is loaded, nothing is written to KV."""
    if runner.device.type == "cpu":
        runner.warming_up_model()
        return
    # As vLLM's profile run, which comes before there is KV.
    how = {"skip_attn": True} if v2 else {"cudagraph_runtime_mode": CUDAGraphMode.NONE}
    runner._dummy_run(runner.max_num_tokens, skip_eplb=True, is_profile=True, **how)


def capture_graphs(runner: Any, *, v2: bool) -> None:
    """Capture anew, on every rank at the same time: what is captured contains collectives. After KV is there.

    A survivor's KV stays as it is: both runners point the slots of a dummy run nowhere. (vLLM's warm-up of kernels does
    write KV, so a newcomer goes without.)
    """
    if runner.device.type != "cuda" or runner.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:
        return
    # The largest run, with attention, makes room that must not grow any more once graphs point at it.
    how = {} if v2 else {"cudagraph_runtime_mode": CUDAGraphMode.NONE, "force_attention": True}
    runner._dummy_run(runner.max_num_tokens, skip_eplb=True, **how)
    _take_a_new_pool(runner)
    runner.capture_model()


def _take_a_new_pool(runner: Any) -> None:
    """A pool of which all graphs are gone cannot be captured into again (see vLLM's profile_cudagraph_memory)."""
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    gc.collect()
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
    pool = current_platform.new_graph_pool()
    if (manager := getattr(runner, "cudagraph_manager", None)) is not None:
        manager.pool = pool
    for wrapper in (*CUDAGraphWrapper._all_instances, *BreakableCUDAGraphWrapper._all_instances):
        wrapper.graph_pool = pool
