"""A memory cgroup of its own for one process, so that the kernel's out-of-memory killer finds nobody else in it.

For injected faults. cgroup v1 (a hierarchy for memory) and v2 (one for all controllers) are both in use; making a group
needs the right to, which a container often withholds.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from ghostserve.errors import UnsupportedError

LIMIT_BYTES = 16 << 20  # for what is allocated from then on: pages of before stay charged where they were
_V1_MEMORY = "memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryGroup:
    """A directory of the cgroup file system, made by us."""

    path: Path
    unified: bool  # cgroup v2

    @classmethod
    def create(
        cls, name: str, *, cgroups: Path = Path("/proc/self/cgroup"), root: Path | None = None
    ) -> MemoryGroup:
        """Make a group of LIMIT_BYTES, empty. Raises UnsupportedError where it cannot be made."""
        try:
            parent, unified = _parent(cgroups.read_text(), root or Path("/sys/fs/cgroup"))
            group = cls(path=parent / name, unified=unified)
            group.path.mkdir()
        except OSError as error:
            raise UnsupportedError(
                f"no memory cgroup can be made here, so nothing can run out of memory alone ({error}); "
                "use crash: a process that the kernel kills for its memory ends by SIGKILL as well"
            ) from None
        try:
            group._limit()
        except OSError as error:
            group.remove()
            raise UnsupportedError(f"the memory cgroup {group.path} takes no limit ({error})") from None
        return group

    @classmethod
    def demand(cls) -> None:
        """Raise UnsupportedError where none can be made."""
        cls.create(f"ghostserve-probe-{os.getpid()}").remove()

    def enter(self) -> None:
        """Move this process into it. Raises OSError."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self) -> None:
        """Remove it, if nobody is in it (any more)."""
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _limit(self) -> None:
        names = ("memory.max",) if self.unified else ("memory.limit_in_bytes",)
        for name in names:
            (self.path / name).write_text(str(LIMIT_BYTES))
        # Swap would put the end off; it may not be there, or not be counted.
        swap = {"memory.swap.max": "0"} if self.unified else {"memory.memsw.limit_in_bytes": str(LIMIT_BYTES)}
        for name, value in swap.items():
            with contextlib.suppress(OSError):
                (self.path / name).write_text(value)


def _parent(own: str, root: Path) -> tuple[Path, bool]:
    """Where a group may be made, by /proc/self/cgroup: below our own (v1), or beside it (v2: a group with processes
    gives no controllers to groups below it). Raises OSError where there is none.
    """
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if _V1_MEMORY in controllers.split(","):
            below = root / "memory" / path.lstrip("/")
            # In a container the path may be one of the host's; what is mounted is our own group then.
            return (below if below.is_dir() else root / "memory"), False
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            group = root / path.lstrip("/")
            for parent in (group.parent, root):
                enabled = parent / "cgroup.subtree_control"
                if enabled.is_file() and "memory" in enabled.read_text().split():
                    return parent, True
    raise FileNotFoundError("no cgroup with a memory controller")
