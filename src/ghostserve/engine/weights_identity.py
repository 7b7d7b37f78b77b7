"""Whether the model's files are still those the server started with.

A replacement reads its weights from them. Were they exchanged meanwhile, it would compute another model's
numbers beside the survivors', and nothing would report it.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "config.json")


def identity(model: str) -> tuple[tuple[str, int, int], ...]:
    """Name, size in bytes and modification time of each file that matters; empty for a model that is no folder."""
    folder = Path(model)
    if not folder.is_dir():
        return ()
    files = {file for pattern in WEIGHTS for file in folder.glob(pattern)}
    found = []
    for file in sorted(files):
        stat = file.stat()
        found.append((file.name, stat.st_size, stat.st_mtime_ns))
    return tuple(found)


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
