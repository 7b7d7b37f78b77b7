"""Leaving a broken collective and forming process groups anew: one seam for every kind of collective.

The groups a rank belongs to live in module globals of vLLM's `parallel_state`. vLLM has functions that destroy
them, but these assume healthy groups and stop at the first error; re-forming also needs the group-name counter
to start over, so that a group's unique name (embedded in compiled graphs) is the same as before.
"""

from __future__ import annotations

import datetime
import logging
import sys
import threading
from typing import Any

import torch.distributed as dist
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

from ghostserve.arena.shared_group import GroupAbandoned
from ghostserve.engine import communicator

logger = logging.getLogger(__name__)

# Names of parallel_state's module globals that hold a group; a test fails when vLLM has others.
GROUP_GLOBALS = (
    "_TP", "_ETP", "_DCP", "_PCP", "_PP", "_DP", "_EP", "_EPLB", "_ENGRAM_DP", "_INNER_DP_WORLD", "_WORLD",
    "_NODE_COUNT",
)  # fmt: skip


def abandon_groups() -> None:
    """No collective of this process waits any longer, in whatever thread. May be called again."""
    communicator.abandon_all()
    if (cuda := sys.modules.get("ghostserve.engine.communicator_cuda")) is not None:
        cuda.abandon_all()


def leave_groups() -> None:
    """Drop every process group. Peers blocked in a collective with us see that we left, and leave too."""
    abandon_groups()  # first: a peer that waits in one does not look at connections
    closing = _process_groups()
    for destroy in (parallel_state.destroy_model_parallel, parallel_state.destroy_distributed_environment):
        try:
            destroy()
        except Exception as error:  # a broken group may fail anywhere; it is going away
            logger.debug("while leaving a broken group: %s", error)
    for name in GROUP_GLOBALS:
        setattr(parallel_state, name, None)
    if dist.is_initialized():
        dist.destroy_process_group()
    parallel_state._group_name_counter.clear()
    # A rendezvous that failed leaves torch's counter of groups where it was; a newcomer's begins at 0.
    dist.distributed_c10d._world.group_count = 0
    _close_behind(closing)


def _process_groups() -> list[Any]:
    """Every process group of this process that a coordinator of vLLM's holds, and the default one."""
    coordinators = [getattr(parallel_state, name, None) for name in GROUP_GLOBALS]
    groups = [getattr(found, kind, None) for found in coordinators for kind in ("cpu_group", "device_group")]
    return [group for group in groups if group is not None] + (
        [dist.group.WORLD] if dist.is_initialized() else []
    )


def _close_behind(groups: list[Any]) -> None:
    """Let go of the last references in a thread: closing a gloo group joins its threads, 5 ms each."""
    threading.Thread(target=groups.clear, daemon=True, name="ghostserve-closing").start()


def form_groups(vllm_config: Any, *, rank: int, local_rank: int, init_method: str, timeout_s: float) -> None:
    """Rendezvous with the other ranks at `init_method`; all of them must call this within `timeout_s`.

    The time-out bounds the rendezvous only: afterwards collectives get back the configured one.
    """
    parallel = vllm_config.parallel_config
    configured = parallel.distributed_timeout_seconds
    parallel.distributed_timeout_seconds = timeout_s
    try:
        with set_current_vllm_config(vllm_config):
            init_worker_distributed_environment(
                vllm_config, rank, init_method, local_rank, current_platform.dist_backend
            )
    finally:
        parallel.distributed_timeout_seconds = configured
    set_collective_timeout(configured)


def set_collective_timeout(timeout_s: float | None) -> None:
    """Bound every collective of every group of this process."""
    limit = datetime.timedelta(seconds=timeout_s) if timeout_s else dist.default_pg_timeout
    for name in GROUP_GLOBALS:
        coordinator = getattr(parallel_state, name, None)
        for attribute in ("cpu_group", "device_group"):
            group = getattr(coordinator, attribute, None)
            if group is not None:
                dist.distributed_c10d._set_pg_timeout(limit, group)
    communicator.set_timeout_of_all(limit.total_seconds())


def peer_left(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone, rather than for a reason of its own."""
    return isinstance(error, dist.DistError | GroupAbandoned) or "gloo" in str(error).lower()
