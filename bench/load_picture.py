"""The picture beside the results of bench/load.py: a bar for each loader, medians, with every sample as a point on it."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from ghostserve.cli.bench_load_report import Report, groups

OURS, OTHERS, POINTS = "#2f6f8f", "#b9c0c6", "#20262b"
BAR_INCHES = 0.34


def draw(report: Report, path: Path) -> None:
    """Write an SVG; the same report gives the same file."""
    parts = groups(report.rows)
    heights = [len(rows) + 0.8 for rows in parts.values()]
    figure = Figure(figsize=(8, BAR_INCHES * sum(heights) + 1.2 * len(parts)), layout="constrained")
    axes = figure.subplots(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for plot, (group, rows) in zip(axes, parts.items(), strict=True):
        names = [row.loader for row in rows]
        plot.barh(
            names,
            [row.seconds.median for row in rows],
            color=[OURS if row.ours else OTHERS for row in rows],
            height=0.7,
        )
        for place, row in enumerate(rows):
            seconds = [sample["seconds"] for sample in report.samples[row.cell]]
            plot.plot(seconds, [place] * len(seconds), ".", color=POINTS, markersize=4)
        if group.startswith("cold"):
            plot.axvline(
                report.model_bytes / 1e9 / report.ceiling_gb_per_s.median, color=POINTS, lw=0.8, ls="--"
            )
        plot.set_title(group, loc="left", fontsize=10)
        plot.invert_yaxis()
        plot.set_xlim(left=0)
        plot.set_xlabel(
            "seconds" + (" (dashed: the disk's ceiling)" if group.startswith("cold") else ""), fontsize=8
        )
        plot.tick_params(labelsize=8)
        plot.spines[["top", "right"]].set_visible(False)
    with mpl.rc_context({"svg.hashsalt": "ghostserve", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
