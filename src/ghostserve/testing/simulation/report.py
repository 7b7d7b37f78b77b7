"""Many schedules on several processes, and what came of them together."""

from __future__ import annotations

import logging
import multiprocessing
import zlib
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ghostserve.clock import cpu_s, monotonic_s
from ghostserve.testing.simulation.run import Result, run_seed

CHUNK = 8  # seeds a process takes at once
VIOLATIONS_KEPT = 20
LOSSES = "losses"


@dataclass(slots=True)
class Totals:
    """Sums over schedules. `shapes`: schedules by (ranks, parity shards)."""

    first_seed: int
    seeds: int = 0
    events: int = 0
    events_min: int | None = None
    without_loss: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    shapes: Counter[tuple[int, int]] = field(default_factory=Counter)
    violations: list[tuple[int, str]] = field(default_factory=list)  # (seed, what), the first few
    violated: int = 0
    checksum: int = 0  # of all states; equal wherever the same seeds are run by the same code
    took_s: float = 0.0
    cpu_s: float = 0.0  # of all processes; what else the machine did is not in it

    def add(self, result: Result, *, cpu_s: float = 0.0) -> None:
        """One schedule more."""
        self.seeds += 1
        self.cpu_s += cpu_s
        self.events += result.events
        self.events_min = result.events if self.events_min is None else min(self.events_min, result.events)
        self.counts.update(result.counts)
        self.checksum = zlib.crc32(result.checksum.to_bytes(4, "little"), self.checksum)
        self.without_loss += not result.counts.get(LOSSES)
        self.shapes[result.setup.ranks, result.setup.parity_shards] += 1
        if result.violation is not None:
            self.violated += 1
            if len(self.violations) < VIOLATIONS_KEPT:
                self.violations.append((result.seed, result.violation))

    @property
    def events_mean(self) -> float:
        return self.events / max(1, self.seeds)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "first_seed": self.first_seed,
            "seeds": self.seeds,
            "took_s": round(self.took_s, 1),
            "cpu_s": round(self.cpu_s, 1),
            "events": self.events,
            "events_mean": round(self.events_mean, 1),
            "events_min": self.events_min,
            "checksum": f"{self.checksum:08x}",
            "schedules_without_loss": self.without_loss,
            "violated": self.violated,
            "violations": [{"seed": seed, "what": what} for seed, what in self.violations],
            "counts": dict(sorted(self.counts.items())),
            "shapes": {f"n={n} m={m}": count for (n, m), count in sorted(self.shapes.items())},
        }

    def text(self) -> str:
        """For people."""
        lines = [
            f"{self.seeds} schedules from seed {self.first_seed} in {self.took_s:.0f} s ({self.cpu_s:.0f} s of CPU): "
            f"{self.events_mean:.0f} events each on average, {self.counts[LOSSES]} losses, "
            f"{self.violated} violations; checksum {self.checksum:08x}",
            "",
        ]
        width = max(map(len, self.counts), default=0)
        lines += [f"  {name:<{width}}  {count:>9}" for name, count in sorted(self.counts.items())]
        for seed, what in self.violations:
            lines += ["", f"seed {seed}: {what}", f"  replay: ghostserve simulate --replay {seed} --trace"]
        return "\n".join(lines)


def simulate(
    *, first_seed: int, seeds: int, jobs: int, on_progress: Callable[[int, int, int], None] = lambda *_: None
) -> Totals:
    """Run so many schedules. `on_progress(done, of, violated)` about once per second."""
    totals = Totals(first_seed=first_seed)
    began_s = told_s = monotonic_s()
    # Closed at once if we are interrupted: its end would wait for what is queued.
    with closing(_results(range(first_seed, first_seed + seeds), jobs)) as results:
        for result, used_s in results:
            totals.add(result, cpu_s=used_s)
            now_s = monotonic_s()
            if now_s - told_s >= 1.0:
                told_s = now_s
                on_progress(totals.seeds, seeds, totals.violated)
    totals.took_s = monotonic_s() - began_s
    return totals


def _results(seeds: range, jobs: int) -> Generator[tuple[Result, float], None, None]:
    if jobs == 1:
        yield from map(_timed, seeds)
        return
    with multiprocessing.get_context("forkserver").Pool(jobs) as pool:
        yield from pool.imap(_timed, seeds, chunksize=CHUNK)


def _timed(seed: int) -> tuple[Result, float]:
    began_s = cpu_s()
    return run_quietly(seed), cpu_s() - began_s


def run_quietly(seed: int, *, trace: bool = False) -> Result:
    """A schedule, without what the product logs of injected faults."""
    logger = logging.getLogger("ghostserve")
    was, logger.disabled = logger.level, False
    logger.setLevel(logging.CRITICAL + 1)
    try:
        return run_seed(seed, trace=trace)
    finally:
        logger.setLevel(was)
