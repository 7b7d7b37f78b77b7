"""A Dockerfile as far as it can be run without Docker: its instructions, and its RUN steps as commands in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a Dockerfile, continuation lines joined."""

    word: str
    rest: str


def read(dockerfile: Path) -> list[Instruction]:
    """All instructions in order; comments are left out."""
    text = "\n".join(
        line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")
    )
    joined = re.sub(r"\\\n\s*", " ", text)
    pairs = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [Instruction(word.upper(), rest) for word, rest in pairs]


def run(
    instructions: list[Instruction], *, root: Path, context: Path, change: Callable[[str], str | None]
) -> list[str]:
    """Run what comes before USER with `root` for `/`; the commands that were run.

    WORKDIR, COPY, ENV and RUN are understood. `change` may change a command, or leave it out with None: what installs into
    the system does not belong into a test.
    """
    folder, environment, done = root, _bare_environment(), []
    for instruction in instructions:
        match instruction.word:
            case "WORKDIR":
                folder = root / PurePosixPath(instruction.rest).relative_to("/")
                folder.mkdir(parents=True, exist_ok=True)
            case "COPY":
                assert instruction.rest == ". .", instruction.rest
                copy_context(context, folder)
            case "ENV":
                environment |= dict(pair.split("=", 1) for pair in instruction.rest.split())
            case "RUN":
                command = change(instruction.rest)
                if command is not None:
                    _run(command, folder, environment)
                    done.append(command)
            case "USER":
                break
    return done


def _bare_environment() -> dict[str, str]:
    """As in a container, less what this machine needs to reach its package index."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PIP_") or "proxy" in name.lower()
    }
    return {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "LANG": "C.UTF-8", **kept}


def _run(command: str, folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=900
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def copy_context(context: Path, folder: Path) -> None:
    """What git knows, less what .dockerignore names: what a build from a clean clone would copy."""
    ignored = (context / ".dockerignore").read_text().split("\n")
    tops = {line for line in ignored if line and not line.startswith("#") and "/" not in line}
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=context, capture_output=True, text=True, check=True)  # fmt: skip
    for name in listed.stdout.splitlines():
        if name.split("/")[0] in tops or not (context / name).is_file() or name == ".venv":
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(context / name, folder / name)
