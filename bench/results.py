"""Result files: `bench/results/NAME-DATE.json` with every sample, a Markdown table beside it, and a picture where there is one.

Both say on what they were measured. Neither names the host, its user or its directories.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

import ghostserve
from ghostserve.cli.platform_check import VLLM_DISTRIBUTIONS, installed_version
from ghostserve.clock import wall_s

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS_DIR = REPOSITORY / "bench" / "results"
CPU_FLAGS = ("avx2", "avx512f", "avx512bw", "avx512_vnni", "amx_tile", "gfni", "asimd", "sve")
PICTURE = "PICTURE.svg"
_NAME_LENGTH_MIN = 4  # a host called "a" is in every text


def facts() -> dict[str, Any]:
    """What the measurements depend on. Call it before anything is started: it holds the load before."""
    cpu = _cpu()
    return {
        "date": datetime.fromtimestamp(wall_s(), UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": cpu["model"],
        "cores": len(os.sched_getaffinity(0)),
        "cpu_flags": {flag: flag in cpu["flags"] for flag in CPU_FLAGS},
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
        "versions": {
            "ghostserve": ghostserve.__version__,
            "vllm": installed_version(*VLLM_DISTRIBUTIONS),
            "torch": installed_version("torch"),
            "python": platform.python_version(),
        },
    }


def _cpu() -> dict[str, Any]:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return {"model": fields.get("model name", platform.machine()), "flags": set(flags.split())}


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=10)
    return answer.stdout.strip()


def redact(text: str, secrets: Mapping[str, str]) -> str:
    """Replace each secret by its word, the longest first, since one may be part of another."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _NAME_LENGTH_MIN:
            text = text.replace(secret, secrets[secret])
    return text


def _local_names() -> dict[str, str]:
    return {
        str(REPOSITORY): "REPOSITORY",
        str(Path.home()): "HOME",
        tempfile.gettempdir() + "/": "TMP/",
        socket.gethostname(): "HOST",
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def facts_lines(about: Mapping[str, Any]) -> str:
    """The facts, as a short list."""
    flags = " ".join(flag for flag, there in about["cpu_flags"].items() if there) or "none of those asked for"
    versions = " · ".join(f"{name} {version}" for name, version in about["versions"].items())
    load = " ".join(str(value) for value in about["load_average_before"])
    changes = " with uncommitted changes" if about["uncommitted_changes"] else ""
    return "\n".join(
        (
            f"- {about['date']}, commit {about['commit'][:12]}{changes}",
            f"- {about['cpu']}, {about['cores']} cores ({flags}), {about['memory_gib']} GiB, kernel {about['kernel']}",
            f"- {versions}",
            f"- load average before: {load}",
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written, and the tables with the picture's name."""

    paths: list[Path]
    markdown: str


def write(
    name: str,
    *,
    about: Mapping[str, Any],
    document: Mapping[str, Any],
    markdown: str,
    directory: Path,
    draw: Callable[[Path], None] | None = None,
) -> Written:
    """Write both files, and a picture where one is drawn; its name comes where PICTURE stands in the Markdown.

    A second run of a day gets a number; nothing is overwritten.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stem = unused_stem(f"{name}-{about['date'][:10]}", {path.stem for path in directory.iterdir()})
    names = _local_names()
    markdown = markdown.replace(PICTURE, f"{stem}.svg")
    written = {
        ".json": json.dumps({"facts": about, **document}, indent=1) + "\n",
        ".md": f"# {name}\n\n{facts_lines(about)}\n\n{markdown.strip()}\n",
    }
    paths = [directory / (stem + suffix) for suffix in written]
    for path, text in zip(paths, written.values(), strict=True):
        path.write_text(redact(text, names), encoding="utf-8")
    if draw is not None:
        paths.append(directory / f"{stem}.svg")
        draw(paths[-1])
    return Written(paths=paths, markdown=markdown)


def unused_stem(stem: str, taken: set[str]) -> str:
    """`stem`, or the first of `stem-2`, `stem-3`, ... that nobody has."""
    number, candidate = 1, stem
    while candidate in taken:
        number += 1
        candidate = f"{stem}-{number}"
    return candidate
