"""Runs a command and never lets a person wait in silence.

    python scripts/progress.py LABEL COMMAND [ARGUMENT ...]

Every line of the command is passed on; while it prints nothing, a line says how long it has been running.
Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

SILENCE_MAX_S = 8.0
"""The longest time without a line."""
NOISE = ("WARNING:", "[notice]")
"""Lines of pip that tell nothing about how far it is."""


def show(line: str) -> None:
    """Print one line now, also into a pipe."""
    print(line, flush=True)


def run(
    argv: Sequence[str],
    *,
    label: str,
    env: Mapping[str, str] | None = None,
    sink: Callable[[str], None] = show,
    tell: Callable[[str], None] = show,
    sink_is_seen: bool = True,
    silence_max_s: float = SILENCE_MAX_S,
) -> int:
    """Run `argv` to its end and return its exit status (negative: the signal it died of).

    Each output line goes to `sink`. Whenever nobody has seen a line for `silence_max_s`, `tell` gets one; with
    `sink_is_seen=False` (a log file) lines of the command do not count as seen, and the newest is told along.
    """
    start = seen = time.monotonic()
    newest, rest = "", b""
    child = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        close_fds=False,
    )
    assert child.stdout is not None
    with child, selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if selector.select(max(0.0, seen + silence_max_s - time.monotonic())):
                chunk = os.read(child.stdout.fileno(), 65536)
                *lines, rest = (rest + chunk).split(b"\n") if chunk else ([rest, b""] if rest else [b""])
                for raw in lines:
                    line = raw.decode(errors="replace").rstrip("\r")
                    newest = line.strip() if line.strip() and not line.startswith(NOISE) else newest
                    sink(line)
                if lines and sink_is_seen:
                    seen = time.monotonic()
                if not chunk:
                    break
            if time.monotonic() - seen >= silence_max_s:
                seen = time.monotonic()
                what = f"  {newest[:90]}" if newest and not sink_is_seen else ""
                tell(f"  ... {label}: {seen - start:.0f} s{what}")
    return child.returncode


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: progress.py LABEL COMMAND [ARGUMENT ...]")
    status = run(sys.argv[2:], label=sys.argv[1])
    sys.exit(status if status >= 0 else 128 - status)
