"""Builds the native library from the C files here.

    python -m ghostserve.native.build [--target TRIPLE] [--output FILE]

The compiler is the one that the environment variable CC names, else `ziglang` from PyPI (any machine with pip has a
compiler that way, for every target), else the system's `cc`. Standard library only.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("gf256.c", "read.c", "collectives.c", "stage.c")
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
)
ZIG_FLAGS = (
    "-mcpu=baseline",
    "-fno-sanitize=all",
    "-s",
)  # zig's defaults: this machine's processor, sanitizers
TIMEOUT_S = 300.0
TARGETS = {  # what zig calls them, and the tag that a wheel carries
    "x86_64-linux-gnu.2.17": "manylinux_2_17_x86_64",
    "aarch64-linux-gnu.2.17": "manylinux_2_17_aarch64",
    "x86_64-linux-musl": "musllinux_1_2_x86_64",
    "aarch64-linux-musl": "musllinux_1_2_aarch64",
    "x86_64-macos.11.0": "macosx_11_0_x86_64",
    "aarch64-macos.11.0": "macosx_11_0_arm64",
}


class BuildError(Exception):
    """There is no compiler, or it failed; the message says what to do."""


def compiler(target: str | None) -> list[str]:
    """The compiler's words, with what it needs to build for `target`; None is this machine."""
    named = os.environ.get("CC")
    if named and target is None:
        return [*shlex.split(named), *FLAGS]
    if importlib.util.find_spec("ziglang") is not None:
        triple = target
        if triple is None and platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
            triple = f"{platform.machine()}-linux-gnu.2.17"
        for_target = [] if triple is None else ["-target", triple]
        return [sys.executable, "-m", "ziglang", "cc", *for_target, *FLAGS, *ZIG_FLAGS]
    if target is not None:
        raise BuildError(f"building for {target} takes the package ziglang: pip install ziglang")
    if shutil.which("cc") is None:
        raise BuildError(
            "there is no C compiler: pip install ziglang, or name one in the environment variable CC"
        )
    return ["cc", *FLAGS]


def build(output: Path, *, target: str | None = None) -> None:
    """Compile to `output`, which is there whole or not at all. BuildError with the compiler's words if it fails."""
    words = compiler(target)
    with tempfile.TemporaryDirectory(prefix="ghostserve-build-") as directory:
        made, beside = Path(directory) / output.name, output.with_name(f".{output.name}")
        command = [*words, "-o", str(made), *(str(HERE / source) for source in SOURCES)]
        caches = {"ZIG_GLOBAL_CACHE_DIR": directory, "ZIG_LOCAL_CACHE_DIR": directory}
        try:
            done = subprocess.run(
                command, env=os.environ | caches, capture_output=True, text=True, timeout=TIMEOUT_S
            )
            if done.returncode != 0 or not made.exists():
                raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
            shutil.copy(made, beside)
            os.replace(beside, output)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{shlex.join(command)}: {error}") from None


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 1 with the reason."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=TARGETS, help="default: this machine")
    parser.add_argument("--output", type=Path, default=HERE / "libghostserve.so", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        build(arguments.output.resolve(), target=arguments.target)
    except BuildError as error:
        print(f"ghostserve.native.build: {error}", file=sys.stderr)
        return 1
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
