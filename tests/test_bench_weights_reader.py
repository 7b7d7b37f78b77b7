"""The bench of the reader: that what is cold or warm is so when it is read, that the cost is that of pairs, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import weights_reader
from weights_reader import BESIDE, MEMORIES, Sample, cost, make_file, rounds_of

from ghostserve.cli.bench_load_cache import PAGE_BYTES, resident_pages


def test_what_is_cold_or_warm_is_so_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cached = tmp_path / "x", list[int]()
    make_file(path, 3_000_001)

    def look(path: Path, *_: object, **__: object) -> Sample:
        cached.append(resident_pages(path))
        return Sample(wall_s=1.0, cpu_s=1.0, nbytes=3_000_001)

    monkeypatch.setattr(weights_reader, "ceiling", look)
    monkeypatch.setattr(weights_reader, "load", look)
    monkeypatch.setattr(weights_reader, "read_to", lambda memory, path: look(path))
    ((_, found),) = rounds_of(path, 1)
    whole = -(-path.stat().st_size // PAGE_BYTES)
    assert dict(zip(found, cached, strict=True)) == {
        "disk": 0,
        BESIDE: 0,
        "cold, checked": 0,
        "cold, unchecked": 0,
        "warm, checked": whole,
        "warm, unchecked": whole,
        **{f"to memory: {memory}": 0 for memory in MEMORIES},
    }


def test_the_cost_is_the_median_of_pairs() -> None:
    def sample(wall_s: float) -> Sample:
        return Sample(wall_s=wall_s, cpu_s=wall_s / 2, nbytes=10**9)

    found = [
        {"cold, checked": sample(checked), "cold, unchecked": sample(plain)}
        for checked, plain in ((1.1, 1.0), (2.0, 2.0), (9.0, 3.0))  # a slow round is slow for both but once
    ]
    found_cost = cost(found, "cold")
    wall = found_cost.pop("wall")
    assert wall["median"] == pytest.approx(0.1)
    assert wall["low"] <= wall["median"] <= wall["high"]
    assert found_cost == {
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
        BESIDE,
        *(f"{kind}, {how}" for kind in ("cold", "warm") for how in ("checked", "unchecked")),
        *(f"to memory: {memory}" for memory in MEMORIES),
    }
    assert "What checksums cost" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}  # the file of weights is gone
