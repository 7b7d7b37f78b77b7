"""`ghostserve models rm MODEL`: out of memory, off the disk, or both. Only what a pull put there is ever removed."""

from __future__ import annotations

import argparse
import json
import shutil
import sys

from ghostserve.cli.models_known import Known, OnDisk, find
from ghostserve.cli.units import bytes_text
from ghostserve.errors import GhostserveError, UsageError, WeightsError
from ghostserve.weights.cache import ModelCache
from ghostserve.weights.places import is_folder
from ghostserve.weights.pool import Pool
from ghostserve.weights.remote_names import is_url


def run(options: argparse.Namespace) -> int:
    """Run the command; raises GhostserveError."""
    from_memory, from_disk = not options.disk, not options.memory
    if is_folder(options.model) and options.disk:
        raise UsageError(f"{options.model} is a folder of yours, not one of a cache: remove it yourself")
    row = find(options.model, options.download_dir)
    disk = row.disk if from_disk else None
    if disk is None and not (from_memory and row.labels):
        where = (
            "in memory" if options.memory else "on the disk" if options.disk else "on the disk or in memory"
        )
        raise GhostserveError(f"{options.model} is not {where}: 'ghostserve models ls' shows what is")
    if disk is not None:
        _demand_yes(disk, yes=options.yes)
    freed, in_use = _drop(row) if from_memory else (0, False)
    if disk is not None:
        _remove(disk)
    answer = {
        "model": row.model,
        "disk_bytes": disk.nbytes if disk else 0,
        "memory_bytes": freed,
        "still_in_use": in_use,
    }
    print(json.dumps(answer) if options.json else _sentence(row, disk, freed, in_use))
    return 0


def _demand_yes(disk: OnDisk, *, yes: bool) -> None:
    """Ask, where there is somebody to ask."""
    what = f"{bytes_text(disk.nbytes)} in {disk.folder}"
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"this removes {what}: say --yes")
    print(f"remove {what}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise GhostserveError("nothing was removed")


def _drop(row: Known) -> tuple[int, bool]:
    pool = Pool.connect(start=False) if row.labels else None
    if pool is None:
        return 0, False
    for label in sorted(row.labels):
        pool.unpin(label)
    done = [pool.drop(label) for label in sorted(row.labels)]
    return sum(row.memory_bytes.values()), any(one.in_use for one in done)


def _remove(disk: OnDisk) -> None:
    """Off the disk, once nobody fetches it."""
    try:
        if is_url(disk.model):
            cache = ModelCache(disk.folder.parent, disk.model)
            with cache.locked(_say):
                cache.remove()
        else:
            shutil.rmtree(disk.folder)
            shutil.rmtree(disk.folder.parent / ".locks" / disk.folder.name, ignore_errors=True)
    except OSError as error:
        raise WeightsError(f"{error.filename or disk.folder}: {error.strerror}") from error


def _say(text: str) -> None:
    print(f"ghostserve: {text}", file=sys.stderr, flush=True)


def _sentence(row: Known, disk: OnDisk | None, freed: int, in_use: bool) -> str:
    parts = []
    if disk is not None:
        parts.append(f"{bytes_text(disk.nbytes)} of {disk.folder}")
    if freed:
        parts.append(
            f"{bytes_text(freed)} of memory" + (", what is in use once its users end" if in_use else "")
        )
    return f"removed {row.model}: {' and '.join(parts)}"
