"""scripts/programs and tests/external.py: a program that only tests use is fetched, or missed with a reason that is said."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import programs
from external import DEMAND_ENV, need

PACKAGES = {"gs-one": "gs-package", "gs-two": "gs-package"}


def command(folder: Path, name: str, script: str) -> None:
    """An executable for the PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder before all others on the PATH."""
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


UNPACKS = 'mkdir -p "$3/usr/bin"; for name in gs-one gs-two; do printf "#!/bin/sh\\n" > "$3/usr/bin/$name"; chmod +x "$3/usr/bin/$name"; done'
DOWNLOADS = 'for last; do :; done; echo "$*" >> "$LOG"; touch gs-package_1_amd64.deb'


def test_a_package_is_downloaded_and_unpacked_once(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("LOG", str(log))
    command(path, "apt-get", DOWNLOADS)
    command(path, "dpkg", UNPACKS)
    into = tmp_path / "programs"
    assert programs.obtain(into, PACKAGES) == {}
    assert need("gs-two", into=into) == f"{into}/usr/bin/gs-two"
    assert "fetching gs-one, gs-two for the tests" in capsys.readouterr().out
    assert programs.obtain(into, PACKAGES) == {}
    assert capsys.readouterr().out == ""
    assert len(log.read_text().splitlines()) == 1, "one download for both, and none the second time"


def test_old_package_lists_are_replaced_by_lists_of_our_own(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container without any: only root may bring the system's up to date."""
    log = tmp_path / "log"
    monkeypatch.setenv("LOG", str(log))
    command(path, "apt-get", f'case "$*" in *Dir::State::lists*) {DOWNLOADS};; *) exit 100;; esac')
    command(path, "dpkg", UNPACKS)
    assert programs.obtain(tmp_path / "programs", PACKAGES) == {}
    assert [line.split()[-1] for line in log.read_text().splitlines()] == ["update", "gs-package"]


def test_what_cannot_be_had_is_said_and_noted(
    tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(path, "apt-get", 'echo "E: no network" >&2; exit 100')
    into = tmp_path / "programs"
    assert set(programs.obtain(into, PACKAGES)) == {"gs-one", "gs-two"}
    said = capsys.readouterr().out
    assert "gs-one cannot be had, so its tests are not run: apt-get update: E: no network" in said
    with pytest.raises(
        pytest.skip.Exception, match="not run: there is no gs-one here: apt-get update: E: no network"
    ):
        need("gs-one", into=into, environment={})


def test_without_debians_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    reasons = programs.obtain(tmp_path / "programs", PACKAGES)
    assert (
        reasons["gs-one"] == "there is no apt-get: install Debian's package gs-package or its like yourself"
    )


@pytest.mark.parametrize("environment", [{"CI": "true"}, {DEMAND_ENV: "1"}])
def test_where_programs_are_demanded_a_missing_one_fails(tmp_path: Path, environment: dict[str, str]) -> None:
    with pytest.raises(pytest.fail.Exception, match="not run: there is no gs-one here: run scripts/programs"):
        need("gs-one", into=tmp_path, environment=environment)


@pytest.mark.parametrize("environment", [{}, {"CI": ""}, {DEMAND_ENV: ""}])
def test_elsewhere_it_is_skipped(tmp_path: Path, environment: dict[str, str]) -> None:
    with pytest.raises(pytest.skip.Exception, match="not run"):
        need("gs-one", into=tmp_path, environment=environment)


def test_a_program_of_the_system_is_taken(tmp_path: Path, path: Path) -> None:
    command(path, "gs-one", "")
    assert need("gs-one", into=tmp_path / "none") == str(path / "gs-one")


def test_the_command_never_fails_an_install(tmp_path: Path, path: Path) -> None:
    """Everything is on the PATH here, so that nothing is fetched."""
    for program in programs.PACKAGES:
        command(path, program, "")
    done = subprocess.run(
        [programs.ROOT / "scripts" / "programs", "--into", tmp_path / "programs"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
