"""`ghostserve models optimise MODEL`: what workers hold of it in memory, onto the disk, a file each, for cold starts with several workers.

Taken out of the pool, where a server has left it: so it is what a server with these flags loads, bit for bit.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from ghostserve.cli.models_known import Known, find
from ghostserve.cli.models_progress import Bar
from ghostserve.cli.units import bytes_text
from ghostserve.errors import GhostserveError
from ghostserve.weights import rank_file
from ghostserve.weights.places import is_folder
from ghostserve.weights.pool import Pool
from ghostserve.weights.pool_messages import NAME_CHARACTERS_MAX
from ghostserve.weights.pool_types import EntryInfo, EntryState, ImageKind
from ghostserve.weights.rank_folder import remove_leftovers


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is on the disk now, of the model."""

    files: int
    nbytes: int


def run(options: argparse.Namespace) -> int:
    """Run the command; raises GhostserveError."""
    row = find(options.model, options.download_dir)
    if options.remove:
        kept = _remove({rank_file.label_of(name) for name in names_of(options.model, row)})
        said = f"removed {kept.files} copies of {options.model}, {bytes_text(kept.nbytes)}"
    else:
        kept = _write(row, workers=options.tensor_parallel_size)
        said = f"{kept.files} workers' weights, {bytes_text(kept.nbytes)}, are in {rank_file.folder()}"
    answer = {
        "model": options.model,
        "path": str(rank_file.folder()),
        "files": kept.files,
        "bytes": kept.nbytes,
        "removed": options.remove,
    }
    print(json.dumps(answer) if options.json else said)
    return 0


def names_of(model: str, row: Known) -> set[str]:
    """What a server may have called it."""
    names = {model, *row.labels, *(map(str, row.disk.snapshots) if row.disk else ())}
    if is_folder(model):
        names |= {str(Path(model).expanduser()), str(Path(model).expanduser().resolve())}
    return {name[-NAME_CHARACTERS_MAX:] for name in names}


def _write(row: Known, *, workers: int | None) -> Kept:
    pool = Pool.connect(start=False) if row.labels else None
    entries = [] if pool is None else [entry for entry in pool.list() if _is_rank_of(entry, row)]
    if pool is None or len(entries) < (workers or 1):
        there = f"{len(entries)} of {workers} workers' weights" if workers else "no worker's weights"
        raise GhostserveError(
            f"{row.model}: {there} are in memory: start a server of it once, with the flags that it will have and --weights-memory "
            "large enough, then do this again"
        )
    kept_bytes = 0
    with Bar(row.model) as bar:
        bar.begin(sum(entry.nbytes for entry in entries), 0)
        for entry in entries:
            kept_bytes += rank_file.keep(pool, entry).stat().st_size
            bar.advance(entry.nbytes)
    return Kept(files=len(entries), nbytes=kept_bytes)


def _is_rank_of(entry: EntryInfo, row: Known) -> bool:
    published = entry.kind is ImageKind.RANK and entry.state is EntryState.PUBLISHED
    return published and entry.label in row.labels


def _remove(names: set[str]) -> Kept:
    remove_leftovers(rank_file.folder())
    files = [one.file for one in rank_file.all_files() if one.label in names]
    for file in files:
        file.path.unlink(missing_ok=True)
    return Kept(files=len(files), nbytes=sum(file.nbytes for file in files))
