"""`ghostserve events`: what has happened on a running server, or in a file of `--event-log`; and what happens next."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ghostserve.cli.arguments import add_server_options, admin_of, new_parser
from ghostserve.clock import wall_s
from ghostserve.errors import UsageError
from ghostserve.events.file import read_files
from ghostserve.events.kinds import KINDS
from ghostserve.events.record import Record, at_seconds, at_text
from ghostserve.events.sentences import text_of
from ghostserve.web.events_client import follow, kept_events

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_source_options(parser: argparse.ArgumentParser, *, as_json: str) -> None:
    """Where the events come from: a server, or a file."""
    add_server_options(parser, as_json=as_json)
    parser.add_argument(
        "--file",
        type=Path,
        metavar="FILE",
        help="read this file of 'ghostserve serve --event-log', and its older parts, instead of asking a server",
    )


def known_events(options: argparse.Namespace) -> Iterator[Record]:
    """From the file or the server; what is missing is said on standard error."""
    if options.file is not None:
        yield from read_files(options.file)
        return
    for record, dropped in kept_events(admin_of(options)):
        if dropped:
            _say(f"{dropped} events before {at_text(record.at_s)} are no longer kept")
        yield record


def since_s(text: str, now_s: float) -> float:
    """`10m`, `2h`, or a time such as 2026-11-22T13:00Z, as seconds since the epoch. Raises UsageError."""
    if (ago := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)) is not None:
        return now_s - float(ago[1]) * _UNITS_S[ago[2]]
    try:
        return at_seconds(text)
    except ValueError:
        raise UsageError(f"--since {text}: give for example 10m, 2h, or 2026-11-22T13:00:00Z") from None


def line_of(record: Record) -> str:
    """`2026-11-22T13:00:00.123456Z  rank_lost          rank 1 ...`."""
    return f"{at_text(record.at_s)}  {record.event.kind:<18}  {text_of(record.event)}"


def main(argv: Sequence[str]) -> int:
    """Run the verb; raises GhostserveError. With `--follow` it ends by Ctrl-C."""
    options = _parser().parse_args(argv)
    if options.follow and options.file is not None:
        raise UsageError(
            "--follow asks a server, so it does not go with --file; 'tail -F FILE' follows a file"
        )
    earliest_s = None if options.since is None else since_s(options.since, wall_s())
    last = 0
    for record in known_events(options):
        last = record.seq
        _show(record, options, earliest_s)
    if options.follow:
        for record in follow(
            admin_of(options), after=last, on_break=lambda why: _say(f"{why}; trying again")
        ):
            _show(record, options, earliest_s)
    return 0


def _show(record: Record, options: argparse.Namespace, earliest_s: float | None) -> None:
    event = record.event
    if options.kind and event.kind not in options.kind:
        return
    if (
        options.rank is not None
        and event.rank != options.rank
        and options.rank not in getattr(event, "ranks", ())
    ):
        return
    if earliest_s is not None and record.at_s < earliest_s:
        return
    print(record.to_json() if options.json else line_of(record), flush=options.follow)


def _say(what: str) -> None:
    print(f"ghostserve: {what}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "events", "Show what has happened on a server: losses, recoveries, requests; works during an outage."
    )
    parser.add_argument(
        "--follow", "-f", action="store_true", help="go on with what happens next; reconnects by itself"
    )
    parser.add_argument(
        "--kind",
        action="append",
        choices=sorted(KINDS),
        metavar="KIND",
        help="only events of this kind; may be repeated",
    )
    parser.add_argument("--rank", type=int, help="only what is about this rank")
    parser.add_argument("--since", metavar="TIME", help="only from then on: 10m, 2h, or 2026-11-22T13:00:00Z")
    add_source_options(parser, as_json="print a JSON object per line and event")
    return parser
