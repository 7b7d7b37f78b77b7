"""`ghostserve models COMMAND`: the models of this machine, on its disk and in its memory.

0 done · 1 it could not be done, or a check failed · 2 usage · 130 interrupted
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from ghostserve.cli.arguments import Parser, new_parser
from ghostserve.errors import GhostserveError, WeightsError

COMMANDS = {
    "ls": ("models_ls", "list the models on this disk and in its memory"),
    "pull": ("models_pull", "fetch a model, so that a server starts without a network"),
}
MODEL = "a Hugging Face id, a URL (s3://bucket/folder, gs://bucket/folder, https://host/folder), or a folder"


def main(argv: Sequence[str]) -> int:
    """Run the verb; raises GhostserveError."""
    options = _parser().parse_args(argv)
    module, _ = COMMANDS[options.command]
    try:
        code: int = importlib.import_module(f"ghostserve.cli.{module}").run(options)
    except WeightsError as error:
        raise GhostserveError(str(error)) from error  # its own exit status is that of a server's start
    return code


def _parser() -> Parser:
    parser = new_parser("models", "See and manage the models of this machine, on its disk and in its memory.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    made = {
        name: commands.add_parser(
            name, help=what, description=f"{what[0].upper()}{what[1:]}.", allow_abbrev=False
        )
        for name, (_, what) in COMMANDS.items()
    }
    for name, one in made.items():
        if name != "ls":
            one.add_argument("model", metavar="MODEL", help=MODEL)
    _add_places(made["pull"])
    return parser


def _add_places(parser: argparse.ArgumentParser) -> None:
    """As `serve` has them."""
    parser.add_argument("--revision", help="of a model of the Hugging Face Hub: branch, tag or commit")
    parser.add_argument(
        "--download-dir",
        type=Path,
        metavar="DIR",
        help="where weights lie instead of in the usual cache; give the same to serve",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
