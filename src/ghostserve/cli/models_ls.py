"""`ghostserve models ls`: what is on this disk and in its memory. The rendering is pure."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import datetime

from ghostserve.cli.models_known import Known, known_models
from ghostserve.cli.units import bytes_text, count_text
from ghostserve.weights.pool_types import ImageKind, PoolStats

HEADINGS = ("MODEL", "DISK", "FILES IN MEMORY", "RANKS IN MEMORY", "PINNED", "LAST USED")


def table(rows: Sequence[Known]) -> str:
    """For people. Names to the left, numbers to the right."""
    cells = [HEADINGS, *map(_cells, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADINGS))]
    lines = []
    for row in cells:
        first, *others = (
            text.ljust(width) if column in (0, 4, 5) else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def pool_line(stats: PoolStats | None, trouble: str | None = None) -> str:
    """What the host-memory pool holds, in one sentence."""
    if trouble is not None:
        return f"memory: {trouble}"
    if stats is None:
        return "memory: nothing is held for other processes (the holder starts with the first server, or 'models warm')"
    hits = sum(count.hits for count in stats.counts.values())
    misses = sum(count.misses for count in stats.counts.values())
    evictions = sum(count.evictions for count in stats.counts.values())
    return (
        f"memory: {bytes_text(stats.used_bytes)} of {bytes_text(stats.budget_bytes)} · "
        f"{bytes_text(stats.referenced_bytes)} in use · {bytes_text(stats.pinned_bytes)} pinned · "
        f"{count_text(hits, 'hit')}, {misses} misses, {evictions} evictions"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; raises GhostserveError."""
    rows, stats, trouble = known_models(options.download_dir)
    if options.json:
        print(json.dumps([row.as_dict() for row in rows]))
        return 0
    print(table(rows) if rows else "no models: 'ghostserve models pull MODEL' fetches one")
    print(f"\n{pool_line(stats, trouble)}")
    return 0


def _cells(row: Known) -> tuple[str, ...]:
    disk = bytes_text(row.disk.nbytes) if row.disk else "-"
    if row.disk and not row.disk.complete:
        disk += " (partial)"
    memory = (row.memory_bytes.get(kind, 0) for kind in (ImageKind.FILE, ImageKind.RANK))
    used = "-"
    if row.in_use:
        used = "in use"
    elif row.last_used_s is not None:
        used = datetime.fromtimestamp(row.last_used_s).isoformat(" ", "minutes")
    return (
        row.model,
        disk,
        *(bytes_text(nbytes) if nbytes else "-" for nbytes in memory),
        "yes" if row.pinned else "no",
        used,
    )
