"""`ghostserve bench load` without its trials: the model it writes, the page cache it empties, the order of its cells, what it makes of times."""

from __future__ import annotations

import json
import mmap
import os
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ghostserve.cli import bench, bench_load, bench_load_cache
from ghostserve.cli.bench_load import best_depth
from ghostserve.cli.bench_load_ceiling import Depth, read_s
from ghostserve.cli.bench_load_model import INDEX, SECTOR_BYTES, Shape, write_model
from ghostserve.cli.bench_load_plan import (
    ALONE,
    LOADERS,
    POOL,
    RUNAI,
    VLLM,
    VLLM_PREFETCH,
    Cell,
    State,
    plan_cells,
    shuffled,
)
from ghostserve.cli.bench_load_report import Target, judge, make_report, text_table
from ghostserve.cli.bench_load_run import Sample
from ghostserve.errors import CheckFailed, UnsupportedError, UsageError
from ghostserve.weights.model_files import open_model

DEPTH = Depth(in_flight=3, chunk_bytes=1 << 20)


def sample(seconds: float, *, ceiling_s: float | None = None, digest: str = "") -> Sample:
    return Sample(
        seconds=seconds,
        ceiling_s=ceiling_s,
        post_s=0.5,
        cpu_s=1.0,
        read_bytes=0,
        peak_rss_growth_bytes=0,
        pss_bytes=0,
        pss_shared_bytes=0,
        digest=digest,
    )


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tiny model's weights on a real disk: the page cache of a tmpfs cannot be emptied."""
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder, Shape.tiny())


def test_the_model_is_as_large_as_was_asked_for_and_no_larger_than_it_must() -> None:
    shape = Shape.of_bytes(2_100_000_000)
    assert shape.nbytes >= 2_100_000_000 > replace(shape, layers=shape.layers - 1).nbytes
    assert Shape.of_bytes(1).layers == 1
    assert Shape().nbytes == 2 * 1_100_048_384  # TinyLlama-1.1B


def test_the_files_are_a_checkpoint(files: list[Path]) -> None:
    """By our own parser, which refuses whatever is wrong, and by what vLLM uses."""
    from safetensors import safe_open

    model = open_model(files[0].parent)
    found = {span.name: span.shape for file in model.files for span in file.header.tensors}
    assert found == dict(Shape.tiny().tensors())
    index = json.loads((files[0].parent / INDEX).read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    for file in model.files:
        with safe_open(file.path, framework="np") as opened:
            assert set(opened.keys()) == {span.name for span in file.header.tensors}
        bits = np.frombuffer(file.path.read_bytes(), np.uint16, offset=file.header.header_bytes)
        assert ((bits & 0x7F80) != 0x7F80).all()  # neither infinite nor not a number


def test_no_file_is_convenient(files: list[Path]) -> None:
    lengths = [file.stat().st_size for file in files]
    assert len(files) == 3
    assert len(set(lengths)) == 3
    assert all(length % SECTOR_BYTES for length in lengths)


def test_two_seeds_are_two_models(files: list[Path], tmp_path: Path) -> None:
    same, other = (
        write_model(tmp_path / "same", Shape.tiny()),
        write_model(tmp_path / "b", Shape.tiny(), seed=1),
    )
    assert [file.read_bytes() for file in same] == [file.read_bytes() for file in files]
    assert same[0].read_bytes() != other[0].read_bytes()


def test_a_full_disk_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=4096))
    with pytest.raises(UnsupportedError, match="--directory"):
        write_model(tmp_path / "model", Shape.tiny())
    assert not list((tmp_path / "model").iterdir())


# ---- the page cache and the disk -------------------------------------------------------------------------------------


def test_the_page_cache_is_emptied_and_filled(files: list[Path]) -> None:
    bench_load_cache.fill(files)
    assert [bench_load_cache.resident_pages(file) for file in files] == [
        -(-file.stat().st_size // mmap.PAGESIZE) for file in files
    ]
    bench_load_cache.drop(files)
    assert not any(bench_load_cache.resident_pages(file) for file in files)
    files[0].read_bytes()
    assert bench_load_cache.resident_pages(files[0]) == -(-files[0].stat().st_size // mmap.PAGESIZE)
    bench_load_cache.drop(files)


def test_what_stays_in_the_page_cache_is_not_measured_as_cold(files: list[Path]) -> None:
    """A page that somebody has mapped and looked at stays whatever posix_fadvise says."""
    with files[0].open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        seen = np.frombuffer(mapped, np.uint8)[:: mmap.PAGESIZE].sum()
        with pytest.raises(CheckFailed, match=rf"of {files[0].name}"):
            bench_load_cache.drop(files, timeout_s=0.2)
        del seen
    bench_load_cache.drop(files)


def test_an_empty_file_has_no_pages(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert bench_load_cache.resident_pages(tmp_path / "empty") == 0


def test_direct_reads_leave_the_page_cache_empty(files: list[Path]) -> None:
    bench_load_cache.drop(files)
    assert read_s(files, DEPTH) > 0
    assert not any(bench_load_cache.resident_pages(file) for file in files)


def test_a_file_that_ends_early_is_no_ceiling(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda *arguments: 0)
    with pytest.raises(CheckFailed, match="0 of"):
        read_s(files, DEPTH)


def test_a_disk_without_direct_reads_is_refused(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(paths: object, depth: object) -> float:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(bench_load, "read_s", refuse)
    with pytest.raises(UnsupportedError, match="--directory"):
        best_depth(files, lambda text: None)


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_every_loader_does_every_work_cold() -> None:
    cells = plan_cells(LOADERS)
    assert len(set(map(str, cells))) == len(set(cells)) == len(cells)
    for raw in (False, True):
        cold = {
            cell.loader for cell in cells if cell.state is State.COLD and cell.ranks == 1 and cell.raw is raw
        }
        assert cold == {loader for loader in LOADERS if loader.available and (loader.reader or not raw)}


def test_who_is_not_installed_is_left_out() -> None:
    missing = replace(RUNAI, package="no_such_package_anywhere")
    assert not missing.available
    assert VLLM.available
    assert missing not in {cell.loader for cell in plan_cells((*LOADERS, missing))}


@pytest.mark.parametrize("seed", range(20))
def test_the_pool_is_filled_just_before_it_is_measured(seed: int) -> None:
    """Whatever the order: another cold load would have emptied it."""
    cells = plan_cells()
    order = shuffled(cells, random.Random(seed))
    assert sorted(map(str, order)) == sorted(map(str, cells))
    for place, cell in enumerate(order):
        if cell.state is State.POOLED:
            assert order[place - 1] == replace(cell, state=State.COLD)


def test_orders_differ() -> None:
    assert len({tuple(map(str, shuffled(plan_cells(), random.Random(seed)))) for seed in range(5)}) == 5


# ---- what is made of the times ---------------------------------------------------------------------------------------

COLD, WARM = Cell(loader=POOL, state=State.COLD), Cell(loader=POOL, state=State.POOLED)
RIVAL, WORSE = Cell(loader=VLLM_PREFETCH, state=State.COLD), Cell(loader=VLLM, state=State.COLD)
CACHED = Cell(loader=VLLM, state=State.CACHED)


def targets(
    ours_s: float, warm_s: float, *, rival_s: float = 2.0, cached_s: float = 1.0
) -> dict[str, Target]:
    samples = {
        COLD: [sample(ours_s * noise, ceiling_s=1.9 * noise) for noise in (1, 2, 3)],
        WARM: [sample(warm_s * noise) for noise in (1, 2, 3)],
        RIVAL: [sample(rival_s * noise, ceiling_s=1.9 * noise) for noise in (1, 2, 3)],
        WORSE: [sample(9.0, ceiling_s=1.9)] * 3,
        CACHED: [sample(cached_s * noise) for noise in (1, 2, 3)],
    }
    return {target.name.split(": ")[-1]: target for target in judge(samples)}


def test_all_targets_met() -> None:
    found = targets(2.0, 0.1)
    assert len(found) == 5
    assert all(target.met for target in found.values()), found
    assert found["never slower than the best other"].figures.endswith("vLLM prefetch")


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        (
            {"ours_s": 2.2, "warm_s": 0.1},
            {"never slower than the best other", "at least 90% of the disk's ceiling"},
        ),
        ({"ours_s": 2.0, "warm_s": 0.3}, {"a second server's weights take at most 10% of the first's"}),
        (
            {"ours_s": 2.0, "warm_s": 0.5},
            {"at least 5 x faster than cold", "a second server's weights take at most 10% of the first's"},
        ),
        ({"ours_s": 2.0, "warm_s": 0.1, "cached_s": 0.05}, {"no slower than page-cached mmap"}),
        ({"ours_s": 2.0, "warm_s": 0.1, "rival_s": 1.0}, {"never slower than the best other"}),
    ],
)
def test_each_target_can_be_missed(changes: dict[str, float], missed: set[str]) -> None:
    assert {name for name, target in targets(**changes).items() if not target.met} == missed


def test_a_loader_is_not_compared_with_one_that_does_other_work() -> None:
    other_work = replace(RIVAL, raw=True)
    names = [target.name for target in judge({COLD: [sample(2.0, ceiling_s=1.9)], other_work: [sample(0.1)]})]
    assert names == [f"{COLD}: at least 90% of the disk's ceiling"]


def test_the_report_and_its_table() -> None:
    samples = {
        COLD: [sample(2.0, ceiling_s=1.0), sample(4.0, ceiling_s=3.0), sample(3.0, ceiling_s=2.0)],
        CACHED: [sample(1.0)] * 3,
    }
    report = make_report(samples, model_bytes=6_000_000_000, files=3, depth="4 x 8 MiB")
    cold, cached = report.rows
    assert (cold.seconds.median, cold.seconds.low, cold.seconds.high) == (3.0, 2.0, 4.0)
    assert cold.gb_per_s == 2.0
    assert cold.of_ceiling is not None
    assert cold.of_ceiling.median == pytest.approx(2 / 3)  # of the shares, round by round
    assert cached.of_ceiling is None
    assert report.ceiling_gb_per_s.median == 3.0
    assert (report.rounds, cold.ours, cached.ours) == (3, True, False)
    assert set(report.samples) == {cold.cell, cached.cell}
    json.dumps(report.to_dict())
    text = text_table(report)
    assert "6.00 GB in 3 files" in text
    assert "missed  cold, model: ghostserve: at least 90%" in text


# ---- the rounds ------------------------------------------------------------------------------------------------------


def test_loaders_that_disagree_are_found() -> None:
    cells = [COLD, RIVAL, replace(RIVAL, raw=True)]

    def run(digests: dict[Cell, str]) -> dict[Cell, list[Sample]]:
        return bench_load._rounds(
            cells,
            lambda cell, digest: sample(1.0, digest=digests[cell] if digest else ""),
            repetitions=2,
            on_progress=lambda text: None,
            rng=random.Random(0),
        )

    alike = {COLD: "1", RIVAL: "1", cells[2]: "2"}  # other work, other digest
    assert {cell: len(taken) for cell, taken in run(alike).items()} == dict.fromkeys(cells, 2)
    with pytest.raises(CheckFailed, match="different bytes"):
        run(alike | {RIVAL: "3"})


def test_no_round_is_begun_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def measure_one(cell: Cell, digest: bool) -> Sample:
        nonlocal now_s
        now_s += 10.0
        return sample(10.0)

    monkeypatch.setattr(bench_load, "monotonic_s", lambda: now_s)
    rounds = {
        limit_s: len(
            bench_load._rounds(
                [COLD, RIVAL],
                measure_one,
                repetitions=5,
                on_progress=lambda text: None,
                rng=random.Random(0),
                time_max_s=limit_s,
            )[COLD]
        )
        for limit_s in (1.0, 59.0, 60.0, 1000.0)
    }
    assert rounds == {1.0: 1, 59.0: 2, 60.0: 3, 1000.0: 5}


def test_the_model_is_removed_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(files: list[Path], on_progress: object) -> Depth:
        assert all(file.exists() for file in files)
        raise CheckFailed("no")

    monkeypatch.setattr(bench_load, "best_depth", fail)
    with pytest.raises(CheckFailed, match="no"):
        bench_load.measure(
            Shape.tiny(), cells=[COLD], repetitions=1, directory=tmp_path, on_progress=lambda text: None
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--repetitions", "0"], ["--size", "-1"]])
def test_wrong_arguments(words: list[str]) -> None:
    with pytest.raises(UsageError, match=words[0]):
        bench.main(["load", *words])


def test_options_of_one_are_not_options_of_the_other() -> None:
    with pytest.raises(UsageError, match="--path"):
        bench.main(["load", "--path", "avx2"])
    with pytest.raises(UsageError, match="--size"):
        bench.main(["codec", "--size", "2"])


def test_without_a_pool_means_without() -> None:
    assert json.loads(ALONE.environment["GHOSTSERVE_CONFIG"]) == {"weights_memory": 0}
