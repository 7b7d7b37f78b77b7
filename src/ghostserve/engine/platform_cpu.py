"""The CPU platform with our communicator. Imported while vLLM is still being imported: little may be here."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class GhostCpuPlatform(CpuPlatform):
    """vLLM's CPU platform; only the communicator differs."""

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "ghostserve.engine.communicator.AbandonableCommunicator"
