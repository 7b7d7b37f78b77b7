"""Prints the path of a Chromium for the browser tests, and obtains Debian's package first where there is none.

    scripts/chromium

As root it is installed. Otherwise it is unpacked into `.venv/programs/chromium`, with the libraries that the machine lacks, beside a
script that starts it with them. Exit status 1, with the reason, where neither is possible.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INSTALLED = Path("/usr/bin/chromium")
UNPACKED = Path(__file__).resolve().parents[1] / ".venv" / "programs" / "chromium"
PACKAGES = ("chromium", "fonts-dejavu-core")
TIMEOUT_S = 600.0


class Missing(Exception):
    """There is no Chromium and none can be had; the message says why."""


def run(argv: Sequence[str], *, cwd: Path | None = None) -> str:
    """What the command prints; Missing if it fails."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"no Chromium: {error}") from None
    if done.returncode:
        raise Missing(f"no Chromium: {shlex.join(argv)}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def lacking(simulated: str) -> list[str]:
    """The packages that `apt-get --simulate install` would install."""
    return re.findall(r"^Inst (\S+)", simulated, re.MULTILINE)


def launcher(folder: Path) -> str:
    """A script that starts the unpacked program with the libraries that were unpacked with it."""
    libraries = sorted({str(path.parent) for path in folder.rglob("*.so*")})
    program = folder / "usr" / "lib" / "chromium" / "chromium"
    path = shlex.quote(":".join(libraries))
    return f'#!/bin/sh\nexport LD_LIBRARY_PATH={path}\nexec {shlex.quote(str(program))} "$@"\n'


def unpack(folder: Path) -> Path:
    """Download the packages that the machine lacks and unpack them; no root is needed."""
    coming = folder.with_name(folder.name + ".coming")
    shutil.rmtree(coming, ignore_errors=True)
    coming.mkdir(parents=True)
    wanted = lacking(run(["apt-get", "--simulate", "install", "--no-install-recommends", *PACKAGES]))
    run(["apt-get", "download", *wanted], cwd=coming)
    for package in coming.glob("*.deb"):
        run(["dpkg-deb", "--extract", str(package), str(coming)])
        package.unlink()
    coming.rename(folder)
    start = folder / "run"
    start.write_text(launcher(folder))
    start.chmod(0o755)
    return start


def obtain() -> Path:
    """The program, as it is or as it is after this; raises Missing."""
    for found in (INSTALLED, UNPACKED / "run"):
        if os.access(found, os.X_OK):
            return found
    if shutil.which("apt-get") is None:
        raise Missing("no Chromium: there is no apt-get here; install one as /usr/bin/chromium")
    if os.geteuid() != 0:
        return unpack(UNPACKED)
    run(["apt-get", "-qq", "update"])
    run(["apt-get", "-qq", "install", "-y", "--no-install-recommends", *PACKAGES])
    return INSTALLED


if __name__ == "__main__":
    try:
        print(obtain())
    except Missing as error:
        sys.exit(str(error))
