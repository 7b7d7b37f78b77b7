"""`ghostserve models warm MODEL`: its files into the memory that all servers of the user share, so that the next start reads no disk.

Files serve any number of workers: who loads first maps them, whatever its `--tensor-parallel-size`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

from ghostserve.cli.models_progress import Bar
from ghostserve.cli.units import bytes_text
from ghostserve.clock import monotonic_s
from ghostserve.errors import GhostserveError, UsageError
from ghostserve.weights.checksum_file import ChecksumFile
from ghostserve.weights.model_files import ModelFiles, open_model
from ghostserve.weights.places import folder_of, is_folder
from ghostserve.weights.pool import Pool
from ghostserve.weights.pool_messages import NAME_CHARACTERS_MAX
from ghostserve.weights.pool_types import EntryState
from ghostserve.weights.pooled_file import PooledFile, file_key
from ghostserve.weights.remote_names import is_url

STEP_BYTES = 64 * 2**20
"""How often the bar moves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """What came of it."""

    label: str
    nbytes: int
    kept_bytes: int
    read_bytes: int


def run(options: argparse.Namespace) -> int:
    """Run the command; raises GhostserveError."""
    if options.weights_memory == 0:
        raise UsageError("--weights-memory 0: no memory is to be used, so that nothing can be put there")
    folder = folder_of(options.model, revision=options.revision, download_dir=options.download_dir)
    # As a server names it: an id by itself, what lies in a folder by that.
    named = options.model if not (is_url(options.model) or is_folder(options.model)) else str(folder)
    began_s = monotonic_s()
    pool = Pool.connect(start=True, budget_bytes=options.weights_memory)
    if pool is None:
        raise GhostserveError(
            "nobody holds memory for weights, and nobody could be started: see the line above"
        )
    with Bar(options.model) as bar:
        warmed = warm(pool, open_model(folder), label=named[-NAME_CHARACTERS_MAX:], bar=bar)
    if warmed.kept_bytes < warmed.nbytes:
        raise GhostserveError(
            f"{bytes_text(warmed.kept_bytes)} of {bytes_text(warmed.nbytes)} are in memory: there is no room for the rest; give it "
            "more with --weights-memory, or make room ('ghostserve models ls', 'rm --memory', 'unpin')"
        )
    if options.pin:
        pool.pin(warmed.label)
    took_s = monotonic_s() - began_s
    if options.json:
        answer = {
            "model": options.model,
            "path": str(folder),
            "memory_bytes": warmed.kept_bytes,
            "read_bytes": warmed.read_bytes,
            "pinned": options.pin,
            "seconds": round(took_s, 3),
        }
        print(json.dumps(answer))
    else:
        until = "until it is unpinned" if options.pin else "for some minutes; --pin keeps it for longer"
        print(f"{bytes_text(warmed.kept_bytes)} of {options.model} are in memory, {until}")
    return 0


def warm(pool: Pool, model: ModelFiles, *, label: str, bar: Bar) -> Warmed:
    """Read what is not there yet; a file that the pool has no room for is left out. Raises WeightsError."""
    there = _published(pool)
    missing = [file for file in model.files if file_key(file) not in there]
    there_bytes = model.nbytes - sum(file.nbytes for file in missing)
    bar.begin(model.nbytes, there_bytes)
    sums = ChecksumFile(model)
    for file in missing:
        taken = PooledFile(pool, file, [(0, file.nbytes)], label=label, verify=sums.of(file))
        try:
            if not taken.in_pool:
                continue
            for begin in range(0, file.nbytes, STEP_BYTES):
                end = min(begin + STEP_BYTES, file.nbytes)
                taken.get(begin, end)
                bar.advance(end - begin)
            taken.wait()
            taken.settle()
        finally:
            taken.close()
    if sums.learned:
        sums.save()
    there = _published(pool)
    kept_bytes = sum(file.nbytes for file in model.files if file_key(file) in there)
    return Warmed(
        label=label, nbytes=model.nbytes, kept_bytes=kept_bytes, read_bytes=max(0, kept_bytes - there_bytes)
    )


def _published(pool: Pool) -> set[str]:
    return {entry.key for entry in pool.list() if entry.state is EntryState.PUBLISHED}
