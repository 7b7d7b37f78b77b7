"""How fast the reader of weights is beside the disk itself, what its checksums cost, and what memory it should read to.

    .venv/bin/python bench/weights_reader.py [--gib 2] [--rounds 7] [--folder DIR]

The disk's ceiling is direct reads into memory that is there already. A load looks at one tensor after the other and drops it.
Everything is measured in turn, round by round, so that what else happens on the machine meets all of it. Before a cold read the
page cache is dropped, and mincore has to say so.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import results
import script
from estimates import estimate_median
from script import say

from ghostserve import clock
from ghostserve.cli.bench_load_cache import drop, fill
from ghostserve.cli.bench_load_ceiling import Depth, direct_reads
from ghostserve.weights.checksums import CELL_BYTES, Checksums
from ghostserve.weights.model_files import open_file
from ghostserve.weights.own_file import OwnFile
from ghostserve.weights.ranges import CHUNK_BYTES, DEPTH, Range
from ghostserve.weights.reader import read_ranges
from ghostserve.weights.recycled import Recycler

MIB = 1 << 20
AS_READER = Depth(in_flight=DEPTH, chunk_bytes=CHUNK_BYTES)
CHUNKS_MIB, DEPTHS = (1, 4, 8, 16), (1, 2, 4, 8)
TENSOR_BYTES = 32 * MIB
MEMORIES = {
    "used again": "as a load does: a tensor's memory is used again when it was dropped",
    "new": "memory for the whole file",
    "the pool's": "shared memory for the whole file, as a load needs that fills the pool",
}


BESIDE = "disk, memory read beside"
READS_MEMORY = """
import numpy as np
from ghostserve.native.checksum import crc32
memory = np.ones(256 << 20, dtype=np.uint8)
print(flush=True)
while True:
    crc32(memory)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One reading of a whole file."""

    wall_s: float
    cpu_s: float
    nbytes: int

    @property
    def gb_per_s(self) -> float:
        """Decimal gigabytes."""
        return self.nbytes / self.wall_s / 1e9


def timed(nbytes: int, work: Callable[[], object]) -> Sample:
    """What `work` took, all threads."""
    wall_s, cpu_s = clock.monotonic_s(), clock.cpu_s()
    work()
    return Sample(wall_s=clock.monotonic_s() - wall_s, cpu_s=clock.cpu_s() - cpu_s, nbytes=nbytes)


def make_file(path: Path, nbytes: int, *, seed: int = 0) -> None:
    """A safetensors file of random bytes, of this length or a little more, on the disk."""
    rng = random.Random(seed)
    places = [(at, min(at + TENSOR_BYTES, nbytes)) for at in range(0, nbytes, TENSOR_BYTES)]
    header = {
        f"t{number:04}": {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for number, (begin, end) in enumerate(places)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin, end in places:
            file.write(rng.randbytes(end - begin))
        file.flush()
        os.fsync(file.fileno())


def ceiling(path: Path, depth: Depth) -> Sample:
    """Direct reads into buffers that are used over and over: what the disk gives."""
    with direct_reads([path], depth) as read:
        return timed(path.stat().st_size, read)


@contextmanager
def memory_read_beside() -> Iterator[None]:
    """A process reads memory, more than its caches hold, and touches no disk: what a checksum of what was read does, too."""
    with subprocess.Popen([sys.executable, "-c", READS_MEMORY], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


def load(path: Path, *, verify: Checksums | None = None) -> Sample:
    """Every tensor taken, a byte of each page looked at, and dropped."""

    def every_tensor() -> None:
        file = open_file(path)
        spans = [(span.begin, span.end) for span in file.header.tensors]
        own = OwnFile(file, spans, Recycler(), direct=None, verify=verify)
        for span in spans:
            own.get(*span)[:: mmap.PAGESIZE].max()
        own.wait()
        own.close()

    return timed(path.stat().st_size, every_tensor)


def read_to(memory: str, path: Path) -> Sample:
    """The whole file to one of MEMORIES; what making it costs counts, and what giving it back costs does not."""
    if memory == "used again":
        return load(path)
    nbytes = path.stat().st_size
    kind = mmap.MAP_PRIVATE if memory == "new" else mmap.MAP_SHARED
    with (
        mmap.mmap(-1, nbytes, flags=kind | mmap.MAP_ANONYMOUS) as mapped,
        memoryview(mapped) as view,
    ):
        return timed(nbytes, lambda: read_ranges(path, [Range(0, nbytes, 0)], view))


def known_checksums(path: Path) -> Checksums:
    """All of the file's, made by reading it."""
    nbytes = path.stat().st_size
    sums = Checksums(path, nbytes)
    read_ranges(path, [Range(0, nbytes, 0)], None, verify=sums)
    assert sums.complete
    return sums


def rounds_of(path: Path, rounds: int) -> Iterator[tuple[int, dict[str, Sample]]]:
    """Each round: the ceiling, a load with and without checksums, cold and warm, and cold reads to MEMORIES; in changing order."""
    sums = known_checksums(path)
    for number in range(rounds):
        found: dict[str, Sample] = {}
        drop([path])
        found["disk"] = ceiling(path, AS_READER)
        with memory_read_beside():
            found[BESIDE] = ceiling(path, AS_READER)
        for kind in ("cold", "warm"):
            for checked in (False, True) if number % 2 else (True, False):
                (drop if kind == "cold" else fill)([path])
                name = f"{kind}, {'checked' if checked else 'unchecked'}"
                found[name] = load(path, verify=sums if checked else None)
        for memory in random.Random(number).sample(list(MEMORIES), len(MEMORIES)):
            drop([path])
            found[f"to memory: {memory}"] = read_to(memory, path)
        yield number, found


def cost(found: Sequence[dict[str, Sample]], kind: str) -> dict[str, Any]:
    """How much more a checked load takes: medians over rounds, each compared with its own round."""
    pairs = [(one[f"{kind}, checked"], one[f"{kind}, unchecked"]) for one in found]
    walls = [checked.wall_s / plain.wall_s - 1 for checked, plain in pairs]
    return {
        "wall": asdict(estimate_median(walls, rng=random.Random(0))),
        "cpu": statistics.median(checked.cpu_s / plain.cpu_s - 1 for checked, plain in pairs),
        "cpu_s_per_gb": statistics.median(
            (checked.cpu_s - plain.cpu_s) / checked.nbytes * 1e9 for checked, plain in pairs
        ),
    }


def cost_line(found: Sequence[dict[str, Sample]], kind: str) -> str:
    """A median alone would hide what this run cannot tell."""
    one = cost(found, kind)
    wall = one["wall"]
    return (
        f"- {kind}: {100 * wall['median']:+.1f} % of the load's time (95 %: {100 * wall['low']:+.1f} to {100 * wall['high']:+.1f} %), "
        f"{100 * one['cpu']:+.1f} % of its CPU time, {one['cpu_s_per_gb']:.3f} CPU seconds per GB"
    )


def reads_table(path: Path) -> tuple[list[list[str]], dict[str, float]]:
    """The ceiling by size and number of reads: the better of two."""
    found: dict[str, float] = {}
    for _ in range(2):
        for size in CHUNKS_MIB:
            for depth in DEPTHS:
                speed = ceiling(path, Depth(in_flight=depth, chunk_bytes=size * MIB)).gb_per_s
                found[f"{size} MiB x {depth}"] = max(speed, found.get(f"{size} MiB x {depth}", 0.0))
    rows = [
        [f"{size} MiB", *(f"{found[f'{size} MiB x {depth}']:.2f}" for depth in DEPTHS)] for size in CHUNKS_MIB
    ]
    return rows, found


def markdown(found: Sequence[dict[str, Sample]], table: list[list[str]]) -> str:
    """The tables."""
    to_memories = [f"to memory: {memory}" for memory in MEMORIES]
    names = [*(name for name in found[0] if name not in to_memories), *to_memories]
    medians = {name: statistics.median(one[name].wall_s for one in found) for name in names}
    share = {
        name: statistics.median(one["disk"].wall_s / one[name].wall_s for one in found) for name in names
    }
    rows = [
        [
            name,
            f"{medians[name]:.2f}",
            f"{statistics.median(one[name].gb_per_s for one in found):.2f}",
            f"{100 * share[name]:.0f} %",
            f"{statistics.median(one[name].cpu_s for one in found):.2f}",
        ]
        for name in names
    ]
    costs = [cost_line(found, kind) for kind in ("cold", "warm")]
    return "\n".join(
        (
            f"One file of {found[0]['disk'].nbytes / 1e9:.2f} GB, medians of {len(found)} rounds. *disk*: direct reads into memory "
            "that is there already; *memory read beside*: while another process does nothing but read memory; *warm*: out of the page cache.\n",
            results.table(["", "s", "GB/s", "of the disk's ceiling", "CPU s"], rows),
            "",
            *(f"- to memory, {memory}: {what}" for memory, what in MEMORIES.items()),
            f"\nWhat checksums cost (a crc32 for every {CELL_BYTES // MIB} MiB, compared while reading):\n",
            *costs,
            "\nDirect reads by size and number in flight, GB/s (the better of two):\n",
            results.table(["", *(f"{depth} in flight" for depth in DEPTHS)], table),
        )
    )


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or the error's."""
    parser = script.new_parser(__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the file (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, help="where the file is made (default: the system's for temporary files)"
    )
    arguments = parser.parse_args(argv)
    about = results.facts()
    with tempfile.TemporaryDirectory(prefix="ghostserve-bench-", dir=arguments.folder) as folder:
        path = Path(folder) / "weights"
        make_file(path, int(arguments.gib * 2**30) + 1234)
        table, speeds = reads_table(path)
        found = []
        for number, one in rounds_of(path, arguments.rounds):
            found.append(one)
            say(
                f"[{number + 1}/{arguments.rounds}] "
                + ", ".join(f"{name} {sample.gb_per_s:.2f} GB/s" for name, sample in one.items())
            )
    text = markdown(found, table)
    document: dict[str, Any] = {
        "rounds": [{name: asdict(sample) for name, sample in one.items()} for one in found],
        "cost": {kind: cost(found, kind) for kind in ("cold", "warm")},
        "direct_reads_gb_per_s": speeds,
    }
    script.publish("weights-reader", about=about, document=document, markdown=text, directory=arguments.out)
    return 0


if __name__ == "__main__":
    script.run(main)
