"""The checksums of a model, kept between loads: `$XDG_CACHE_HOME/ghostserve/weights/IDENTITY.json`.

The identity is that of the source (where its files lie, sizes, times of change), so a model that was downloaded anew begins anew, and
two that are alike in all but their bytes have one each. Inodes are no part of it, since checksums outlast them; nor are headers, whose
bytes may rot as others do.
A file of ours that is damaged or cannot be written is as good as none: it must never keep a model from being served.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghostserve import clock
from ghostserve.weights.cache_home import cache_home
from ghostserve.weights.checksums import CELL_BYTES, Checksums
from ghostserve.weights.model_files import ModelFiles, WeightsFile
from ghostserve.weights.waiting_lock import try_lock
from ghostserve.weights.whole_file import write_whole

logger = logging.getLogger(__name__)

FORMAT = 1
LOCK_S = 2.0
LOCK_POLL_S = 0.02
LOCK = "lock"


def default_folder() -> Path:
    """Where they are kept."""
    return cache_home() / "weights"


class ChecksumFile:
    """The checksums of all files of one model. Threads may use `of` together; one of them saves."""

    def __init__(self, model: ModelFiles, *, folder: Path | None = None) -> None:
        """Reads what is known. `folder`: default_folder."""
        self._model = model
        self.path = (folder or default_folder()) / f"{_identity(model)}.json"
        known = _read(self.path, model)
        self._sums = {
            file.path: Checksums(file.path, file.nbytes, known.get(_key(model, file)), kept_in=self.path)
            for file in model.files
        }

    def of(self, file: WeightsFile) -> Checksums:
        """For `read_ranges`: compares what is known, learns the rest."""
        return self._sums[file.path]

    @property
    def learned(self) -> bool:
        """Whether there is something to save."""
        return any(sums.learned for sums in self._sums.values())

    @property
    def complete(self) -> bool:
        """Whether every byte of the model has a checksum."""
        return all(sums.complete for sums in self._sums.values())

    def save(self) -> bool:
        """Write what was learned, after all reads of it succeeded: a read that ends with an error proves nothing.

        Whole or not at all, together with what others learned meanwhile. False, with a line in the log, if it cannot be written.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self.path.parent):
                known = _read(self.path, self._model)
                files = {
                    _key(self._model, file): _merged(
                        known.get(_key(self._model, file)), self._sums[file.path].values
                    )
                    for file in self._model.files
                }
                body = _body(self._model, files)
                document = {"format": FORMAT, "crc32": _seal(body), "body": body}
                write_whole(self.path, json.dumps(document), mode=0o600)
        except OSError as error:
            logger.warning("checksums of %s are not kept: %s", self._model.folder, error)
            return False
        for sums in self._sums.values():
            sums.learned = 0
        return True


def _identity(model: ModelFiles) -> str:
    digest = hashlib.sha256()
    for file in model.files:
        text = json.dumps([_key(model, file), str(file.target), file.nbytes, file.mtime_ns])
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def _key(model: ModelFiles, file: WeightsFile) -> str:
    return os.path.relpath(file.path, model.folder)


def _merged(ours: list[int | None] | None, theirs: list[int | None]) -> list[int | None]:
    if ours is None:
        return theirs
    return [a if a is not None else b for a, b in zip(ours, theirs, strict=True)]


def _body(model: ModelFiles, files: dict[str, list[int | None]]) -> dict[str, Any]:
    return {
        "identity": _identity(model),
        "folder": str(model.folder),
        "cell_bytes": CELL_BYTES,
        "files": files,
    }


def _seal(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _read(path: Path, model: ModelFiles) -> dict[str, list[int | None]]:
    """By file; empty if there is nothing of use."""
    try:
        document = json.loads(path.read_text())
        body = document["body"]
        if document["format"] != FORMAT or document["crc32"] != _seal(body):
            raise ValueError("it is damaged, or of another version")
        if body["identity"] != _identity(model) or body["cell_bytes"] != CELL_BYTES:
            raise ValueError("it is of another model")
        cells = {_key(model, file): -(-file.nbytes // CELL_BYTES) for file in model.files}
        if {name: len(values) for name, values in body["files"].items()} != cells:
            raise ValueError("it is of other files")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("checksums of %s are made anew, %s is of no use: %s", model.folder, path, error)
        return {}
    files: dict[str, list[int | None]] = body["files"]
    return files


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one of us writes in `folder`. TimeoutError (an OSError) if another one does for too long."""
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline_s = clock.monotonic_s() + LOCK_S
        while not try_lock(fd):
            if clock.monotonic_s() > deadline_s:
                raise TimeoutError(f"{folder / LOCK} is held by another process")
            clock.sleep_s(LOCK_POLL_S)
        yield
    finally:
        os.close(fd)
