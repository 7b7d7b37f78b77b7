"""vLLM platform plugin: the CPU and CUDA platforms with collectives that can be left when a peer dies.

vLLM's own wait for a dead peer for ever (`communicator.py`, `communicator_cuda.py`). Active only in processes started
by ghostserve, so plain vLLM beside us stays as it is.
"""

from __future__ import annotations

import os

PLATFORM_ENV = "GHOSTSERVE_PLATFORM"
ASYNC_ENV = "GHOSTSERVE_ASYNC_SCHEDULING"
"""Whether the user asked for asynchronous scheduling, which vLLM's own CPU platform switches off."""


def register() -> str | None:
    """Entry point of the `vllm.platform_plugins` group. None: not ours to decide."""
    if os.environ.get(PLATFORM_ENV) != "1":
        return None
    from vllm.platforms import cpu_platform_plugin, cuda_platform_plugin

    if cpu_platform_plugin() is not None:
        return "ghostserve.engine.platform_cpu.GhostCpuPlatform"
    if cuda_platform_plugin() is not None:
        return "ghostserve.engine.platform_cuda.GhostCudaPlatform"
    return None
