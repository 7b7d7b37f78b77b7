"""`ghostserve bench load`: what loading weights costs here, against the other loaders and what the disk gives."""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ghostserve.cli import bench_load_cache
from ghostserve.cli.bench_load_ceiling import DEPTHS, Depth, read_s
from ghostserve.cli.bench_load_model import Shape, write_model
from ghostserve.cli.bench_load_plan import Cell, plan_cells, shuffled
from ghostserve.cli.bench_load_report import Report, make_report, text_table
from ghostserve.cli.bench_load_run import Sample, Trials, measure_cell
from ghostserve.clock import monotonic_s
from ghostserve.errors import CheckFailed, UnsupportedError, UsageError

SIZE_GB = 2.1
REPETITIONS = 5
PREFIX = "ghostserve-bench-load-"
DESCRIPTION = (
    "Writes the random weights of a Llama, loads them with every loader by turns, each time in a fresh process, cold with the page "
    "cache emptied (and checked by mincore) or warm, and removes them again."
)

Progress = Callable[[str], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `bench load`."""
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, one round: shows that it works, resolves nothing"
    )
    parser.add_argument(
        "--size",
        type=float,
        default=SIZE_GB,
        metavar="GB",
        help=f"of the model, at least (default {SIZE_GB:g})",
    )
    parser.add_argument(
        "--repetitions",
        type=int,
        default=REPETITIONS,
        metavar="N",
        help=f"of each cell (default {REPETITIONS})",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        help="where to write the model: the disk that is measured (default: the current folder)",
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print; returns the exit code."""
    if options.repetitions < 1 or options.size <= 0:
        raise UsageError(
            f"--repetitions {options.repetitions}, --size {options.size:g}: both have to be positive"
        )
    shape = Shape.tiny() if options.quick else Shape.of_bytes(int(options.size * 1e9))
    report = measure(
        shape,
        cells=plan_cells(),
        repetitions=1 if options.quick else options.repetitions,
        directory=options.directory or Path.cwd(),
        on_progress=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(json.dumps(report.to_dict()) if options.json else text_table(report))
    return 0


def measure(
    shape: Shape,
    *,
    cells: Sequence[Cell],
    repetitions: int,
    directory: Path,
    on_progress: Progress,
    seed: int = 0,
    time_max_s: float = math.inf,
) -> Report:
    """Every cell `repetitions` times, or as often as `time_max_s` allows, in rounds of shuffled order. The model is removed whatever happens.

    CheckFailed if two loaders of the same work end with different bytes, or a state of the caches cannot be brought about.
    """
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
    try:
        on_progress(f"writing {shape.nbytes / 1e9:.2f} GB of weights")
        model, scratch = folder / "model", folder / "scratch"
        scratch.mkdir()
        files = write_model(model, shape, seed=seed)
        depth = best_depth(files, on_progress)
        with Trials(scratch=scratch, log=folder / "trials.log") as trials:
            for cell in cells:
                if cell.loader.copies:
                    trials.make_copies(cell, model=model)
            samples = _rounds(
                cells,
                lambda cell, digest: measure_cell(
                    trials, cell, model=model, files=files, depth=depth, digest=digest
                ),
                repetitions=repetitions,
                on_progress=on_progress,
                rng=random.Random(seed),
                time_max_s=time_max_s,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return make_report(samples, model_bytes=shape.nbytes, files=len(files), depth=str(depth))


def best_depth(files: Sequence[Path], on_progress: Progress, *, tries: int = 2) -> Depth:
    """How the disk is read fastest; UnsupportedError where it cannot be read directly."""
    bench_load_cache.drop(files)
    times: dict[Depth, float] = {}
    for _ in range(tries):
        for depth in DEPTHS:
            try:
                took_s = read_s(files, depth)
            except OSError as error:
                raise UnsupportedError(
                    f"{files[0].parent} cannot be read directly ({error.strerror}), so the disk's ceiling is not known: "
                    "name a folder on a disk with --directory"
                ) from None
            times[depth] = min(took_s, times.get(depth, took_s))
    best = min(times, key=times.__getitem__)
    total = sum(path.stat().st_size for path in files)
    on_progress(f"direct reads, {best} in flight: {total / times[best] / 1e9:.2f} GB/s at best")
    return best


def _rounds(
    cells: Sequence[Cell],
    measure_one: Callable[[Cell, bool], Sample],
    *,
    repetitions: int,
    on_progress: Progress,
    rng: random.Random,
    time_max_s: float = math.inf,
) -> dict[Cell, list[Sample]]:
    samples: dict[Cell, list[Sample]] = {cell: [] for cell in cells}
    digests: dict[tuple[bool, int], tuple[str, Cell]] = {}
    began_s = monotonic_s()
    for repetition in range(repetitions):
        if repetition and (monotonic_s() - began_s) * (repetition + 1) / repetition > time_max_s:
            on_progress(f"stopped after {repetition} of {repetitions} rounds: the next would take too long")
            break
        for cell in shuffled(cells, rng):
            sample = measure_one(cell, repetition == 0)
            samples[cell].append(sample)
            disk = "" if sample.ceiling_s is None else f" (the disk: {sample.ceiling_s:.2f} s)"
            on_progress(f"[{repetition + 1}/{repetitions}] {cell}: {sample.seconds:.2f} s{disk}")
            if sample.digest:
                digest, first = digests.setdefault(cell.work, (sample.digest, cell))
                if digest != sample.digest:
                    raise CheckFailed(
                        f"{cell} and {first} loaded different bytes ({sample.digest}, {digest})"
                    )
    return samples
