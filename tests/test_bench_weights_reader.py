"""The bench of the reader: that cold means cold, that the cost is that of pairs, and that it runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import weights_reader
from weights_reader import Sample, cost, make_cold, make_file, make_warm

from ghostserve.errors import CheckFailed
from ghostserve.weights.source import cached_bytes


def test_cold_is_cold_and_warm_is_warm(tmp_path: Path) -> None:
    path = tmp_path / "x"
    make_file(path, 3_000_001)
    make_warm(path)
    assert cached_bytes(path) >= 0.999 * 3_000_001
    make_cold(path)
    assert cached_bytes(path) == 0


def test_what_does_not_leave_the_page_cache_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    make_file(path, 100_000)
    make_warm(path)
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    with pytest.raises(CheckFailed, match="still in the page cache"):
        make_cold(path)


def test_the_cost_is_the_median_of_pairs() -> None:
    def sample(wall_s: float) -> Sample:
        return Sample(wall_s=wall_s, cpu_s=wall_s / 2, nbytes=10**9)

    found = [
        {"cold, checked": sample(checked), "cold, unchecked": sample(plain)}
        for checked, plain in ((1.1, 1.0), (2.0, 2.0), (9.0, 3.0))  # a slow round is slow for both but once
    ]
    assert cost(found, "cold") == {
        "wall": pytest.approx(0.1),
        "wall_min": pytest.approx(0.0),
        "wall_max": pytest.approx(2.0),
        "cpu": pytest.approx(0.1),
        "cpu_s_per_gb": pytest.approx(0.05),
    }


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        weights_reader.main(
            ["--gib", "0.01", "--rounds", "1", "--folder", str(tmp_path), "--out", str(tmp_path)]
        )
        == 0
    )
    (document,) = (json.loads(path.read_text()) for path in tmp_path.glob("weights-reader-*.json"))
    assert set(document["rounds"][0]) == {
        "disk",
        *(f"{kind}, {how}" for kind in ("cold", "warm") for how in ("checked", "unchecked")),
    }
    assert "What checksums cost" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}  # the file of weights is gone
