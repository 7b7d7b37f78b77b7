"""How every bench begins and ends: its options, what it says meanwhile, its results written and shown, errors as one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import results

from ghostserve.errors import GhostserveError


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """With `--out`; the description is a module's docstring, its lines as they are."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=results.RESULTS_DIR, help="directory of the results")
    return parser


def publish(
    name: str,
    *,
    about: Mapping[str, Any],
    document: Mapping[str, Any],
    markdown: str,
    directory: Path,
    shown: str | None = None,
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Write the results (see `results.write`), say where they are, and print `shown`, or else the Markdown."""
    written = results.write(
        name, about=about, document=document, markdown=markdown, directory=directory, draw=draw
    )
    for path in written.paths:
        say(f"written: {path}")
    print(written.markdown if shown is None else shown)


def run(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Exit with what `main` returns, or the error's status."""
    try:
        sys.exit(main(sys.argv[1:]))
    except GhostserveError as error:
        say(f"bench/{Path(sys.argv[0]).name}: {error}")
        sys.exit(error.exit_code)
