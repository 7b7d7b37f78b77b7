"""What the codec reaches on this machine: encode and decode against ISA-L, numpy, torch, and the read ceiling.

All methods of a cell run one after the other in shuffled order, again and again; every ratio is the median of
ratios taken within one repetition. GB/s are bytes of data shards over wall time. Hot: one stripe, again and again (16 MiB shards are in no cache then,
either). Cold: stripes in turn, 256 MiB of them at least. Outputs are re-used: fresh pages would cost two to three times the
arithmetic. Two threads: each takes half of every stripe, or every other one of the short ones. numpy and torch are
far slower: they get three repetitions, on some of the stripes.
"""

from __future__ import annotations

import math
import platform
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ghostserve.clock import monotonic_s
from ghostserve.codec.base import Bytes
from ghostserve.codec.field import Elements
from ghostserve.codec.host import address
from ghostserve.codec.isal_backend import IsalBackend, find_isal
from ghostserve.codec.matrix import choose_sources, parity_matrix, rebuild_matrix
from ghostserve.codec.native_backend import NativeBackend
from ghostserve.codec.numpy_backend import NumpyBackend
from ghostserve.codec.reference import ReferenceBackend
from ghostserve.errors import CheckFailed
from ghostserve.native import Path256, load

KIB, MIB = 1 << 10, 1 << 20
COLD_BYTES = 256 * MIB
REPETITION_S = 0.004
CHECKED_BYTES = 4096
SLOW = frozenset({"numpy", "torch"})
SLOW_BYTES, SLOW_REPETITIONS = 8 * MIB, 3
PAGE_BYTES = 4096
SPLIT_BYTES = MIB  # shards from here on are shared by the threads
PAD_BYTES = 4096 + 64  # keeps shards off each other's cache sets; they begin on cache lines, as in the arena
READ = "read"
NATIVE, ISAL = "native", "isal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One thing to measure. `lost` data shards are decoded; 0 for encode."""

    n: int
    m: int
    lost: int
    shard_bytes: int
    regime: str  # "hot" or "cold"
    threads: int

    @property
    def op(self) -> str:
        return "decode" if self.lost else "encode"

    def coefficients(self) -> tuple[Elements, tuple[int, ...]]:
        """The matrix, and which of the n + m shards it is applied to."""
        if not self.lost:
            return parity_matrix(self.n, self.m), tuple(range(self.n))
        wanted = tuple(range(self.lost))
        chosen = choose_sources(self.n, range(self.lost, self.n + self.m), wanted)
        return rebuild_matrix(self.n, self.m, chosen, wanted), chosen

    def __str__(self) -> str:
        size = f"{self.shard_bytes // MIB}M" if self.shard_bytes >= MIB else f"{self.shard_bytes // KIB}K"
        lost = f" lost={self.lost}" if self.lost else ""
        return f"{self.op} n={self.n} m={self.m}{lost} {size} {self.regime} threads={self.threads}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method in one cell."""

    op: str
    n: int
    m: int
    lost: int
    shard_bytes: int
    regime: str
    threads: int
    backend: str
    gb_per_s: float
    fraction_of_read: float
    ratio_to_isal: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All rows, and what they were measured with."""

    cpu: str
    dispatched: str
    isal: str | None
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_cells(*, quick: bool) -> list[Cell]:
    """The cells: the whole grid, or a dozen that show each regime, code and operation once."""
    if quick:
        chosen = [
            *((8, 1, 0, size, regime, 1) for size, regime in ((64 * KIB, "hot"), (16 * MIB, "cold"))),
            *((8, 2, 0, size, regime, 1) for size, regime in ((64 * KIB, "hot"), (16 * MIB, "cold"))),
            *(
                (8, 3, 0, size, regime, 1)
                for size, regime in ((64 * KIB, "hot"), (MIB, "hot"), (16 * MIB, "cold"))
            ),
            *((8, 4, 0, size, regime, 1) for size, regime in ((64 * KIB, "hot"), (16 * MIB, "cold"))),
            (2, 1, 0, MIB, "cold", 1),
            (8, 1, 1, 16 * MIB, "cold", 1),
            (8, 3, 3, 64 * KIB, "hot", 1),
            (8, 3, 3, 16 * MIB, "cold", 2),
        ]
    else:
        sizes = [(size, regime) for regime in ("hot", "cold") for size in (64 * KIB, MIB, 16 * MIB)]
        chosen = [
            (n, m, lost, size, regime, threads)
            for threads in (1, 2)
            for size, regime in sizes
            for n in (2, 4, 8)
            for m in (1, 2, 3, 4)
            for lost in (0, min(n, m))
        ]
    return [
        Cell(n=n, m=m, lost=lost, shard_bytes=size, regime=regime, threads=threads)
        for n, m, lost, size, regime, threads in chosen
    ]


# ---- measuring -------------------------------------------------------------------------------------------------------


class _Memory:
    """One block of random bytes that all cells cut their shards from."""

    def __init__(self) -> None:
        self._block = np.empty(0, np.uint8)

    def stripes(self, cell: Cell, shards: int) -> list[list[Bytes]]:
        """As many stripes of `shards` shards as the regime needs."""
        step = cell.shard_bytes + PAD_BYTES  # a multiple of the alignment
        count = _stripes(cell)
        needed = count * shards * step
        if self._block.size < needed:
            block = np.random.default_rng(1).integers(0, 256, needed + PAGE_BYTES, dtype=np.uint8)
            self._block = block[-address(block) % PAGE_BYTES :][:needed]
        return [
            [self._block[(s * shards + j) * step :][: cell.shard_bytes] for j in range(shards)]
            for s in range(count)
        ]


def _parts(cell: Cell, stripes: list[list[Bytes]]) -> list[list[list[Bytes]]]:
    """For each thread the stripes, or parts of them, that it works on."""
    if cell.threads == 1:
        return [stripes]
    if cell.shard_bytes < SPLIT_BYTES:
        return [stripes[thread :: cell.threads] for thread in range(cell.threads)]
    share = cell.shard_bytes // cell.threads
    return [
        [[shard[thread * share :][:share] for shard in stripe] for stripe in stripes]
        for thread in range(cell.threads)
    ]


Prepare = Callable[[Elements, Sequence[Bytes], Sequence[Bytes]], Callable[[], object]]


def _methods(path: Path256 | None) -> dict[str, Prepare]:
    """How each competitor is called, with all that can be prepared done beforehand."""
    import torch

    from ghostserve.codec.torch_backend import TorchBackend

    native, plain, on_torch = NativeBackend(path=path), NumpyBackend(), TorchBackend()
    library, width = load(), load().read_width_bytes
    torch.set_num_threads(1)

    def read(matrix: Elements, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> Callable[[], object]:
        table = np.array([address(source) for source in sources], np.uint64)
        function, place, length = library.read, table.ctypes.data, sources[0].size
        return lambda: function(width, len(table), length, place)

    def by_torch(
        matrix: Elements, sources: Sequence[Bytes], targets: Sequence[Bytes]
    ) -> Callable[[], object]:
        tensors = [[torch.from_numpy(array) for array in arrays] for arrays in (sources, targets)]
        return lambda: on_torch.combine(matrix, [tensors[0]], [tensors[1]], accumulate=False)

    methods: dict[str, Prepare] = {
        READ: read,
        NATIVE: lambda matrix, sources, targets: native.prepare(matrix, [sources], [targets]),
        "numpy": lambda matrix, sources, targets: (
            lambda: plain.combine(matrix, [sources], [targets], accumulate=False)
        ),
        "torch": by_torch,
    }
    if find_isal() is not None:
        methods[ISAL] = IsalBackend(level="" if path is None else path.name.lower()).prepare
    return methods


def measure(
    cells: Sequence[Cell],
    *,
    repetitions: int,
    on_progress: Callable[[int, int, str], None],
    path: Path256 | None = None,
) -> Report:
    """Measure every cell, on the fastest path or on `path`, ISA-L on the same. OSError without the native library."""
    methods, memory, rows = _methods(path), _Memory(), []
    with ThreadPoolExecutor(max(cell.threads for cell in cells)) as pool:
        for number, cell in enumerate(cells, start=1):
            rows += list(_rows(cell, _measure_cell(cell, methods, memory, pool, repetitions=repetitions)))
            mine = next(row for row in reversed(rows) if row.backend == NATIVE)
            isal = "" if mine.ratio_to_isal is None else f", {mine.ratio_to_isal:.2f} x ISA-L"
            on_progress(number, len(cells), f"{cell}: {mine.gb_per_s:.1f} GB/s{isal}")
    forced = "" if path is None else f", {path.name.lower()} forced"
    return Report(
        cpu=cpu_name(),
        dispatched=NativeBackend(path=path).name,
        isal=None if (found := find_isal()) is None else f"{found}{forced}",
        rows=tuple(rows),
    )


def _measure_cell(
    cell: Cell,
    methods: dict[str, Prepare],
    memory: _Memory,
    pool: ThreadPoolExecutor,
    *,
    repetitions: int,
) -> dict[str, list[float]]:
    """Seconds for the same work, by method: one value for each repetition. CheckFailed if one computes something else."""
    matrix, sources = cell.coefficients()
    stripes = memory.stripes(cell, cell.n + cell.m + cell.lost)  # decoded shards go to places of their own
    first_target = cell.n + cell.m if cell.lost else cell.n
    inputs = [[stripe[j] for j in sources] for stripe in stripes]
    outputs = [stripe[first_target:][: len(matrix)] for stripe in stripes]
    work = {
        name: [
            [prepare(matrix, *stripe) for stripe in zip(*of_thread, strict=True)]
            for of_thread in zip(_parts(cell, inputs[:few]), _parts(cell, outputs[:few]), strict=True)
        ]
        for name, prepare in methods.items()
        for few in [_enough(cell, len(stripes)) if name in SLOW else len(stripes)]
    }
    share = {name: sum(map(len, work[NATIVE])) / sum(map(len, calls)) for name, calls in work.items()}
    rounds = {name: 1 if name in SLOW else _rounds(calls, pool) for name, calls in work.items()}
    _check(cell, matrix, inputs[0], outputs[0], work, pool)
    times: dict[str, list[float]] = {name: [] for name in methods}
    rng = random.Random(0)
    for repetition in range(repetitions):
        names = sorted(methods.keys() - (SLOW if repetition >= SLOW_REPETITIONS else frozenset()))
        for name in rng.sample(names, k=len(names)):
            times[name].append(_run(work[name], rounds[name], pool) / rounds[name] * share[name])
    return times


def _enough(cell: Cell, stripes: int) -> int:
    """Stripes for what computes for so long that the memory does not matter; at least one for each thread."""
    return min(stripes, max(cell.threads, SLOW_BYTES // (cell.n * cell.shard_bytes)))


def _rounds(work: list[list[Callable[[], object]]], pool: ThreadPoolExecutor) -> int:
    """How often to go through the work, so that a measurement takes REPETITION_S; also the warm-up."""
    _run(work, 1, pool)
    return max(1, math.ceil(REPETITION_S / _run(work, 1, pool)))


def _check(
    cell: Cell,
    matrix: Elements,
    inputs: list[Bytes],
    outputs: list[Bytes],
    work: dict[str, list[list[Callable[[], object]]]],
    pool: ThreadPoolExecutor,
) -> None:
    """Every method's first and last bytes of the first stripe, against the reference."""
    for part in (slice(None, CHECKED_BYTES), slice(-CHECKED_BYTES, None)):
        expected = [np.empty(len(inputs[0][part]), np.uint8) for _ in matrix]
        ReferenceBackend().combine(matrix, [[shard[part] for shard in inputs]], [expected], accumulate=False)
        for name in work.keys() - {READ}:
            for output in outputs:
                output[part] = 0
            threads = work[name] if cell.shard_bytes >= SPLIT_BYTES else work[name][:1]
            _run([calls[:1] for calls in threads], 1, pool)
            if not all(map(np.array_equal, expected, [output[part] for output in outputs])):
                raise CheckFailed(f"{name} computed something else than the reference: {cell}")


def _run(work: list[list[Callable[[], object]]], rounds: int, pool: ThreadPoolExecutor) -> float:
    """Seconds until every thread has done its calls `rounds` times."""

    def calls(mine: list[Callable[[], object]]) -> None:
        for _ in range(rounds):
            for call in mine:
                call()

    began_s = monotonic_s()
    others = [pool.submit(calls, mine) for mine in work[1:]]
    calls(work[0])
    for other in others:
        other.result()
    return monotonic_s() - began_s


# ---- what it says (pure) ---------------------------------------------------------------------------------------------


def _rows(cell: Cell, times: dict[str, list[float]]) -> Iterator[Row]:
    data = cell.n * cell.shard_bytes * _stripes(cell)
    for name, spent in times.items():
        if name == READ:
            continue
        isal = times.get(ISAL)
        yield Row(
            op=cell.op,
            n=cell.n,
            m=cell.m,
            lost=cell.lost,
            shard_bytes=cell.shard_bytes,
            regime=cell.regime,
            threads=cell.threads,
            backend=name,
            gb_per_s=round(data / statistics.median(spent) / 1e9, 3),
            fraction_of_read=round(_ratio(times[READ], spent), 3),
            ratio_to_isal=None if isal is None else round(_ratio(isal, spent), 3),
        )


def _stripes(cell: Cell) -> int:
    """How many stripes one time through does, all threads together; short ones are not shared by threads."""
    if cell.regime == "hot":
        return cell.threads if cell.shard_bytes < SPLIT_BYTES else 1
    shards = cell.n + cell.m + cell.lost
    return max(2, -(-COLD_BYTES // ((cell.shard_bytes + PAD_BYTES) * shards)))


def _ratio(base: Sequence[float], times: Sequence[float]) -> float:
    """How many times as fast as `base`: the median over the repetitions that have both."""
    return statistics.median(b / t for b, t in zip(base, times, strict=False))


def table(report: Report) -> str:
    """For people: one line for each cell, the library first, then the others as shares of it."""
    lines = [
        f"{report.cpu} · {report.dispatched} · ISA-L: {report.isal or 'not installed (pip install pyeclib)'}",
        f"{'':46}{'GB/s':>8}{'of read':>9}{'x ISA-L':>9}{'x numpy':>9}{'x torch':>9}",
    ]
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in report.rows:
        key = (row.n, row.m, row.lost, row.shard_bytes, row.regime, row.threads)
        groups.setdefault(key, {})[row.backend] = row
    for (n, m, lost, shard_bytes, regime, threads), rows in groups.items():
        cell = Cell(n=n, m=m, lost=lost, shard_bytes=shard_bytes, regime=regime, threads=threads)
        mine = rows[NATIVE]
        isal = "-" if mine.ratio_to_isal is None else f"{mine.ratio_to_isal:.2f}"
        others = [mine.gb_per_s / rows[name].gb_per_s for name in ("numpy", "torch")]
        lines.append(
            f"{cell!s:46}{mine.gb_per_s:8.1f}{mine.fraction_of_read:9.2f}{isal:>9}"
            + "".join(f"{times:9.1f}" for times in others)
        )
    return "\n".join(lines)


def cpu_name() -> str:
    """What the system calls this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
