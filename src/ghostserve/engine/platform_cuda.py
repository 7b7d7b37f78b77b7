"""The CUDA platform with our communicator. Imported while vLLM is still being imported: little may be here."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.platforms.cuda import CudaPlatform

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


class GhostCudaPlatform(CudaPlatform):
    """vLLM's CUDA platform with collectives that a survivor can leave."""

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """As stock; then collectives go over NCCL only, with a word in the log."""
        from ghostserve.engine.communicator_cuda import switch_off_what_cannot_be_left

        super().check_and_update_config(vllm_config)
        if off := switch_off_what_cannot_be_left(vllm_config):
            logger.info("off, for their kernels wait for a dead peer for ever: %s", ", ".join(off))

    @classmethod
    def new_graph_pool(cls) -> Any:
        """Another pool for CUDA graphs, for this process from here on."""
        cls._global_graph_pool = cls.graph_pool_handle()
        return cls._global_graph_pool

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "ghostserve.engine.communicator_cuda.AbandonableCudaCommunicator"
