"""What the trials of `ghostserve bench load` say: figures of each cell, and which targets are met. Pure.

Speeds are medians over the rounds. Whatever compares two cells is the median of the ratios taken within one round: what the machine does to
both (a noisy neighbour, a disk that is shared) cancels in part. A target counts as met by that median; the range of the ratios is
given beside it, and says how much a single run can be relied on.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ghostserve.cli.bench_load_plan import VLLM, Cell, State
from ghostserve.cli.bench_load_run import Sample

Samples = Mapping[Cell, Sequence[Sample]]

OF_CEILING_MIN = 0.9
COLD_TO_WARM_MIN = 5.0
SECOND_START_MAX = 0.1
LEVEL = 0.95
"""Two ways count as level when one is less than 5 % behind: less than the same way differs from itself here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A median and the range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median=statistics.median(values), low=min(values), high=max(values))

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell's figures."""

    cell: str  # its name among the samples
    group: str
    loader: str
    state: str
    ranks: int
    raw: bool
    ours: bool
    seconds: Spread
    gb_per_s: float
    of_ceiling: Spread | None
    post_s: float
    cpu_s: float
    read_gb: float
    peak_rss_growth_gb: float
    pss_gb: float
    shared_gb: float  # of the pool's memory and the page cache's, resident in a rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What was aimed at, and what came of it."""

    name: str
    met: bool
    figures: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of it."""

    model_bytes: int
    files: int
    rounds: int
    ceiling_gb_per_s: Spread
    depth: str
    rows: tuple[Row, ...]
    targets: tuple[Target, ...]
    samples: dict[str, list[dict[str, Any]]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_report(samples: Samples, *, model_bytes: int, files: int, depth: str) -> Report:
    """Of at least one sample for each cell, as many for all."""
    ceilings = [
        model_bytes / sample.ceiling_s / 1e9
        for cell in samples
        for sample in samples[cell]
        if sample.ceiling_s is not None
    ]
    return Report(
        model_bytes=model_bytes,
        files=files,
        rounds=min(map(len, samples.values())),
        ceiling_gb_per_s=Spread.of(ceilings),
        depth=depth,
        rows=tuple(_row(cell, samples[cell], model_bytes) for cell in samples),
        targets=tuple(judge(samples)),
        samples={str(cell): [asdict(sample) for sample in taken] for cell, taken in samples.items()},
    )


def _row(cell: Cell, samples: Sequence[Sample], model_bytes: int) -> Row:
    def median(name: str) -> float:
        return statistics.median(float(getattr(sample, name)) for sample in samples)

    shares = _of_ceiling(samples)
    return Row(
        cell=str(cell),
        group=cell.group,
        loader=cell.label,
        state=cell.state.value,
        ranks=cell.ranks,
        raw=cell.raw,
        ours=cell.loader.ours,
        seconds=Spread.of([sample.seconds for sample in samples]),
        gb_per_s=model_bytes / median("seconds") / 1e9,
        of_ceiling=Spread.of(shares) if shares else None,
        post_s=median("post_s"),
        cpu_s=median("cpu_s"),
        read_gb=median("read_bytes") / 1e9,
        peak_rss_growth_gb=median("peak_rss_growth_bytes") / 1e9,
        pss_gb=median("pss_bytes") / 1e9,
        shared_gb=median("pss_shared_bytes") / 1e9,
    )


def _of_ceiling(samples: Sequence[Sample]) -> list[float]:
    """The share of the disk's speed that each cold load had."""
    return [sample.ceiling_s / sample.seconds for sample in samples if sample.ceiling_s is not None]


# ---- targets ---------------------------------------------------------------------------------------------------------


def judge(samples: Samples) -> list[Target]:
    """Every target for which this run has the cells."""
    targets: list[Target] = []
    for cell in samples:
        if cell.loader.ours:
            targets += _cold(cell, samples) if cell.state is State.COLD else _warm(cell, samples)
    return targets


def _cold(cell: Cell, samples: Samples) -> list[Target]:
    targets = []
    rivals = [other for other in samples if not other.loader.ours and other.group == cell.group]
    if rivals:
        best = min(rivals, key=lambda other: statistics.median(one.seconds for one in samples[other]))
        targets.append(_faster(cell, best, samples, aim="never slower than the best other", at_least=LEVEL))
    shares = Spread.of(_of_ceiling(samples[cell]))
    targets.append(
        Target(
            name=f"{cell}: at least {OF_CEILING_MIN:.0%} of the disk's ceiling",
            met=shares.median >= OF_CEILING_MIN,
            figures=f"{shares.text()} of it",
        )
    )
    return targets


def _warm(cell: Cell, samples: Samples) -> list[Target]:
    targets = []
    cold, cached = replace(cell, state=State.COLD), replace(cell, loader=VLLM, state=State.CACHED)
    if cold in samples:
        aim = f"at least {COLD_TO_WARM_MIN:.0f} x faster than cold"
        targets.append(_faster(cell, cold, samples, aim=aim, at_least=COLD_TO_WARM_MIN, digits=1))
        if not cell.raw:
            share = _ratio(samples[cell], samples[cold])
            targets.append(
                Target(
                    name=f"{cell}: a second server's weights take at most {SECOND_START_MAX:.0%} of the first's",
                    met=share.median <= SECOND_START_MAX,
                    figures=f"{share.text(3)} of them",
                )
            )
    if cached in samples:
        targets.append(_faster(cell, cached, samples, aim="no slower than page-cached mmap", at_least=LEVEL))
    return targets


def _faster(
    cell: Cell, other: Cell, samples: Samples, *, aim: str, at_least: float, digits: int = 2
) -> Target:
    """At least so many times the speed of another cell."""
    ratio = _ratio(samples[other], samples[cell])
    whom = other.label + (", cold" if other.loader is cell.loader else "")
    return Target(
        name=f"{cell}: {aim}",
        met=ratio.median >= at_least,
        figures=f"{ratio.text(digits)} x the speed of {whom}",
    )


def _ratio(longer: Sequence[Sample], shorter: Sequence[Sample]) -> Spread:
    """How many times as long the first took, round by round."""
    return Spread.of([one.seconds / other.seconds for one, other in zip(longer, shorter, strict=True)])


# ---- for people ------------------------------------------------------------------------------------------------------

HEADER = (
    "",
    "s",
    "GB/s",
    "of the ceiling",
    "CPU s",
    "peak RSS +GB",
    "off the disk GB",
    "PSS GB",
    "after it, s",
)


def table_rows(rows: Sequence[Row]) -> list[list[str]]:
    """One line for each cell, as texts, in the order of HEADER."""
    return [
        [
            row.loader,
            row.seconds.text(),
            f"{row.gb_per_s:.2f}",
            "" if row.of_ceiling is None else f"{row.of_ceiling.median:.0%}",
            f"{row.cpu_s:.1f}",
            f"{row.peak_rss_growth_gb:.2f}",
            f"{row.read_gb:.2f}",
            f"{row.pss_gb:.2f}",
            "" if row.raw else f"{row.post_s:.2f}",
        ]
        for row in rows
    ]


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that did the same work, together, the fastest first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return {group: sorted(of, key=lambda row: row.seconds.median) for group, of in found.items()}


def text_table(report: Report) -> str:
    """The whole report for a terminal."""
    ceiling = report.ceiling_gb_per_s
    lines = [
        f"{report.model_bytes / 1e9:.2f} GB in {report.files} files; the disk gives {ceiling.text()} GB/s ({report.depth})"
    ]
    for group, rows in groups(report.rows).items():
        cells = [[group, *HEADER[1:]], *table_rows(rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
        lines.append("")
        for line in cells:
            first, *rest = (
                text.ljust(width) if not at else text.rjust(width)
                for at, (text, width) in enumerate(zip(line, widths, strict=True))
            )
            lines.append("  ".join((first, *rest)).rstrip())
    lines.append("")
    lines += [
        f"{'met   ' if target.met else 'missed'}  {target.name}: {target.figures}"
        for target in report.targets
    ]
    return "\n".join(lines)
