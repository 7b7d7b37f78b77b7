"""Every model that this machine knows: in the Hub's cache, in ours, in the pool of its memory. What is known where is joined by name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ghostserve.clock import monotonic_s, wall_s
from ghostserve.errors import PoolError
from ghostserve.weights import hub
from ghostserve.weights.cache import default_root, models_in
from ghostserve.weights.places import is_folder
from ghostserve.weights.pool import Pool
from ghostserve.weights.pool_messages import NAME_CHARACTERS_MAX
from ghostserve.weights.pool_types import EntryInfo, EntryState, ImageKind, PoolStats
from ghostserve.weights.remote_names import checked_url, is_url


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDisk:
    """One model in a cache. `folder` is all of it, `snapshots` what a server may have been given as its model."""

    model: str
    folder: Path
    snapshots: tuple[Path, ...]
    nbytes: int
    last_used_s: float | None = None
    complete: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One model, wherever it is."""

    model: str
    disk: OnDisk | None = None
    memory_bytes: Mapping[ImageKind, int] = field(default_factory=dict)
    labels: frozenset[str] = frozenset()
    """Its names in the pool."""
    in_use: bool = False
    pinned: bool = False
    last_used_s: float | None = None

    @property
    def tiers(self) -> list[str]:
        """Where it is, the slowest first."""
        return [*(["disk"] if self.disk else []), *(["memory"] if self.memory_bytes else [])]

    def as_dict(self) -> dict[str, object]:
        return {
            "model": self.model,
            "tiers": self.tiers,
            "path": str(self.disk.snapshots[-1]) if self.disk and self.disk.snapshots else None,
            "disk_bytes": self.disk.nbytes if self.disk else 0,
            "complete": self.disk.complete if self.disk else None,
            "memory_bytes": {kind.value: self.memory_bytes.get(kind, 0) for kind in ImageKind},
            "in_use": self.in_use,
            "pinned": self.pinned,
            "last_used_s": None if self.last_used_s is None else round(self.last_used_s, 3),
        }


def on_disk(download_dir: Path | None = None) -> list[OnDisk]:
    """What both caches have. With `download_dir` it is looked at instead."""
    found = [
        OnDisk(
            model=one.model,
            folder=one.folder,
            snapshots=one.snapshots,
            nbytes=one.nbytes,
            last_used_s=one.last_used_s,
        )
        for one in hub.known(download_dir)
    ]
    for cache in models_in(download_dir or default_root()):
        current = cache.current()
        used = [path.stat().st_atime for path in cache.blobs.glob("*") if path.exists()]
        found.append(
            OnDisk(
                model=cache.url,
                folder=cache.folder,
                snapshots=tuple(cache.path_of(version) for version in cache.known()),
                nbytes=cache.nbytes(),
                last_used_s=max(used, default=None),
                complete=current is not None,
            )
        )
    return found


def in_memory() -> tuple[list[EntryInfo], PoolStats | None]:
    """What the pool has; None if there is no holder. A holder that does not answer is a PoolError."""
    pool = Pool.connect(start=False)
    if pool is None:
        return [], None
    return pool.list(), pool.stats()


def join(
    disk: Iterable[OnDisk], entries: Iterable[EntryInfo], *, wall_minus_monotonic_s: float
) -> list[Known]:
    """One row per model. Pure. An entry whose label is a folder in a cache belongs to the model that lies there."""
    rows: dict[str, Known] = {}
    by_path: dict[str, str] = {}
    for one in disk:
        rows[one.model] = Known(model=one.model, disk=one, last_used_s=one.last_used_s)
        by_path.update({str(path): one.model for path in one.snapshots})
    for entry in entries:
        if entry.state is EntryState.DROPPED:  # goes with its last user, and nobody else finds it
            continue
        model = by_path.get(entry.label, entry.label)
        row = rows.get(model, Known(model=model))
        bytes_of = dict(row.memory_bytes)
        bytes_of[entry.kind] = bytes_of.get(entry.kind, 0) + entry.nbytes
        used_s = entry.used_s + wall_minus_monotonic_s
        rows[model] = Known(
            model=model,
            disk=row.disk,
            memory_bytes=bytes_of,
            labels=row.labels | {entry.label},
            in_use=row.in_use or entry.references > 0,
            pinned=row.pinned or entry.pinned,
            last_used_s=max(used_s, row.last_used_s or 0.0),
        )
    return [rows[model] for model in sorted(rows)]


def known_models(download_dir: Path | None = None) -> tuple[list[Known], PoolStats | None, str | None]:
    """All rows, the pool's numbers, and why there are none although there is a pool."""
    stats, trouble = None, None
    entries: list[EntryInfo] = []
    try:
        entries, stats = in_memory()
    except PoolError as error:
        trouble = str(error)
    rows = join(on_disk(download_dir), entries, wall_minus_monotonic_s=wall_s() - monotonic_s())
    return rows, stats, trouble


def find(model: str, download_dir: Path | None) -> Known:
    """The row of a model that is named as the user names it; an empty one if nothing is known of it."""
    wanted = {model}
    if is_url(model):
        wanted = {checked_url(model)}
    elif is_folder(model):
        folder = Path(model).expanduser()
        wanted |= {str(folder), str(folder.resolve())}
    wanted |= {name[-NAME_CHARACTERS_MAX:] for name in wanted}  # as it is called in the pool
    rows, _, trouble = known_models(download_dir)
    if trouble is not None:
        print(f"ghostserve: memory: {trouble}", file=sys.stderr)
    return next((row for row in rows if row.model in wanted or row.labels & wanted), Known(model=model))
