"""`ghostserve bench load` for real, with a tiny model: every loader that is installed, in every state, ends with the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ghostserve.cli import bench_load
from ghostserve.cli.bench_load_model import Shape
from ghostserve.cli.bench_load_plan import OPTIMISED, POOL, VLLM, Cell, State, plan_cells
from ghostserve.cli.bench_load_report import Report
from ghostserve.cli.bench_load_run import SHARED_MEMORY, Trials
from ghostserve.errors import StartError
from ghostserve.weights.checksums import CELL_BYTES

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """One round of all cells; it raises by itself if two loaders disagree on the bytes."""
    return bench_load.measure(
        Shape.tiny(),
        cells=plan_cells(),
        repetitions=1,
        directory=tmp_path_factory.mktemp("bench"),
        on_progress=lambda text: None,
    )


def test_every_cell_was_measured(report: Report) -> None:
    assert len(report.rows) == len(plan_cells())
    assert all(row.seconds.median > 0 for row in report.rows)
    assert all(sample["digest"] for samples in report.samples.values() for sample in samples)


def test_cold_means_from_the_disk_and_warm_from_memory(report: Report) -> None:
    """By the kernel's own count of what the processes read from disks: ours read the model once, however many ranks there are.

    Others may read a library of theirs beside the tiny model, and each rank of theirs may read all of it.
    """
    for row in report.rows:
        headers = row.ranks * CELL_BYTES if row.loader == OPTIMISED.name else 0  # where a copy's image begins
        share = (row.read_gb * 1e9 - headers) / report.model_bytes
        if row.state != State.COLD.value:
            assert share < 0.1, row
        elif row.ours:
            assert 0.9 < share < 1.1, row
        else:
            assert 0.9 < share < 1.6 * row.ranks, row


def test_ranks_share_what_the_pool_has(report: Report) -> None:
    """Bytes that both have mapped count half in each."""
    shared = [row for row in report.rows if row.raw and row.ranks == 2 and row.state == State.POOLED.value]
    (row,) = shared
    assert row.shared_gb * 1e9 >= 0.45 * report.model_bytes


def test_a_loader_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    with (
        Trials(scratch=tmp_path, log=tmp_path / "log") as trials,
        pytest.raises(StartError, match="no-such-folder"),
    ):
        trials.run(
            Cell(loader=VLLM, state=State.COLD),
            model=tmp_path / "no-such-folder",
            digest=False,
            before=lambda: None,
        )


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Neither the process of the trials, nor the holder that a load has started, nor shared memory of vLLM's."""
    cells = [Cell(loader=POOL, state=State.COLD, raw=True), Cell(loader=VLLM, state=State.CACHED, ranks=2)]
    before = _children()
    bench_load.measure(
        Shape.tiny(), cells=cells, repetitions=1, directory=tmp_path, on_progress=lambda text: None
    )
    assert not list(tmp_path.iterdir())
    assert not list(SHARED_MEMORY.glob(f"{bench_load.PREFIX}*"))
    assert _children() == before
    assert not _processes_naming(str(tmp_path))


def _children() -> set[str]:
    task = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return set(task.read_text().split())


def _processes_naming(text: str) -> list[str]:
    """Command lines of processes that have `text` in them or in their environment; the test's own does not."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in words:
            found.append(words.decode(errors="replace"))
    return found
