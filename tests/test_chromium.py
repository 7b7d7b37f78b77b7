"""Obtaining a Chromium, with stand-ins for apt-get and dpkg-deb; and that a missing one is a failure where it is demanded."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import browser_kit
import chromium
from external import DEMAND_ENV

APT_GET = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
*--simulate*) echo 'Inst libfoo (1.0 Debian:12 [amd64])'; echo 'Inst chromium (2)'; echo 'Conf libfoo (1.0)';;
download*) shift; for name; do echo "$name" > "$name.deb"; done;;
esac
"""
DPKG_DEB = """#!/bin/sh
at=$3/usr/lib/$(basename "$2" .deb)
mkdir -p "$at"
case "$2" in
*chromium*) printf '#!/bin/sh\\necho "$LD_LIBRARY_PATH" "$@"\\n' > "$at/chromium"; chmod +x "$at/chromium";;
*) touch "$at/libfoo.so.1";;
esac
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a Chromium, where we are not root; the folder of its programs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(chromium, "INSTALLED", tmp_path / "none")
    monkeypatch.setattr(chromium, "UNPACKED", tmp_path / "unpacked")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return programs


def put(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def test_without_root_it_is_unpacked_with_what_it_lacks(machine: Path, tmp_path: Path) -> None:
    put(machine, "apt-get", APT_GET)
    put(machine, "dpkg-deb", DPKG_DEB)
    program = chromium.obtain()
    done = subprocess.run([program, "--headless"], capture_output=True, text=True, check=True, timeout=10)
    assert done.stdout == f"{tmp_path}/unpacked/usr/lib/libfoo --headless\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[1] == "download libfoo chromium"
    assert chromium.obtain() == program
    assert (tmp_path / "calls").read_text().splitlines() == calls  # it is there


def test_as_root_it_is_installed(machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    put(machine, "apt-get", APT_GET)
    assert chromium.obtain() == tmp_path / "none"
    assert (tmp_path / "calls").read_text().splitlines()[1].startswith("-qq install -y")


def test_why_there_is_none(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(machine, "apt-get", "#!/bin/sh\necho 'E: no network' >&2\nexit 100\n")
    with pytest.raises(chromium.Missing, match="E: no network"):
        chromium.obtain()
    monkeypatch.setenv("PATH", str(machine / "nowhere"))
    with pytest.raises(chromium.Missing, match="no apt-get"):
        chromium.obtain()


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        (None, pytest.skip.Exception),
        ("CI", pytest.fail.Exception),
        (DEMAND_ENV, pytest.fail.Exception),
    ],
)
def test_a_test_without_its_browser(
    machine: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, outcome: type[BaseException]
) -> None:
    for variable in ("CI", DEMAND_ENV):
        monkeypatch.delenv(variable, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PATH", str(machine))
    with pytest.raises(outcome, match="not run: no Chromium"), browser_kit.chromium_or_not_run():
        raise AssertionError
