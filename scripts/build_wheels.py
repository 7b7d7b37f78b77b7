"""Wheels with the native library, one for each platform, whatever the Python: `dist/ghostserve-*-py3-none-PLATFORM.whl`.

    .venv/bin/python scripts/build_wheels.py [--target TRIPLE ...] [--out DIR]

All are made on one Linux machine with the compiler of the package `ziglang` (pip install ziglang). The pure wheel is
built once; each platform's is that one with its library and its tag.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ghostserve.native.build import TARGETS, BuildError, build

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "ghostserve/native/libghostserve.so"


def pure_wheel(directory: Path) -> Path:
    """The wheel without a library, built from a copy: an old `build` folder would add what is no longer there.

    CalledProcessError if pip fails.
    """
    copy = directory / "source"
    for name in ("src", "LICENSE", "NOTICE", "README.md", "pyproject.toml"):
        place = ROOT / name
        if place.is_dir():
            shutil.copytree(
                place, copy / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__", "*.so")
            )
        else:
            copy.mkdir(exist_ok=True)
            shutil.copy(place, copy)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(directory),
    ]
    subprocess.run([*pip, str(copy)], check=True, timeout=300)
    (wheel,) = directory.glob("*.whl")
    return wheel


def pack(pure: Path, library: bytes, tag: str, out: Path) -> Path:
    """The wheel of one platform, made of the pure one."""
    name = pure.name.replace("-py3-none-any.whl", f"-py3-none-{tag}.whl")
    with zipfile.ZipFile(pure) as source:
        files = {item.filename: source.read(item) for item in source.infolist() if not item.is_dir()}
    files.pop(LIBRARY, None)  # of the machine that built the pure one
    files[LIBRARY] = library
    record = next(file for file in files if file.endswith(".dist-info/RECORD"))
    wheel = record.replace("RECORD", "WHEEL")
    lines = [
        line
        for line in files[wheel].decode().splitlines()
        if line and not line.startswith(("Tag:", "Root-Is-Purelib:"))
    ]
    files[wheel] = "\n".join([*lines, "Root-Is-Purelib: false", f"Tag: py3-none-{tag}", ""]).encode()
    files[record] = "".join(
        f"{file},{_digest(file, content, record)}\n" for file, content in files.items()
    ).encode()
    with zipfile.ZipFile(out / name, "w", zipfile.ZIP_DEFLATED) as target:
        for file, content in sorted(files.items(), key=lambda item: (".dist-info/" in item[0], item[0])):
            info = zipfile.ZipInfo(file, (1980, 1, 1, 0, 0, 0))  # the same bytes whenever it is built
            info.external_attr, info.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            target.writestr(info, content)
    return out / name


def _digest(file: str, content: bytes, record: str) -> str:
    """What RECORD says of a file: its hash and size; of itself nothing."""
    if file == record:
        return ","
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"sha256={digest},{len(content)}"


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 1 with the reason."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        try:
            pure = pure_wheel(Path(directory))
            for target in arguments.target or TARGETS:
                library = Path(directory) / "library"
                build(library, target=target)
                print(pack(pure, library.read_bytes(), TARGETS[target], arguments.out), flush=True)
        except (BuildError, subprocess.SubprocessError) as error:
            print(f"build_wheels: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
