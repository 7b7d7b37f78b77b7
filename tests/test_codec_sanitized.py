"""The contract test on a build with address and undefined-behaviour sanitizers (the system's compiler)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ghostserve.native import LIBRARY, build

TESTS = Path(__file__).parent
CC = shutil.which("gcc")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")
BROKEN = "typedef unsigned char u8; void f(u8 *p) { p[32] = 1; }"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CC is None, reason="no gcc")]


def run(library: Path, *command: str) -> subprocess.CompletedProcess[str]:
    asan = subprocess.run(
        [str(CC), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    env = os.environ | {
        "LD_PRELOAD": asan.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(TESTS / "native"),
        "GHOSTSERVE_TEST_LIBRARY": str(library),
    }
    return subprocess.run(
        [sys.executable, *command], cwd=TESTS.parent, env=env, capture_output=True, text=True, timeout=1500
    )


@pytest.mark.timeout(1600)
def test_the_contract_holds_under_sanitizers(tmp_path: Path) -> None:
    library = tmp_path / "libghostserve.so"
    sources = [str(LIBRARY.parent / source) for source in build.SOURCES]
    subprocess.run([str(CC), *build.FLAGS, *SANITIZE, "-o", str(library), *sources], check=True, timeout=300)
    tests = ["tests/test_codec_contract.py", "tests/test_codec_native.py"]
    skipped = [
        "--deselect",
        "tests/test_codec_native.py::test_a_byte_too_far_dies",
    ]  # the sanitizer takes the signal
    done = run(
        library,
        "-m",
        "pytest",
        "-q",
        "-p",
        "sanitized",
        "-p",
        "no:cacheprovider",
        "-k",
        "native or scattered",
        *tests,
        *skipped,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_the_sanitizer_finds_a_byte_too_far(tmp_path: Path) -> None:
    """Negative control."""
    source, library = tmp_path / "broken.c", tmp_path / "broken.so"
    source.write_text(BROKEN)
    subprocess.run(
        [str(CC), "-shared", "-fPIC", *SANITIZE, "-o", str(library), str(source)], check=True, timeout=60
    )
    code = f"import ctypes; l = ctypes.CDLL({str(library)!r}); m = ctypes.CDLL(None); m.malloc.restype = ctypes.c_void_p; l.f(ctypes.c_void_p(m.malloc(32)))"
    done = run(library, "-c", code)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
