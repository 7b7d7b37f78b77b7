"""Whether the model's files are still those the server started with.

A replacement reads its weights from them. Were they exchanged meanwhile, it would compute another model's
numbers beside the survivors', and nothing would report it. A model named by an id lies in the hub's cache, where each
commit has a folder of its own; vLLM asks once at the start which commit a branch names, if the hub answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from ghostserve.errors import WeightsError
from ghostserve.weights.model_files import open_model

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "config.json")


def identity(
    model: str, *, revision: str | None = None, cache: str | None = None
) -> tuple[tuple[str, int, int], ...]:
    """Name, size in bytes and modification time of each file that matters. Asks no network.

    `model`: a folder, a file, or an id, of which the commit that the cache has for `revision` counts, too. Empty for
    what is none of these, or is not in the cache (`cache`: where that is, by default the hub's).
    """
    path = Path(model)
    if path.is_file():
        return (_entry(path),)
    if path.is_dir():
        return _entries(path)
    if (snapshot := _snapshot(model, revision, cache)) is None:
        return ()
    return ((f"commit {snapshot.name}", 0, 0), *_entries(snapshot))


def source_of(model: str, *, revision: str | None = None, cache: str | None = None) -> str | None:
    """What the pool knows these weights by: their files and headers. None where they cannot be read; then loading says why."""
    folder = Path(model) if Path(model).is_dir() else _snapshot(model, revision, cache)
    try:
        return None if folder is None else open_model(folder).identity
    except (WeightsError, OSError):
        return None


def _snapshot(model: str, revision: str | None, cache: str | None) -> Path | None:
    """The folder of what the hub's cache has of a model; None if it is not there, or `model` is no id at all."""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, cache_dir=cache, local_files_only=True
            )
        )
    except (OSError, ValueError):
        return None


def is_downloaded(model: str) -> bool:
    """Whether the files are only there once a worker has loaded them."""
    return not Path(model).exists()


def ask_no_hub() -> None:
    """From here on this process takes models from the cache: the survivors have nothing newer, and a hub that does not
    answer is asked again and again, for half a minute.
    """
    constants.HF_HUB_OFFLINE = True


def _entries(folder: Path) -> tuple[tuple[str, int, int], ...]:
    files = {file for pattern in WEIGHTS for file in folder.glob(pattern)}
    return tuple(map(_entry, sorted(files)))


def _entry(file: Path) -> tuple[str, int, int]:
    stat = file.stat()
    return file.name, stat.st_size, stat.st_mtime_ns


def what_changed(
    before: tuple[tuple[str, int, int], ...], now: tuple[tuple[str, int, int], ...]
) -> str | None:
    """A sentence naming the files that differ; None if all are as they were."""
    names = sorted({name for name, *_ in set(before) ^ set(now)})
    if not names:
        return None
    return (
        f"the model's files changed since the server started ({', '.join(names)}), so a replacement would compute "
        "something else; restart the server"
    )


def why_no_replacement(executor: Any) -> str | None:
    """A sentence if a replacement would have other weights than the rank that was lost; None if it would have the same."""
    if changed := what_changed(executor.weights, executor.weights_now()):
        return changed
    if executor.weights_changed_by:
        return (
            f"the weights were changed in memory ({executor.weights_changed_by}): a replacement would not have them; "
            "restart the server"
        )
    return None
