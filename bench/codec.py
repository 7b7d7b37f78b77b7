"""`ghostserve bench codec` with its results kept: hardware, commit, every figure.

.venv/bin/python bench/codec.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import results
from servers import say

from ghostserve.cli.bench_codec import measure, plan_cells, table
from ghostserve.errors import GhostserveError


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or the error's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a dozen representative cells")
    parser.add_argument("--out", type=Path, default=results.RESULTS_DIR, help="directory of the results")
    arguments = parser.parse_args(argv)
    about = results.facts()
    report = measure(
        plan_cells(quick=arguments.quick),
        repetitions=9,
        on_progress=lambda done, total, text: say(f"[{done}/{total}] {text}"),
    )
    text = table(report)
    name = "codec-quick" if arguments.quick else "codec"
    markdown = f"```text\n{text}\n```"
    for path in results.write(
        name, about=about, document=report.to_dict(), markdown=markdown, directory=arguments.out
    ):
        say(f"written: {path}")
    print(text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except GhostserveError as error:
        say(f"bench/codec.py: {error}")
        sys.exit(error.exit_code)
