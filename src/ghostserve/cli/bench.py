"""`ghostserve bench`: figures of this machine. One subcommand for each thing that can be measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ghostserve.cli import bench_load
from ghostserve.cli.arguments import Parser, new_parser
from ghostserve.cli.bench_codec import Report, measure, plan_cells, table
from ghostserve.errors import UnsupportedError, UsageError
from ghostserve.native import Path256

CODEC = "the erasure code, against ISA-L, numpy and torch"
LOAD = "loading weights, against vLLM's own loader, fastsafetensors, Run:ai's streamer and the disk itself"


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("bench", "Measure what this machine gives.")
    verbs = parser.add_subparsers(dest="what", required=True, metavar="codec|load", parser_class=Parser)
    codec = verbs.add_parser("codec", help=CODEC, description=f"Measure {CODEC}.", allow_abbrev=False)
    _add_codec_options(codec)
    load = verbs.add_parser("load", help=LOAD, description=bench_load.DESCRIPTION, allow_abbrev=False)
    bench_load.add_options(load)
    return parser


def _add_codec_options(parser: argparse.ArgumentParser) -> None:
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


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return bench_load.run(arguments) if arguments.what == "load" else _codec(arguments)


def _codec(arguments: argparse.Namespace) -> int:
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
