"""How much memory the machine, or the cgroup that we are in, has and has left. Needs no package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

AUTO_SHARE = 0.25  # of all memory, for a pool without a budget of its own
SPARE_SHARE = 0.10  # of all memory is left to others by every lease
_V1_UNLIMITED_BYTES = 1 << 60  # v1 writes "no limit" as a huge number


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """The narrower of machine and cgroups."""

    total_bytes: int
    available_bytes: int  # without swapping, page cache that can be dropped included

    @property
    def auto_budget_bytes(self) -> int:
        """What `--weights-memory auto` means."""
        return int(self.total_bytes * AUTO_SHARE)

    @property
    def spendable_bytes(self) -> int:
        """What may still be promised to leases; negative if memory is short already."""
        return self.available_bytes - int(self.total_bytes * SPARE_SHARE)


def read_host_memory(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """As of now. OSError if /proc cannot be read; a cgroup that cannot be read is left out."""
    fields = {}
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    total_bytes, available_bytes = fields["MemTotal"], fields.get("MemAvailable", fields["MemFree"])
    for limit_bytes, left_bytes in _limits(proc, cgroups):
        total_bytes = min(total_bytes, limit_bytes)
        available_bytes = min(available_bytes, left_bytes)
    return HostMemory(total_bytes=total_bytes, available_bytes=available_bytes)


def _limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """(limit, what is left of it) of our cgroup and all above it that have one."""
    try:
        own = (proc / "self" / "cgroup").read_text()
    except OSError:
        return
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        # In a container the path may be one of the host's; what is mounted is our own group then.
        below = group if group.is_dir() else root
        while below.is_relative_to(root):
            found = _limit(below, *names)
            if found is not None:
                yield found
            below = below.parent


def _limit(group: Path, limit: str, usage: str, cache: str) -> tuple[int, int] | None:
    try:
        limit_bytes = int((group / limit).read_text())  # "max": ValueError, no limit
        if limit_bytes >= _V1_UNLIMITED_BYTES:
            return None
        used_bytes = int((group / usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit_bytes, limit_bytes - used_bytes + int(statistics.get(cache, 0))
    except (OSError, ValueError):
        return None
