"""The Triton kernel, interpreted on the CPU, against the reference. In processes of their own: where Triton can be
imported vLLM chooses another model runner, so it is installed beside the environment, not into it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from real.overlay import triton

TESTS = Path(__file__).parents[1]

CONTRACT = """
import itertools, sys
import numpy as np, torch
from codec_backends import random_bytes
from ghostserve.codec.erasure import ErasureCodec
from ghostserve.codec.reference import ReferenceBackend
from ghostserve.codec.triton_backend import TritonBackend

def shards(arrays, offset):
    made = []
    for array in arrays:
        memory = torch.zeros(len(array) + 64, dtype=torch.uint8)
        start = -memory.data_ptr() % 16 + offset
        memory[start:start + len(array)] = torch.from_numpy(array)
        made.append(memory[start:start + len(array)])
    return made

def check(n, m, length, offset, patterns):
    mine, reference = ErasureCodec(n, m, TritonBackend()), ErasureCodec(n, m, ReferenceBackend())
    data, parity = random_bytes(n, length), random_bytes(m, length, 1)
    on_device = shards(data + parity, offset)
    mine.encode(on_device[:n], on_device[n:])
    reference.encode(data, parity)
    expected = data + parity
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(expected, on_device)), (n, m, length, offset)
    for lost in patterns:
        out = shards([np.zeros(length, np.uint8) for _ in lost], offset)
        given = [None if i in lost else shard for i, shard in enumerate(on_device)]
        mine.reconstruct(given, lost=lost, out=out)
        assert all(np.array_equal(expected[i], made.numpy()) for i, made in zip(lost, out)), (n, m, lost)
    return len(patterns)

count = 0
for n, m in itertools.product(range(1, 9), range(1, 5)):
    every = [lost for k in range(1, m + 1) for lost in itertools.combinations(range(n + m), k)]
    step = 1 if sys.argv[1] == "all" else 1 + len(every) // 2
    count += check(n, m, (257, 4096 + 16, 37, 5001)[n % 4], (0, 3)[(n + m) % 5 == 0], every[::step])
lengths = (0, 1, 15, 16, 17, 31, 32, 33, 4095, 4096, 4097, 16384 + 5)
for length in range(40) if sys.argv[1] == "all" else lengths:
    for offset in (0, 1):
        check(3, 3, length, offset, [(0, 1, 2)])
check(20, 9, 100, 0, [tuple(range(9))])

codec = ErasureCodec(3, 4, TritonBackend())
on_device = shards(random_bytes(7, 100), 0)
codec.encode(on_device[:3], on_device[3:])
new = shards(random_bytes(1, 100, 5), 0)[0]
codec.update(1, old=on_device[1], new=new, parity=on_device[3:])
on_device[1] = new
assert codec.verify(on_device) == ()
on_device[2][40] ^= 128
assert codec.locate(on_device) == 2
scattered = [[shard[:11], shard[11:64], shard[64:]] for shard in on_device[:3]]
codec.encode(scattered, on_device[3:])
assert codec.verify(on_device) == ()
print(f"{count} patterns")
"""


@pytest.fixture(scope="module")
def overlay() -> Path:
    return triton()


def run(overlay: Path, which: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join((str(overlay), str(TESTS)))}
    return subprocess.run(
        [sys.executable, "-c", CONTRACT, which], env=env, capture_output=True, text=True, timeout=1500
    )


@pytest.mark.real
@pytest.mark.timeout(600)
def test_the_kernel_equals_the_reference(overlay: Path) -> None:
    """A sample of the patterns of loss for every n <= 8 and m <= 4."""
    done = run(overlay, "sample")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("patterns\n")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_pattern(overlay: Path) -> None:
    done = run(overlay, "all")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.real
def test_vllm_does_not_see_triton(overlay: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import triton"], capture_output=True, timeout=60)
    assert done.returncode != 0


PTX = """
import sys
import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ghostserve.codec.matrix import parity_matrix, rebuild_matrix
from ghostserve.codec.triton_kernel import combine_kernel

NAMES = ("COLUMNS", "ROWS", "MATRIX", "HORNER", "WORDS", "ACCUMULATE", "BLOCK")

def ptx(matrix, *, horner, words, accumulate):
    rows, columns = matrix.shape
    number = 0 if horner else int.from_bytes(matrix.tobytes(), "little")
    values = (columns, rows, number, horner, words, accumulate, 1024)
    signature = {name: "*i64" for name in ("sources", "targets", "lanes")} | dict.fromkeys(NAMES, "constexpr")
    source = ASTSource(
        fn=combine_kernel,
        signature=signature,
        constexprs={(list(signature).index(name),): value for name, value in zip(NAMES, values)},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

encode, decode = parity_matrix(4, 3), rebuild_matrix(4, 3, (2, 3, 4, 5), (0, 1))
for matrix, horner in ((encode, True), (decode, False), (parity_matrix(3, 4), False)):
    for accumulate in (False, True):
        made = ptx(matrix, horner=horner, words=True, accumulate=accumulate)
        assert "ld.global.v4" in made and "st.global.v4" in made, "16 bytes at a time"
ptx(encode, horner=True, words=False, accumulate=False)
ptx(decode, horner=False, words=False, accumulate=False)
print("compiled")
"""


@pytest.mark.real
@pytest.mark.timeout(300)
def test_the_kernel_compiles_for_a_gpu(overlay: Path, tmp_path: Path) -> None:
    """The interpreter takes what the compiler refuses; none of this needs a GPU."""
    env = os.environ | {"PYTHONPATH": str(overlay), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PTX], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "compiled\n"
