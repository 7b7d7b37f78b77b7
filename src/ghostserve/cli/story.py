"""`ghostserve story REQUEST|RANK`: everything that happened to one request or one rank, in order."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ghostserve.cli.arguments import new_parser
from ghostserve.cli.events import add_source_options, known_events
from ghostserve.events.story import tell


def main(argv: Sequence[str]) -> int:
    """Run the verb; raises GhostserveError."""
    parser = new_parser(
        "story",
        "Tell everything that happened to a request or a rank, in order, with times relative to its beginning.",
    )
    parser.add_argument(
        "subject",
        nargs="+",
        metavar="REQUEST|RANK",
        help="the id in a response (cmpl-...), or the beginning of it; or a rank: '1' or 'rank 1'",
    )
    add_source_options(parser, as_json="print one JSON object on one line")
    options = parser.parse_args(argv)
    story = tell(" ".join(options.subject), known_events(options))
    print(json.dumps(story.as_dict(), separators=(",", ":")) if options.json else "\n".join(story.lines()))
    return 0
