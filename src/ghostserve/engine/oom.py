"""Whether the kernel has just killed a process for its memory: a SIGKILL does not tell who sent it.

/proc/vmstat counts such kills over the whole machine, whatever the version of cgroups and from inside a container, too.
So another's, at the very time at which a rank of ours ends for another reason, is taken for ours.
"""

from __future__ import annotations

from pathlib import Path

LATELY_S = 3.0  # what is looked at twice a second may be looked at late
_FIELD = "oom_kill "


class OomKills:
    """Looked at every second or so, and once more when a process is found dead; by any thread, at worst a rise is noted twice."""

    def __init__(self, vmstat: Path = Path("/proc/vmstat")) -> None:
        self._vmstat = vmstat
        self._seen = self._count()
        self._rose_at_s: float | None = None

    def look(self, now_s: float) -> None:
        """Note whether there was one since the last look."""
        count = self._count()
        if count is not None and self._seen is not None and count > self._seen:
            self._rose_at_s = now_s
        self._seen = count

    def lately(self, now_s: float) -> bool:
        """Whether there was one in the last seconds; False where the kernel does not tell."""
        self.look(now_s)
        return self._rose_at_s is not None and now_s - self._rose_at_s <= LATELY_S

    def _count(self) -> int | None:
        try:
            lines = self._vmstat.read_text().splitlines()
        except OSError:
            return None
        return next((int(line.removeprefix(_FIELD)) for line in lines if line.startswith(_FIELD)), None)
