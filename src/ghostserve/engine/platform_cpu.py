"""The CPU platform with our communicator. Imported while vLLM is still being imported: little may be here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar

from vllm.platforms.cpu import CpuPlatform

from ghostserve.engine.platform import ASYNC_ENV

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class GhostCpuPlatform(CpuPlatform):
    """vLLM's CPU platform with another communicator, and asynchronous scheduling where the user asks for it."""

    _overrides_registered: ClassVar[bool] = False

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """The stock platform switches asynchronous scheduling off without a word, also when it was asked for."""
        super().check_and_update_config(vllm_config)
        if os.environ.get(ASYNC_ENV) == "1":
            vllm_config.scheduler_config.async_scheduling = True

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        """Once: the stock platform looks through all modules, 0.4 s, also where a fork server has done so before."""
        if not cls._overrides_registered:
            super().register_triton_kernel_overrides()
            cls._overrides_registered = True

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "ghostserve.engine.communicator.AbandonableCommunicator"
