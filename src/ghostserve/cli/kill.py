"""`ghostserve kill`: SIGKILL one worker of a running server that was started with `--enable-fault-
injection`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ghostserve.cli.arguments import add_server_options, admin_of, new_parser


def main(argv: Sequence[str]) -> int:
    """Run the verb; raises GhostserveError. Returns once the signal is sent, not once the rank is back."""
    parser = new_parser("kill", "SIGKILL one worker now. The server must run with --enable-fault-injection.")
    parser.add_argument("--rank", type=int, required=True, help="the worker's rank, counted from 0")
    add_server_options(parser)
    options = parser.parse_args(argv)
    answer = admin_of(options).kill_rank(options.rank)
    if options.json:
        print(json.dumps(answer, separators=(",", ":")))
    else:
        print(f"rank {answer['rank']} was killed: SIGKILL to process {answer['pid']}")
    return 0
