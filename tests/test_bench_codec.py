"""`ghostserve bench codec`: the plan, the figures it makes of times, and one tiny run."""

from __future__ import annotations

import json

import pytest

from ghostserve.cli import bench, bench_codec
from ghostserve.cli.bench_codec import Cell, Report, measure, plan_cells, table
from ghostserve.codec.isal_backend import find_isal
from ghostserve.errors import UsageError

FIELDS = {
    *("op", "n", "m", "lost", "shard_bytes", "regime", "threads"),
    *("backend", "gb_per_s", "fraction_of_read", "ratio_to_isal"),
}


def cell(**changes: object) -> Cell:
    given = {"n": 4, "m": 2, "lost": 0, "shard_bytes": 64 << 10, "regime": "hot", "threads": 1}
    return Cell(**(given | changes))  # type: ignore[arg-type]


def test_the_grid() -> None:
    cells = plan_cells(quick=False)
    assert len(cells) == len(set(cells)) == 2 * 6 * 3 * 4 * 2
    assert {c.m for c in cells} == {1, 2, 3, 4}
    assert {c.op for c in cells} == {"encode", "decode"}
    quick = plan_cells(quick=True)
    assert 12 <= len(quick) <= 14
    assert {c.regime for c in quick} == {"hot", "cold"}
    assert {c.op for c in quick} == {"encode", "decode"}


def test_decode_reads_survivors_and_the_first_parities() -> None:
    matrix, sources = cell(lost=2).coefficients()
    assert sources == (2, 3, 4, 5)
    assert matrix.shape == (2, 4)


def test_the_figures() -> None:
    """Medians of the ratios within a repetition, not ratios of the medians; GB/s are of data shards."""
    times = {"read": [1.0, 2.0, 3.0], "native": [4.0, 8.0, 6.0], "isal": [8.0, 8.0, 24.0]}
    rows = {row.backend: row for row in bench_codec._rows(cell(), times)}
    assert set(rows) == {"native", "isal"}
    assert rows["native"].ratio_to_isal == 2.0
    assert rows["native"].fraction_of_read == 0.25
    big = cell(shard_bytes=1 << 30)
    (row,) = bench_codec._rows(big, {"read": [1.0], "native": [2.0]})
    assert row.gb_per_s == pytest.approx(4 * (1 << 30) / 2e9, abs=1e-3)
    assert row.ratio_to_isal is None


def test_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The smallest real one: two cells, all methods, as JSON."""
    monkeypatch.setattr(bench_codec, "REPETITION_S", 1e-4)
    monkeypatch.setattr(bench_codec, "COLD_BYTES", 1 << 20)
    cells = [cell(), cell(lost=2, regime="cold", threads=2)]
    monkeypatch.setattr(bench, "plan_cells", lambda quick: cells)
    assert bench.main(["codec", "--json", "--quick", "--repetitions", "3"]) == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    report = json.loads(line)
    assert set(report) == {"cpu", "dispatched", "isal", "rows"}
    assert all(set(row) == FIELDS for row in report["rows"])
    backends = {"native", "numpy", "torch"} | ({"isal"} if find_isal() is not None else set())
    assert {row["backend"] for row in report["rows"]} == backends
    assert all(row["gb_per_s"] > 0 for row in report["rows"])
    assert "[2/2] decode" in err


def test_the_table_names_what_it_compares() -> None:
    rows = bench_codec._rows(cell(), {name: [1e-6] for name in ("read", "native", "numpy", "torch")})
    text = table(Report(cpu="a processor", dispatched="native (avx2)", isal=None, rows=tuple(rows)))
    assert "a processor · native (avx2)" in text
    assert "pip install pyeclib" in text
    assert "encode n=4 m=2 64K hot" in text


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--repetitions 1"):
        bench.main(["codec", "--repetitions", "1"])
    with pytest.raises(UsageError, match="nothing"):
        bench.main(["nothing"])


def test_progress_is_told() -> None:
    said: list[str] = []
    measure(
        [cell(n=1, m=1)],
        repetitions=1,
        on_progress=lambda done, total, text: said.append(f"{done}/{total} {text}"),
    )
    assert said[0].startswith("1/1 encode n=1 m=1")
