"""Whether a model's files are what they were: every byte is read from the disk and compared with all that is known of it.

Known are the checksums of the first load, and for what was downloaded from the hub its sha256: the cache names a large
file by it, and a download into a folder of its own leaves it in `.cache/huggingface`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import mmap
import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ghostserve.errors import WeightsChecksumError, WeightsError
from ghostserve.weights.bounded import STALL_S, answer_within
from ghostserve.weights.checksum_file import ChecksumFile
from ghostserve.weights.checksums import Checksums
from ghostserve.weights.model_files import ModelFiles, WeightsFile, open_model
from ghostserve.weights.ranges import Range
from ghostserve.weights.reader import read_ranges

WINDOW_BYTES = 32 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")
METADATA_CLOCK_S = 1.0
"""How much newer than its note a file may be, as the hub's own library has it, before the note is not about it any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """One file."""

    path: Path
    nbytes: int
    error: WeightsError | None
    """What is wrong with it; None if it is as it was."""
    compared: bool
    """Whether checksums of an earlier load covered all of it. If not, they are made now."""
    compared_with_hub: bool
    """Whether its sha256 was known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All files of a model."""

    model: ModelFiles
    files: tuple[FileReport, ...]
    kept: bool = True
    """Whether the checksums that were made are there the next time."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, as far as anything was known."""
        return all(file.error is None for file in self.files)


def verify_model(
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    kept_in: Path | None = None,
    stall_s: float = STALL_S,
) -> Report:
    """Read all of it. `progress` is told (bytes done, bytes of all files). `kept_in`: where checksums are kept.

    WeightsError if it is no model that can be read at all; what is wrong with the bytes of a file is in the report.
    """
    model = open_model(folder, stall_s=stall_s)
    book = ChecksumFile(model, folder=kept_in)
    before, reports = 0, []
    for file in model.files:

        def told(done: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, model.nbytes)

        sums = book.of(file)
        sha256 = answer_within(stall_s, functools.partial(known_sha256, file, folder), file.path)
        compared = sums.complete
        error: WeightsError | None = None
        try:
            _verify(file, sums, sha256, told, stall_s)
        except WeightsError as found:
            error = found
            told(file.nbytes)  # done with it, too
        reports.append(
            FileReport(
                path=file.path,
                nbytes=file.nbytes,
                error=error,
                compared=compared,
                compared_with_hub=sha256 is not None,
            )
        )
        before += file.nbytes
    report = Report(model=model, files=tuple(reports))
    if report.ok and book.learned:
        return dataclasses.replace(report, kept=book.save())
    return report


def _verify(
    file: WeightsFile, sums: Checksums, sha256: str | None, told: Callable[[int], None], stall_s: float
) -> None:
    """One file, past the page cache, since it is the disk that is asked."""
    if sha256 is None:
        whole = [Range(0, file.nbytes, 0)]
        read_ranges(
            file.path, whole, None, direct=True, on_ready=told, verify=sums, expect=file, stall_s=stall_s
        )
        return
    digest = hashlib.sha256()
    windows = [mmap.mmap(-1, WINDOW_BYTES) for _ in range(2)]
    with ThreadPoolExecutor(1) as hasher:  # one window is hashed while the other is read
        hashed: Future[None] | None = None
        for begin in range(0, file.nbytes, WINDOW_BYTES):
            end = min(begin + WINDOW_BYTES, file.nbytes)
            window = memoryview(windows[begin // WINDOW_BYTES % 2])[: end - begin]
            read_ranges(
                file.path,
                [Range(begin, end, 0)],
                window,
                direct=True,
                verify=sums,
                expect=file,
                stall_s=stall_s,
            )
            if hashed is not None:
                hashed.result()
            hashed = hasher.submit(digest.update, window)
            told(end)
    if digest.hexdigest() != sha256:
        raise WeightsChecksumError(
            f"{file.path}: its sha256 is {digest.hexdigest()}, and the hub says {sha256}: it is damaged, or is another file; "
            "download the model again"
        )


def known_sha256(file: WeightsFile, folder: Path) -> str | None:
    """What the hub said of it when it was downloaded; None if nobody knows."""
    target = file.path.resolve()
    if target.parent.name == "blobs" and SHA256.fullmatch(target.name):
        return target.name
    name = os.path.relpath(file.path, folder)
    note = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    try:
        _, etag, written_s = note.read_text().split()
        if file.mtime_ns / 1e9 > float(written_s) + METADATA_CLOCK_S:
            return None
    except (OSError, ValueError):
        return None
    return etag if SHA256.fullmatch(etag) else None
