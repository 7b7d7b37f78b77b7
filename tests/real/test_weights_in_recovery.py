"""A replacement's weights come out of the pool and not from the disk; without the pool it is replaced all the same. TP=2."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ghostserve.cli.bench_load_cache import drop, resident_pages
from ghostserve.weights import pool_start, runtime_dir
from real import kit
from real.kit import Ask, Served, assert_rebuilt, assert_same

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

OUT_OF_THE_POOL = "out of the pool"
ALONE = "for this process alone"
ASK = Ask(max_tokens=60)
FLAGS = ("--dtype", "float32", "--enforce-eager")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that nobody else reads, on a disk."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(kit.TINY, directory)
    return directory


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("pool")
    directory.chmod(0o700)
    yield directory
    pool_start.stop_holder(directory)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory, model: Path, pool: Path) -> Iterator[Served]:
    yield from started(tmp_path_factory, "pooled", model, env={runtime_dir.RUNTIME_DIR_ENV: str(pool)})


@pytest.fixture(scope="module")
def unpooled(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Served]:
    yield from started(tmp_path_factory, "unpooled", model, "--weights-memory", "0")


def started(
    factory: pytest.TempPathFactory, name: str, model: Path, *flags: str, env: dict[str, str] | None = None
) -> Iterator[Served]:
    served = kit.serve(factory.mktemp(name), name, *FLAGS, *flags, model=model, env=env)
    try:
        yield served
    finally:
        assert served.server.stop() == 0, served.server.log_tail(lines=80)


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def said(served: Served, sentence: str) -> int:
    """How often a rank has said so."""
    return served.server.log_file.read_text(errors="replace").count(sentence)


def show(served: Served, report: dict[str, Any]) -> None:
    """For people: how long it took, and what of the phase `weights` was whose."""
    print("phases, ms:", report["phases_ms"])
    for line in served.server.log_file.read_text(errors="replace").splitlines():
        if "weights: " in line or "Initializing model took" in line:
            print(line)


def lose(served: Served) -> dict[str, Any]:
    """Kill a rank in mid-answer: the tokens are as without, and this is the report."""
    reference, before = served.reference(ASK), served.recoveries()
    served.settle()
    served.kill_after(30, 1)
    assert_same(reference, served.run(ASK))
    report = served.recovery(after=before)
    assert_rebuilt(report, sealed=True)
    return report


def read_from_disk_bytes(pid: int) -> int:
    """What the process has had the disk read since it began."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise ValueError(f"/proc/{pid}/io has no read_bytes")


def lose_with_a_cold_cache(served: Served, model: Path) -> int:
    """What the replacement had the disk read, nothing of the weights being cached before."""
    served.reference(ASK)
    drop(shards(model))
    report = lose(served)
    show(served, report)
    return read_from_disk_bytes(served.server.status()["ranks"][1]["pid"])


def test_no_disk(pooled: Served, model: Path) -> None:
    before = said(pooled, OUT_OF_THE_POOL)
    read = lose_with_a_cold_cache(pooled, model)
    assert [resident_pages(shard) for shard in shards(model)] == [0] * len(shards(model))
    assert said(pooled, OUT_OF_THE_POOL) == before + 1
    assert read < sum(shard.stat().st_size for shard in shards(model)) // 4


@pytest.mark.slow  # another server
def test_without_the_pool_there_is_a_read(unpooled: Served, model: Path) -> None:
    """The negative control: the same check, and the disk is read."""
    read = lose_with_a_cold_cache(unpooled, model)
    assert said(unpooled, OUT_OF_THE_POOL) == 0
    assert read > sum(shard.stat().st_size for shard in shards(model)) // 2


@pytest.mark.slow  # another server
def test_the_same_tokens_with_and_without(pooled: Served, unpooled: Served) -> None:
    for ask in (ASK, kit.SEEDED):
        assert_same(unpooled.reference(ask), pooled.reference(ask))


def test_a_holder_that_hangs(pooled: Served, pool: Path) -> None:
    """It is asked once, with a bound, and the replacement reads from the disk."""
    holder, before = int((pool / runtime_dir.LOCK_NAME).read_text()), said(pooled, ALONE)
    os.kill(holder, signal.SIGSTOP)
    try:
        report = lose(pooled)
    finally:
        os.kill(holder, signal.SIGCONT)
    show(pooled, report)
    assert said(pooled, ALONE) == before + 1
    assert report["phases_ms"]["weights"] < 10_000


def test_a_holder_that_was_killed(pooled: Served, pool: Path) -> None:
    holder, before = int((pool / runtime_dir.LOCK_NAME).read_text()), said(pooled, ALONE)
    with contextlib.suppress(ProcessLookupError):
        os.kill(holder, signal.SIGKILL)
    lose(pooled)
    assert said(pooled, ALONE) == before + 1
