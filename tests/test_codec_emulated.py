"""The GFNI and NEON kernels on any machine: compiled against a C model of their instructions. No speed, only bytes."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from codec_backends import random_bytes
from ghostserve.codec import native_backend
from ghostserve.codec.matrix import parity_matrix, rebuild_matrix
from ghostserve.codec.native_backend import NativeBackend
from ghostserve.codec.reference import ReferenceBackend
from ghostserve.native import LIBRARY, Path256, load

HERE = Path(__file__).parent / "native"
CC = shutil.which("cc") or shutil.which("gcc")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CC is None or platform.machine() != "x86_64", reason="takes a C compiler on x86-64"),
]

MODELS = [("emulated_gfni.c", Path256.GFNI512), ("emulated_neon.c", Path256.NEON)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("emulated")
    for source in sorted({source for source, _ in MODELS}):
        flags = ["-std=gnu11", "-O2", "-shared", "-fPIC", "-w", f"-I{HERE}", f"-I{LIBRARY.parent}"]
        subprocess.run(
            [str(CC), *flags, str(HERE / source), "-o", str(directory / f"{source}.so")],
            check=True,
            timeout=120,
        )
    return directory


@pytest.mark.parametrize(("source", "path"), MODELS, ids=lambda value: str(value).partition(".")[0])
def test_the_kernels_bytes(source: str, path: Path256, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = load(built / f"{source}.so")
    monkeypatch.setattr(native_backend, "load", lambda: library)
    backend, reference = NativeBackend(path=path), ReferenceBackend()
    matrices = [parity_matrix(n, m) for n, m in [(1, 1), (2, 2), (8, 3), (5, 4), (3, 7)]]
    matrices.append(rebuild_matrix(6, 3, (3, 4, 5, 6, 7, 8), (0, 1, 2)))
    for matrix in matrices:
        rows, columns = matrix.shape
        for length in [1, 15, 64, 255, 256, 257, 1000, 4113]:
            for accumulate in (False, True):
                made, expected = (random_bytes(rows, length, 3) for _ in range(2))
                sources = random_bytes(columns, length)
                backend.combine(matrix, [sources], [made], accumulate=accumulate)
                reference.combine(matrix, [sources], [expected], accumulate=accumulate)
                assert all(map(np.array_equal, made, expected)), (rows, columns, length, accumulate)


def test_streaming_stores_are_aligned(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model traps on a misaligned one, as the processor does."""
    monkeypatch.setattr(native_backend, "load", lambda: load(built / "emulated_gfni.c.so"))
    monkeypatch.setattr(native_backend, "STREAM_BYTES_MIN", 0)
    monkeypatch.setattr(native_backend, "STREAM_PIECE_BYTES_MIN", 0)
    assert native_backend._should_stream(np.array([2000], np.uint64), rows=3, columns=8)
    for offset in (0, 1, 63):
        memory = [np.zeros(3000, np.uint8) for _ in range(3)]
        starts = [-array.__array_interface__["data"][0] % 64 + offset for array in memory]
        targets = [array[start : start + 2000] for array, start in zip(memory, starts, strict=True)]
        sources = random_bytes(8, 2000)
        NativeBackend(path=Path256.GFNI512).combine(
            parity_matrix(8, 3), [sources], [targets], accumulate=False
        )
        expected = [np.zeros(2000, np.uint8) for _ in range(3)]
        ReferenceBackend().combine(parity_matrix(8, 3), [sources], [expected], accumulate=False)
        assert all(map(np.array_equal, targets, expected))
