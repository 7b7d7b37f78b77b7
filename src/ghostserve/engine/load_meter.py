"""What a process uses while something runs in it: time, CPU, bytes off the disk, memory at its peak; and what it holds at the end."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

from ghostserve.clock import monotonic_s


@dataclass
class Usage:
    """What a process has used so far."""

    cpu_s: float
    read_bytes: int  # from disks, by this process

    @classmethod
    def now(cls) -> Usage:
        used = resource.getrusage(resource.RUSAGE_SELF)
        counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return cls(cpu_s=used.ru_utime + used.ru_stime, read_bytes=int(counters["read_bytes"]))


def status_bytes(field: str) -> int:
    """A size out of /proc/self/status, e.g. VmHWM."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def memory() -> dict[str, int]:
    """Bytes resident in this process, and its share of them, by kind (smaps_rollup)."""
    kinds = ("Rss", "Pss", "Pss_Anon", "Pss_File", "Pss_Shmem")
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    found = dict(line.split(":") for line in lines)
    return {kind.lower(): int(found[kind].split()[0]) * 1024 for kind in kinds}


class Meter:
    """Time, CPU, disk and peak memory between two moments."""

    def __init__(self) -> None:
        self._peak_file = Path("/proc/self/clear_refs")
        self._peak_file.write_text("5")  # VmHWM begins anew
        self._rss = status_bytes("VmRSS")
        self._usage = Usage.now()
        self._began_s = monotonic_s()

    def stop(self) -> dict[str, float]:
        took_s, usage = monotonic_s() - self._began_s, Usage.now()
        return {
            "seconds": took_s,
            "cpu_s": usage.cpu_s - self._usage.cpu_s,
            "read_bytes": usage.read_bytes - self._usage.read_bytes,
            "peak_rss_growth_bytes": status_bytes("VmHWM") - self._rss,
        }
