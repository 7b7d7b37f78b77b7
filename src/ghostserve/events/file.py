"""The event log as a file: a JSON object per line, rotated by size.

    events.jsonl   events.jsonl.1   events.jsonl.2 ...      the newest is without a number

A line is whole or not there: what a full disk let through of a batch is cut off again, and what follows the torn line of
a writer that died begins on a line of its own. A file that was moved or removed from outside, as logrotate does, is made anew.
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
        self._torn = False  # whether the file ends in half a line of somebody else's
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
            left = memoryview(b"\n" * self._torn + lines)
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)
            raise
        self._torn = False

    def close(self) -> None:
        """May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        """A pipe that nobody reads is an error, not something to wait for."""
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, _MODE)
        os.set_blocking(fd, True)
        self._torn = _ends_torn(self._path)
        return fd

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


def _ends_torn(path: Path) -> bool:
    """Whether the last line of a file lacks its end."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as opened:
            if opened.seek(0, os.SEEK_END) == 0:
                return False
            opened.seek(-1, os.SEEK_END)
            return opened.read(1) != b"\n"
    except OSError:  # it may be written to, and not read
        return False


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
                    with contextlib.suppress(ValueError, RecursionError):
                        if (record := record_of(json.loads(line))) is not None:
                            yield record
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
