"""What the demo shows while it runs: the streamed text, the kill, the waiting. Decides nothing.

Lines may come from the thread that streams, the one that kills and the one that watches for silence; one
lock keeps them whole. Nobody sits in front of a silent terminal for longer than SILENCE_MAX_S.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from ghostserve.cli.status import phases_line, rebuilt_line
from ghostserve.cli.units import bytes_text
from ghostserve.clock import monotonic_s

SILENCE_MAX_S = 5.0
_RESET, _BOLD, _DIM, _RED, _GREEN = "\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[32m"


class View:
    """Writes to `out`; in colour where that is a terminal; the streamed text only with `show_text`."""

    def __init__(self, out: TextIO, *, show_text: bool, colour: bool) -> None:
        self._out = out
        self._show_text = show_text
        self._colour = colour
        self._lock = threading.Lock()
        self._in_text = False
        self._written_s = monotonic_s()

    def line(self, text: str = "", *, style: str = "") -> None:
        """Write one line of the demo's own, apart from the streamed text."""
        with self._lock:
            if self._in_text:
                self._write("\n")
                self._in_text = False
            self._write((style + text + _RESET if self._colour and style else text) + "\n")

    def step(self, text: str) -> None:
        """Announce the next step."""
        self.line(text, style=_BOLD)

    def detail(self, text: str) -> None:
        """A line that may be overlooked."""
        self.line(text, style=_DIM)

    def good(self, text: str) -> None:
        self.line(text, style=_GREEN)

    def bad(self, text: str) -> None:
        self.line(text, style=_RED)

    def token(self, text: str) -> None:
        """A piece of the streamed answer."""
        if self._show_text:
            with self._lock:
                self._in_text = True
                # The model may say anything; a terminal obeys control characters.
                self._write("".join(c if c.isprintable() or c in "\n\t" else "�" for c in text))

    @contextmanager
    def filling_silence(self, what: Callable[[], str]) -> Iterator[None]:
        """While inside, write `what()` whenever nothing was written for SILENCE_MAX_S."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.25):
                if monotonic_s() - self._written_s >= SILENCE_MAX_S:
                    try:
                        self.detail(f"  … {what()}")
                    except OSError:
                        return  # the reader is gone; the main thread finds out when it writes

        watcher = threading.Thread(target=watch, name="demo-silence", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def outcome(self, report: Mapping[str, Any], state: Mapping[str, Any], *, headline: str) -> None:
        """The line that everything is about, the phases, and what was kept in memory for it."""
        self.line()
        (self.good if report["identical"] else self.bad)(headline)
        if report["recovery_path"] is not None:
            self.detail(f"  {phases_line(report['phases_ms'])}")
            self.detail(f"  {report['recovery_path']}: {rebuilt_line(report)}")
        shadow = state["shadow"]
        self.detail(
            f"  {bytes_text(report['parity_bytes'])} parity + {bytes_text(report['mirror_bytes'])} mirrors "
            f"protect {bytes_text(report['kv_bytes_protected'])} of KV · "
            f"bound {bytes_text(shadow['bound_bytes'])} "
            + ("holds" if shadow["bound_holds"] else "does not hold")
        )

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
        self._written_s = monotonic_s()
