"""The event log as a file: a JSON object per line, rotated by size.

    events.jsonl   events.jsonl.1   events.jsonl.2 ...      the newest is without a number

A line is whole or not there: what a full disk let through of a batch is cut off again. A file that was moved or removed
from outside, as logrotate does, is made anew.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ghostserve.errors import UsageError
from ghostserve.events.record import Record, record_of

_MODE = 0o640


class EventFile:
    """Written by one thread. `max_bytes` is for each of at most `files` files; a batch is never split."""

    def __init__(self, path: Path, *, max_bytes: int, files: int) -> None:
        """Open for appending; UsageError if that cannot be."""
        self._path, self._max_bytes, self._files = path, max_bytes, files
        try:
            self._fd = self._open()
        except OSError as error:
            raise UsageError(f"--event-log {path}: {error.strerror}") from None

    def write(self, records: Sequence[Record]) -> None:
        """Append them, all or none. Raises OSError; asked again later it goes on."""
        lines = b"".join(record.to_json().encode() + b"\n" for record in records)
        self._reopen_if_moved()
        size = os.fstat(self._fd).st_size
        if size and size + len(lines) > self._max_bytes:
            self._rotate()
            size = 0
        try:
            left = memoryview(lines)
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)
            raise

    def close(self) -> None:
        """May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _MODE)

    def _reopen_if_moved(self) -> None:
        ours = os.fstat(self._fd)
        try:
            there = os.stat(self._path)
            same = (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
        except FileNotFoundError:
            same = False
        if not same:
            self._take(self._open())

    def _rotate(self) -> None:
        for number in range(self._files - 1, 0, -1):
            older, newer = self._numbered(number), self._numbered(number - 1)
            with contextlib.suppress(FileNotFoundError):
                os.replace(newer, older)
        if self._files == 1:
            os.unlink(self._path)
        self._take(self._open())

    def _numbered(self, number: int) -> Path:
        return self._path if number == 0 else self._path.with_name(f"{self._path.name}.{number}")

    def _take(self, fd: int) -> None:
        os.close(self._fd)
        self._fd = fd


def read_files(path: Path) -> Iterator[Record]:
    """The records of a file and of its rotated predecessors, oldest first; other lines are passed over.

    UsageError if there is no such file.
    """
    numbers = [
        int(found.name.removeprefix(f"{path.name}."))
        for found in path.parent.glob(f"{path.name}.*")
        if found.name.removeprefix(f"{path.name}.").isdecimal()
    ]
    older = [path.with_name(f"{path.name}.{number}") for number in sorted(numbers, reverse=True)]
    try:
        for file in [*older, path]:
            with file.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    with contextlib.suppress(ValueError):
                        if (record := record_of(json.loads(line))) is not None:
                            yield record
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
