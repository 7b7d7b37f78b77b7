"""`ghostserve models COMMAND`: the models of this machine, on its disk and in its memory.

0 done · 1 it could not be done, or a check failed · 2 usage · 130 interrupted
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from ghostserve.cli.arguments import Parser, new_parser
from ghostserve.config import parse_bytes
from ghostserve.errors import GhostserveError, UsageError, WeightsError

COMMANDS = {
    "ls": ("models_ls", "list the models on this disk and in its memory"),
    "pull": ("models_pull", "fetch a model, so that a server starts without a network"),
    "verify": ("models_verify", "read a model's files and compare them with their checksums"),
    "warm": ("models_warm", "read a model into memory, so that the next server starts without the disk"),
    "pin": ("models_pin", "keep a model in memory, whatever else is loaded"),
    "unpin": ("models_pin", "let a model be evicted from memory again"),
    "optimise": (
        "models_optimise",
        "keep what a server's workers loaded on the disk, a file each, for their next cold start",
    ),
    "rm": ("models_rm", "remove a model from memory and from the cache on the disk"),
    "stop": ("models_stop", "let go of all models in memory"),
}
WITHOUT_MODEL = ("ls", "stop")
MODEL = "a Hugging Face id, a URL (s3://bucket/folder, gs://bucket/folder, https://host/folder), or a folder"


def main(argv: Sequence[str]) -> int:
    """Run the verb; raises GhostserveError."""
    options = _parser().parse_args(argv)
    module, _ = COMMANDS[options.command]
    try:
        code: int = importlib.import_module(f"ghostserve.cli.{module}").run(options)
    except WeightsError as error:
        raise GhostserveError(str(error)) from error  # its own exit status is that of a server's start
    except BrokenPipeError:  # whoever read our output has seen enough
        raise
    except OSError as error:  # a cache that may not be read, a disk that fails
        raise GhostserveError(f"{error.filename or options.command}: {error.strerror or error}") from error
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
        if name not in WITHOUT_MODEL:
            one.add_argument("model", metavar="MODEL", help=MODEL)
        if name in ("pull", "verify", "warm"):
            one.add_argument("--revision", help="of a model of the Hugging Face Hub: branch, tag or commit")
        if name != "stop":
            one.add_argument(
                "--download-dir",
                type=Path,
                metavar="DIR",
                help="where weights lie instead of in the usual cache; as given to serve",
            )
        one.add_argument("--json", action="store_true", help="print JSON on one line")
    _add_own(made)
    return parser


def _add_own(made: Mapping[str, argparse.ArgumentParser]) -> None:
    """What only one of them has."""
    what = made["rm"].add_mutually_exclusive_group()
    what.add_argument("--memory", action="store_true", help="only from memory")
    what.add_argument("--disk", action="store_true", help="only from the disk")
    made["rm"].add_argument("--yes", "-y", action="store_true", help="do not ask")
    what = made["optimise"].add_mutually_exclusive_group()
    what.add_argument(
        "--tensor-parallel-size",
        "--tp",
        "-tp",
        type=_workers,
        metavar="N",
        help="fail unless the weights of so many workers are in memory",
    )
    what.add_argument("--remove", action="store_true", help="remove the model's copies instead")
    made["warm"].add_argument("--pin", action="store_true", help="and keep it there, as 'models pin' does")
    made["warm"].add_argument(
        "--weights-memory",
        type=_bytes,
        metavar="BYTES",
        help="the most that all models may take in memory from now on, e.g. 64Gi (default: as it is, or a quarter of the machine's)",
    )


def _bytes(text: str) -> int:
    """For argparse, which names the flag."""
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _workers(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of workers, from 1 on")
    return int(text)
