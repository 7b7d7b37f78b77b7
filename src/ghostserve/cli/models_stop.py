"""`ghostserve models stop`: let go of all weights in memory. It is never needed, and never hurts a server that runs."""

from __future__ import annotations

import argparse
import json

from ghostserve.weights.pool_start import stop_holder


def run(options: argparse.Namespace) -> int:
    """Run the command; raises GhostserveError."""
    stopped = stop_holder()
    if options.json:
        print(json.dumps({"stopped": stopped}))
    elif stopped:
        print("ended; what servers have mapped stays theirs, and the next one loads from the disk")
    else:
        print("nothing was held in memory")
    return 0
