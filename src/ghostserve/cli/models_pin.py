"""`ghostserve models pin|unpin MODEL`: weights in memory that are never evicted."""

from __future__ import annotations

import argparse
import json

from ghostserve.cli.models_known import find
from ghostserve.cli.units import count_text
from ghostserve.errors import GhostserveError
from ghostserve.weights.pool import Pool


def run(options: argparse.Namespace) -> int:
    """Run the command that `options` name; raises GhostserveError."""
    row = find(options.model, options.download_dir)
    labels = sorted(row.labels) or [row.model]
    pool = Pool.connect(start=False)
    if pool is None or (options.command == "pin" and not row.labels):
        raise GhostserveError(
            f"{options.model} is not in memory: 'ghostserve models warm {options.model}' puts it there"
        )
    if options.command == "pin":
        entries = sum(pool.pin(label) for label in labels)
        said = f"{count_text(entries, 'image')} of {row.model} in memory will not be evicted"
        answer: dict[str, object] = {"model": row.model, "pinned": True, "images": entries}
    else:
        was = sum(pool.unpin(label) for label in labels) > 0  # each of them
        said = f"{row.model} may be evicted" if was else f"{row.model} was not pinned"
        answer = {"model": row.model, "pinned": False, "was_pinned": was}
    print(json.dumps(answer) if options.json else said)
    return 0
