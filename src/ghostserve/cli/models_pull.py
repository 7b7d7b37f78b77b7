"""`ghostserve models pull MODEL`: have it on this disk, so that a server starts without a network."""

from __future__ import annotations

import argparse
import json

from ghostserve.cli.models_progress import Bar
from ghostserve.cli.units import bytes_text
from ghostserve.clock import monotonic_s
from ghostserve.errors import UsageError
from ghostserve.weights.places import is_folder, pull


def run(options: argparse.Namespace) -> int:
    """Run the command; raises GhostserveError."""
    if is_folder(options.model):
        raise UsageError(f"{options.model} is a folder on this machine: there is nothing to pull")
    began_s = monotonic_s()
    with Bar(options.model) as bar:
        pulled = pull(
            options.model, revision=options.revision, download_dir=options.download_dir, progress=bar
        )
        took_s = monotonic_s() - began_s
        if pulled.fetched_bytes:
            speed = bytes_text(pulled.fetched_bytes / max(took_s, 1e-3))
            bar.say(f"{bytes_text(pulled.fetched_bytes)} fetched in {took_s:.1f} s ({speed}/s)")
    if options.json:
        answer = {
            "model": pulled.model,
            "path": str(pulled.path),
            "version": pulled.version,
            "bytes": pulled.nbytes,
            "fetched_bytes": pulled.fetched_bytes,
            "seconds": round(took_s, 3),
        }
        print(json.dumps(answer))
    else:
        print(pulled.path)
    return 0
