"""`ghostserve bench`: figures of this machine. So far the codec's."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ghostserve.cli.arguments import new_parser
from ghostserve.cli.bench_codec import Report, measure, plan_cells, table
from ghostserve.errors import UnsupportedError, UsageError
from ghostserve.native import Path256


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("bench", "Measure what this machine gives.")
    parser.add_argument(
        "what", choices=["codec"], help="codec: the erasure code, against ISA-L, numpy and torch"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument(
        "--quick", action="store_true", help="a dozen representative cells, under two minutes"
    )
    parser.add_argument(
        "--path",
        choices=[path.name.lower() for path in Path256],
        help="measure this path of the library, and ISA-L's of the same name (default: the fastest)",
    )
    parser.add_argument(
        "--repetitions", type=int, default=9, metavar="N", help="of each cell, at least 3 (default 9)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns its exit code."""
    arguments = _parser().parse_args(argv)
    path = None if arguments.path is None else Path256[arguments.path.upper()]
    if arguments.repetitions < 3:
        raise UsageError(f"--repetitions {arguments.repetitions}: at least 3 for a median")
    cells = plan_cells(quick=arguments.quick)
    try:
        report = measure(cells, repetitions=arguments.repetitions, on_progress=_say, path=path)
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"the codec cannot be measured: {error}") from None
    _print(report, as_json=arguments.json)
    return 0


def _say(done: int, total: int, text: str) -> None:
    print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)


def _print(report: Report, *, as_json: bool) -> None:
    print(json.dumps(report.to_dict()) if as_json else table(report))
