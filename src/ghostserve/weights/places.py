"""Where a model lies that a user names: a folder, the Hub's cache for an id, our cache for a URL."""

from __future__ import annotations

from pathlib import Path

from ghostserve.errors import UsageError
from ghostserve.weights import hub
from ghostserve.weights.cache import cache_of
from ghostserve.weights.pull import Progress, Pulled
from ghostserve.weights.pull import pull as pull_url
from ghostserve.weights.remote_names import is_url


def is_folder(model: str) -> bool:
    """Whether it is one on this machine; such a model is used where it lies."""
    return not is_url(model) and Path(model).expanduser().is_dir()


def pull(
    model: str,
    *,
    revision: str | None = None,
    download_dir: Path | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Have a model that is not a folder on this disk. Raises UsageError, WeightsError."""
    if is_url(model):
        if revision is not None:
            raise UsageError(f"--revision {revision}: only models of the Hugging Face Hub have revisions")
        return pull_url(model, root=download_dir, progress=progress)
    return hub.pull(model, revision=revision, download_dir=download_dir, progress=progress)


def folder_of(model: str, *, revision: str | None = None, download_dir: Path | None = None) -> Path:
    """Where it lies on this disk; asks no network. Raises UsageError."""
    if is_folder(model):
        return Path(model).expanduser()
    if not is_url(model):
        return hub.folder_of(model, revision=revision, download_dir=download_dir)
    cache = cache_of(model, download_dir)
    version = cache.current()
    if version is None:
        raise UsageError(f"{model} is not in {cache.folder.parent}: run 'ghostserve models pull {model}'")
    return cache.path_of(version)
