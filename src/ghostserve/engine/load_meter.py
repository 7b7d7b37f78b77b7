"""What a process uses while something runs in it: time, CPU, bytes off the disk, memory at its peak; and what it holds at the end."""

from __future__ import annotations

from pathlib import Path

from ghostserve.clock import cpu_s, monotonic_s


def bytes_off_disks() -> int:
    """What this process has had disks read so far."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["read_bytes"])


def status_bytes(field: str) -> int:
    """A size out of /proc/self/status, e.g. VmHWM."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def memory() -> dict[str, int]:
    """This process's share of the bytes resident in it, all of them and by kind (smaps_rollup)."""
    kinds = ("Pss", "Pss_File", "Pss_Shmem")
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    found = dict(line.split(":") for line in lines)
    return {kind.lower(): int(found[kind].split()[0]) * 1024 for kind in kinds}


class Meter:
    """Time, CPU, disk and peak memory between two moments."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self._rss = status_bytes("VmRSS")
        self._cpu_s, self._read_bytes = cpu_s(), bytes_off_disks()
        self._began_s = monotonic_s()

    def stop(self) -> dict[str, float]:
        return {
            "seconds": monotonic_s() - self._began_s,
            "cpu_s": cpu_s() - self._cpu_s,
            "read_bytes": bytes_off_disks() - self._read_bytes,
            "peak_rss_growth_bytes": status_bytes("VmHWM") - self._rss,
        }
