"""`ghostserve simulate`: thousands of schedules of a simulated cluster, each decided by its seed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from ghostserve.cli.arguments import new_parser
from ghostserve.errors import UsageError
from ghostserve.testing.simulation.report import Totals, run_quietly, simulate

EXIT_VIOLATION = 1


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "simulate",
        "Try losses, hangs, torn writes and corruption on a simulated cluster that runs the product's own shadow and "
        "recovery code, and check after every event that nothing is lost, wrong or taken back (docs/simulation.md).",
    )
    parser.add_argument(
        "--seeds", type=int, default=1000, metavar="N", help="schedules to run (default 1000)"
    )
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="S", help="seed of the first (default 0)"
    )
    parser.add_argument("--replay", type=int, metavar="S", help="run the schedule of one seed only")
    parser.add_argument("--trace", action="store_true", help="print what happens; with --replay")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument(
        "--jobs", type=int, metavar="J", help="processes at a time (default: one per CPU of this process)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns its exit code: 1 if an invariant was violated."""
    options = _parser().parse_args(argv)
    if options.replay is not None:
        return _replay(options.replay, trace=options.trace, as_json=options.json)
    if options.trace:
        raise UsageError("--trace prints one schedule: name it with --replay")
    jobs = len(os.sched_getaffinity(0)) if options.jobs is None else options.jobs
    for name, value, least in (
        ("seeds", options.seeds, 1),
        ("jobs", jobs, 1),
        ("first-seed", options.first_seed, 0),
    ):
        if value < least:
            raise UsageError(f"--{name} {value}: must be at least {least}")
    totals = simulate(first_seed=options.first_seed, seeds=options.seeds, jobs=jobs, on_progress=_say)
    print(json.dumps(totals.to_dict()) if options.json else totals.text())
    return EXIT_VIOLATION if totals.violated else 0


def _replay(seed: int, *, trace: bool, as_json: bool) -> int:
    result = run_quietly(seed, trace=trace)
    if as_json:
        totals = Totals(first_seed=seed)
        totals.add(result)
        print(json.dumps({**totals.to_dict(), "setup": str(result.setup), "trace": list(result.trace)}))
    else:
        print(f"seed {seed}: {result.setup}")
        print("\n".join(result.trace), end="\n" if result.trace else "")
        print(
            f"{result.events} events, state {result.checksum:08x}: {result.violation or 'every invariant held'}"
        )
    return EXIT_VIOLATION if result.violation else 0


def _say(done: int, total: int, violated: int) -> None:
    print(f"[{done}/{total}] {violated} violations", file=sys.stderr, flush=True)
