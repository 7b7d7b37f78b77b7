"""How far a long command is: a bar on a terminal, nothing but sentences elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from ghostserve.cli.units import bytes_text
from ghostserve.types import Closing


class Bar(Closing):
    """Bytes of `total_bytes`, on standard error; whoever reads standard output gets the result alone."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Any = None
        self._done_bytes: int | None = None  # as told to `at`; None before its first call

    def begin(self, total_bytes: int, there_bytes: int) -> None:
        """So much in all, of which so much is done already."""
        if total_bytes == there_bytes:
            return
        if not sys.stderr.isatty():
            there = f", {bytes_text(there_bytes)} of them are there" if there_bytes else ""
            self.say(f"{self._what}: {bytes_text(total_bytes)}{there}")
            return
        self._bar = tqdm(
            desc=self._what,
            total=total_bytes,
            initial=there_bytes,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            file=sys.stderr,
        )

    def advance(self, nbytes: int) -> None:
        """So much more; negative where something is done again."""
        if self._bar is not None:
            self._bar.update(nbytes)

    def at(self, done_bytes: int, total_bytes: int) -> None:
        """So much is done, for who counts by itself."""
        if self._done_bytes is None:
            self._done_bytes = 0
            self.begin(total_bytes, 0)
        self.advance(done_bytes - self._done_bytes)
        self._done_bytes = done_bytes

    def say(self, text: str) -> None:
        """A sentence, above the bar."""
        tqdm.write(f"ghostserve: {text}", file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
