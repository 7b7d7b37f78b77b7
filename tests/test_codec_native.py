"""The C library: every path, at the edge of the pages it may touch, around the cache, by several threads; and without it."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from codec_backends import random_bytes
from ghostserve.codec import choose, native_backend
from ghostserve.codec.base import Bytes
from ghostserve.codec.field import PRODUCTS, Elements
from ghostserve.codec.matrix import parity_matrix
from ghostserve.codec.native_backend import (
    BIT_MATRICES,
    STREAM_BYTES_MIN,
    THREAD_BYTES_MIN,
    NativeBackend,
)
from ghostserve.codec.reference import ReferenceBackend
from ghostserve.native import Path256, build, load

PATHS = load().paths
PAGE = mmap.PAGESIZE


def reference(matrix: Elements, sources: list[Bytes]) -> list[Bytes]:
    out = [np.zeros_like(sources[0]) for _ in matrix]
    ReferenceBackend().combine(matrix, [sources], [out], accumulate=False)
    return out


def test_the_bit_matrices_multiply() -> None:
    """As Intel's manual defines GF2P8AFFINEQB: bit i of the result is the parity of byte 7 - i of the matrix and x."""
    for factor in range(256):
        rows = int(BIT_MATRICES[factor]).to_bytes(8, "little")
        for x in (0, 1, 2, 3, 0x53, 0x80, 0xCA, 0xFF):
            product = sum(((rows[7 - i] & x).bit_count() & 1) << i for i in range(8))
            assert product == PRODUCTS[factor, x]


class Guarded:
    """Memory between two pages that nobody may touch: a byte too far is a SIGSEGV."""

    def __init__(self, pages: int) -> None:
        self._map = mmap.mmap(-1, (pages + 2) * PAGE)
        whole = np.frombuffer(self._map, np.uint8)
        self.array = whole[PAGE:-PAGE]
        first = whole.__array_interface__["data"][0]
        libc = ctypes.CDLL(None, use_errno=True)
        for place in (first, first + (pages + 1) * PAGE):
            assert libc.mprotect(ctypes.c_void_p(place), PAGE, 0) == 0, os.strerror(ctypes.get_errno())


@pytest.fixture(scope="module")
def guarded() -> list[Guarded]:
    return [Guarded(1) for _ in range(10)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name.lower())
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("accumulate", [False, True])
def test_nothing_beyond_the_shards_is_touched(
    path: Path256, rows: int, accumulate: bool, guarded: list[Guarded]
) -> None:
    backend, matrix = NativeBackend(path=path), np.array(random_bytes(rows, 4, 9))
    for length in [*range(1, 140), 255, 256, 257, 511, 513, PAGE - 1, PAGE]:
        for at_end in (False, True):
            places = [g.array[PAGE - length :] if at_end else g.array[:length] for g in guarded]
            sources, targets = places[:4], places[4 : 4 + rows]
            for source, content in zip(sources, random_bytes(4, length), strict=True):
                source[:] = content
            for target in targets:
                target[:] = 0
            backend.combine(matrix, [sources], [targets], accumulate=accumulate)
            assert all(map(np.array_equal, targets, reference(matrix, sources)))


def test_a_byte_too_far_dies() -> None:
    """Negative control: the guard pages work."""
    code = (
        "import test_codec_native as t, numpy as np; g = t.Guarded(1); "
        "np.lib.stride_tricks.as_strided(g.array, (t.PAGE + 1,))[t.PAGE]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, timeout=60
    )
    assert done.returncode == -11


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name.lower())
@pytest.mark.parametrize("offsets", [(0, 0, 0), (1, 1, 1), (63, 63, 63), (0, 16, 32), (5, 5, 6)])
def test_stores_around_the_cache(path: Path256, offsets: tuple[int, int, int]) -> None:
    """Long enough for streaming stores; targets aligned, misaligned together, and each in its own way."""
    length = STREAM_BYTES_MIN // 11 + 77
    sources = random_bytes(8, length)
    matrix = parity_matrix(8, 3)
    targets = []
    for offset in offsets:
        memory = np.full(length + 256, 0x5A, np.uint8)
        start = -memory.__array_interface__["data"][0] % 64 + offset
        targets.append((memory, start))
    views = [memory[start : start + length] for memory, start in targets]
    assert native_backend._should_stream(np.array([length], np.uint64), rows=3, columns=8)
    NativeBackend(path=path).combine(matrix, [sources], [views], accumulate=False)
    for (memory, start), view, expected in zip(targets, views, reference(matrix, sources), strict=True):
        assert np.array_equal(view, expected)
        assert (memory[:start] == 0x5A).all()
        assert (memory[start + length :] == 0x5A).all()


@pytest.mark.parametrize(
    ("rows", "columns", "length", "streams"),
    [
        (3, 8, 64 << 20, True),
        (1, 4, 64 << 20, True),
        (3, 4, 64 << 20, False),
        (1, 8, 1 << 10, False),
        (6, 32, 64 << 20, False),
    ],
)
def test_when_stores_go_around_the_cache(rows: int, columns: int, length: int, streams: bool) -> None:
    lengths = np.array([length], np.uint64)
    assert native_backend._should_stream(lengths, rows=rows, columns=columns) is streams


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_bytes(threads: int) -> None:
    """Several segments of odd lengths, cut at other places than where threads begin."""
    lengths = [THREAD_BYTES_MIN + 13, 5, 2 * THREAD_BYTES_MIN - 7, 1]
    sources = [random_bytes(3, length) for length in lengths]
    targets = [[np.zeros(length, np.uint8) for _ in range(2)] for length in lengths]
    backend = NativeBackend(threads=threads)
    call = backend.prepare(parity_matrix(3, 2), sources, targets)
    for _ in range(2):
        for segment in targets:
            for target in segment:
                target[:] = 0
        call()
        for segment, made in zip(sources, targets, strict=True):
            assert all(map(np.array_equal, made, reference(parity_matrix(3, 2), segment)))


def test_a_prepared_call_sees_what_the_arrays_hold_then() -> None:
    sources, target = random_bytes(2, 100), np.zeros(100, np.uint8)
    call = NativeBackend().prepare(parity_matrix(2, 1), [sources], [[target]])
    sources[0][:] = 7
    call()
    assert np.array_equal(target, sources[1] ^ 7)


def test_a_path_that_the_processor_lacks() -> None:
    missing = next(path for path in Path256 if path not in PATHS)
    with pytest.raises(ValueError, match=missing.name):
        NativeBackend(path=missing)


# ---- without it ------------------------------------------------------------------------------------------------------


def test_without_the_library_numpy_does_it_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def missing() -> None:
        load(tmp_path / "libghostserve.so")

    monkeypatch.setattr("ghostserve.codec.native_backend.load", missing)
    monkeypatch.setattr(choose, "_warned", set())
    with caplog.at_level(logging.WARNING):
        codecs = [choose.host_codec(3, 2) for _ in range(3)]
    assert {codec.backend.name for codec in codecs} == {"numpy"}
    (warning,) = caplog.records
    assert "slow" in warning.message
    assert "python -m ghostserve.native.build" in warning.message


def test_with_the_library_the_fastest_path_is_taken() -> None:
    assert choose.host_codec(2, 1).backend.name == f"native ({PATHS[-1].name.lower()})"


def test_a_library_of_another_build_is_an_oserror(tmp_path: Path) -> None:
    """Without our functions, and with an interface of another number."""
    for name, source in (("none", "int f;"), ("other", "int ghostserve_abi(void) { return 999; }")):
        code, library = tmp_path / f"{name}.c", tmp_path / f"{name}.so"
        code.write_text(source)
        compiler = shutil.which("cc") or pytest.skip("no C compiler")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, code], check=True, timeout=60)
        with pytest.raises(OSError, match="another build"):
            load(library)


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_broken_library_is_an_oserror(content: bytes, tmp_path: Path) -> None:
    library = tmp_path / "libghostserve.so"
    library.write_bytes(content)
    with pytest.raises(OSError, match="libghostserve"):
        load(library)


# ---- building --------------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match="pip install ziglang"):
        build.build(tmp_path / "x.so")
    with pytest.raises(build.BuildError, match="pip install ziglang"):
        build.build(tmp_path / "x.so", target="aarch64-linux-musl")
    assert not list(tmp_path.iterdir())


def test_a_failing_compiler_leaves_the_library_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "false --really")
    library = tmp_path / "x.so"
    library.write_bytes(b"as it was")
    assert build.main(["--output", str(library)]) == 1
    assert "false --really" in capsys.readouterr().err
    assert library.read_bytes() == b"as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["x.so"]
