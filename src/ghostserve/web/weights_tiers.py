"""How much of weights this machine's memory holds, for the status."""

from __future__ import annotations

from typing import Any

from ghostserve.web.weights_pool import PoolReading
from ghostserve.weights.pool_types import ImageKind


def describe(reading: PoolReading) -> dict[str, Any]:
    """`memory` is None while nobody holds any. Counts are those since the server's start."""
    stats, counts = reading.stats, reading.counts.values()
    if stats is None:
        return {"memory": None}
    memory = {
        "budget_bytes": stats.budget_bytes,
        "used_bytes": stats.used_bytes,
        "referenced_bytes": stats.referenced_bytes,
        "pinned_bytes": stats.pinned_bytes,
        "file_bytes": stats.bytes.get(ImageKind.FILE, 0),
        "rank_bytes": stats.bytes.get(ImageKind.RANK, 0),
        "hits_total": sum(count.hits for count in counts),
        "misses_total": sum(count.misses for count in counts),
        "evictions_total": sum(count.evictions for count in counts),
    }
    return {"memory": memory}
