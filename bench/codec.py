"""`ghostserve bench codec` with its results kept: hardware, commit, every figure.

.venv/bin/python bench/codec.py [--quick]
"""

from __future__ import annotations

from collections.abc import Sequence

import results
import script
from script import say

from ghostserve.cli.bench_codec import measure, plan_cells, table


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or the error's."""
    parser = script.new_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a dozen representative cells")
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
    script.publish(
        name, about=about, document=report.to_dict(), markdown=markdown, shown=text, directory=arguments.out
    )
    return 0


if __name__ == "__main__":
    script.run(main)
