"""Fetches the programs that only tests use from Debian's packages into `.venv/programs`, without root; quick once they are there.

    scripts/programs [--into DIR]

Packages are downloaded and unpacked, not installed. Where that cannot be (no Debian, no network) each missing program gets a
sentence that says why, in `NAME.missing` beside them: its tests say "not run" with it, and fail in CI (`tests/external.py`). The
exit status is 0 all the same: what users run needs none of this.

Standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / ".venv" / "programs"
PACKAGES = {"promtool": "prometheus", "prometheus": "prometheus"}
"""Which Debian package has a program."""
DOWNLOAD_S = 180.0
QUIET = ("-qq", "-o", "APT::Sandbox::User=", "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=20")


class NotHad(Exception):
    """A package cannot be had here; the message says why."""


def find(program: str, into: Path = PROGRAMS) -> str | None:
    """Where a program is: on the PATH, or where we put it."""
    return shutil.which(program) or shutil.which(program, path=f"{into}/usr/bin:{into}/usr/sbin")


def fetch(package: str, into: Path) -> None:
    """Download a package and unpack it. Raises NotHad."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise NotHad(f"there is no {tool}: install Debian's package {package} or its like yourself")
    with tempfile.TemporaryDirectory(prefix="ghostserve-programs-") as scratch:
        at = Path(scratch)
        if _run("apt-get", *QUIET, "download", package, cwd=at):
            # No package lists, or old ones, which only root may bring up to date: lists of our own.
            own = _own_lists(at)
            for words in (("update",), ("download", package)):
                if trouble := _run("apt-get", *QUIET, *own, *words, cwd=at):
                    raise NotHad(f"apt-get {' '.join(words)}: {trouble}")
        (deb,) = at.glob("*.deb")
        if trouble := _run("dpkg", "-x", str(deb), str(into), cwd=at):
            raise NotHad(f"dpkg -x {deb.name}: {trouble}")


def _own_lists(scratch: Path) -> list[str]:
    """Options that have apt keep its state where we may write."""
    lists, cache = scratch / "lists", scratch / "cache"
    for folder in (lists, cache):
        (folder / "partial").mkdir(parents=True)
    return ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}"]


def _run(*argv: str, cwd: Path) -> str:
    """Run to its end; what it said if it failed, on one line, else nothing."""
    try:
        done = subprocess.run(
            argv, cwd=cwd, capture_output=True, text=True, timeout=DOWNLOAD_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {DOWNLOAD_S:.0f} s"
    if done.returncode == 0:
        return ""
    return " ".join((done.stderr or done.stdout).split())[-300:] or f"exit status {done.returncode}"


def obtain(into: Path, packages: Mapping[str, str]) -> dict[str, str]:
    """Have every program; those that cannot be had, each with the reason."""
    into.mkdir(parents=True, exist_ok=True)
    missing: dict[str, str] = {}
    for package in dict.fromkeys(packages.values()):
        programs = [program for program, of in packages.items() if of == package]
        if all(find(program, into) for program in programs):
            continue
        print(f"fetching {', '.join(programs)} for the tests (Debian's package {package})", flush=True)
        reason = f"package {package} has none"
        try:
            fetch(package, into)
        except NotHad as trouble:
            reason = str(trouble)
        missing |= {program: reason for program in programs if find(program, into) is None}
    for program in packages:
        (into / f"{program}.missing").unlink(missing_ok=True)
    for program, reason in missing.items():
        (into / f"{program}.missing").write_text(reason + "\n")
        print(f"  {program} cannot be had, so its tests are not run: {reason}", flush=True)
    return missing


def main(argv: Sequence[str]) -> int:
    """Obtain them all."""
    parser = argparse.ArgumentParser(
        prog="scripts/programs", description="Fetch the programs that tests use."
    )
    parser.add_argument("--into", type=Path, default=PROGRAMS, help="where to (default: %(default)s)")
    obtain(parser.parse_args(argv).into.absolute(), PACKAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
