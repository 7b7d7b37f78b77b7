"""Collectives over gloo only: they raise when a peer's connection breaks, so a survivor can leave."""

from __future__ import annotations

from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class AbandonableCommunicator(CpuCommunicator):
    """vLLM's CPU communicator without its shared-memory collectives, which spin for ever on a dead peer."""

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        return False
