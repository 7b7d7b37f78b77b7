"""Our configuration as the engine core uses it: limits worked out for this model and machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ghostserve.config import GhostConfig
from ghostserve.engine.budget import GuardLimits
from ghostserve.errors import UsageError

STANDBY_NEEDS_BYTES = 4 << 30  # free, for one to be kept without being asked for
DEFAULT_SHARE = 0.25  # of the machine's or cgroup's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A server's configuration, in one of its processes."""

    config: GhostConfig
    arena_timeout_s: float = 10.0

    @classmethod
    def from_environment(cls) -> Settings:
        return cls(config=GhostConfig.from_environment())

    def memory_budget_bytes(self, *, available: int | None = None) -> int:
        """Host memory for the shadow, at most, of `available` bytes, by default what there is. UsageError if it is less."""
        available, budget = available or memory_limit_bytes(), self.config.host_memory
        if budget is None:
            return int(available * DEFAULT_SHARE)
        if budget > available:
            raise UsageError(
                f"--host-memory {budget} is more than the {available} bytes that this machine or cgroup has"
            )
        return budget

    def standbys(self) -> int:
        """Standby processes to keep; by default one where memory allows."""
        if self.config.standbys is not None:
            return self.config.standbys
        return int(psutil.virtual_memory().available >= STANDBY_NEEDS_BYTES)

    def guard_limits(self, vllm_config: Any) -> GuardLimits:
        """What the arena is sized by."""
        scheduler = vllm_config.scheduler_config
        return GuardLimits(
            parity_shards=self.config.parity_shards,
            compact=self.config.protection == "parity",
            host_memory_bytes=self.memory_budget_bytes(),
            max_requests=scheduler.max_num_seqs,
            max_batched_tokens=scheduler.max_num_batched_tokens,
            backlog_blocks=self.config.encode_backlog,
        )

    @staticmethod
    def preload_modules(vllm_config: Any) -> list[str]:
        """The model's own module, so that a replacement need not import it."""
        from vllm.model_executor.models.registry import ModelRegistry

        known = ModelRegistry.models
        names = [
            getattr(known.get(name), "module_name", None) for name in vllm_config.model_config.architectures
        ]
        return [name for name in names if name]


def memory_limit_bytes(cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """The cgroup's memory limit, or the machine's memory where there is none."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(int(cgroup.read_text()), total)
    except (OSError, ValueError):
        return total
