"""`ghostserve bench load` with its results kept: hardware, commit, every sample, tables and a picture.

.venv/bin/python bench/load.py [--quick] [--directory FOLDER]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import results
import script
from load_picture import draw
from script import say

from ghostserve.cli.bench_load import REPETITIONS, SIZE_GB, measure
from ghostserve.cli.bench_load_model import Shape
from ghostserve.cli.bench_load_plan import plan_cells
from ghostserve.cli.bench_load_report import HEADER, Report, groups, table_rows


def markdown(report: Report) -> str:
    """Tables by kind of work, the targets, and what the columns mean."""
    ceiling = report.ceiling_gb_per_s
    parts = [
        f"{report.model_bytes / 1e9:.2f} GB of bfloat16 in {report.files} files. The disk gives {ceiling.text()} GB/s: direct reads of the "
        f"same files, {report.depth} in flight, one just before each cold load. Medians, and the range over {report.rounds} rounds of shuffled "
        "order; a new process for each load.",
        f"![Seconds of each load]({results.PICTURE})",
    ]
    for group, rows in groups(report.rows).items():
        parts.append(results.table((group, *HEADER[1:]), table_rows(rows)))
    parts.append(
        results.table(
            ("target", "", "by this run"),
            [
                [target.name, "met" if target.met else "**missed**", target.figures]
                for target in report.targets
            ],
        )
    )
    parts.append(
        '"model": vLLM builds the model, and the clock runs while it gets its weights. "after it": vLLM\'s post-processing, which packs them for '
        'the processor. "no model": every tensor in memory and every byte of it looked at. Peak RSS: how far it rose above what it was before. '
        "PSS: at the end, shared pages counted in parts; of the rank that has most."
    )
    return "\n\n".join(parts)


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or the error's."""
    parser = script.new_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--size", type=float, default=SIZE_GB, metavar="GB")
    parser.add_argument("--rounds", type=int, default=REPETITIONS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no round that would end later")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="on the disk that is measured")
    arguments = parser.parse_args(argv)
    about = results.facts()
    report = measure(
        Shape.tiny() if arguments.quick else Shape.of_bytes(int(arguments.size * 1e9)),
        cells=plan_cells(),
        repetitions=1 if arguments.quick else arguments.rounds,
        directory=arguments.directory,
        on_progress=say,
        time_max_s=60 * arguments.minutes,
    )
    script.publish(
        "load-quick" if arguments.quick else "load",
        about=about,
        document=report.to_dict(),
        markdown=markdown(report),
        directory=arguments.out,
        draw=functools.partial(draw, report),
    )
    return 0


if __name__ == "__main__":
    script.run(main)
