"""Compiled code and what a device has recorded of a group: CUDA graphs replay its collectives, so they go with it.

Survivors drop theirs as they leave; after the regroup all ranks capture together, as at the start. Graphs of a CPU do
not exist. Written without a GPU and not run on one yet.
"""

from __future__ import annotations

from typing import Any

from vllm.config import CUDAGraphMode


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


def warm_up(runner: Any) -> None:
    """One run of the compiled model, on every rank at the same time: its code is loaded, nothing is written to KV."""
    if runner.device.type == "cpu":
        runner.warming_up_model()
    else:
        runner._dummy_run(runner.max_num_tokens, skip_eplb=True)


def capture_graphs(runner: Any) -> None:
    """Capture anew, on every rank at the same time: what is captured contains collectives.

    A survivor's KV stays as it is: both runners point the slots of a captured run nowhere. (vLLM's warm-up of kernels
    does write KV, so a newcomer goes without.)
    """
    if runner.device.type != "cuda":
        return
    if runner.vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
        runner.capture_model()
