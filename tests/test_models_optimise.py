"""`ghostserve models optimise`: out of a real holder's memory onto the disk, and off it again."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from ghostserve.cli import main as cli
from ghostserve.weights import rank_file
from ghostserve.weights.pool import Hit, Lease, Pool
from ghostserve.weights.pool_start import stop_holder
from ghostserve.weights.pool_types import EntryInfo

NBYTES = 1 << 20
KEYS = ["rank-" + f"{number:02x}" * 32 for number in range(2)]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GHOSTSERVE_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield
    stop_holder(tmp_path / "run")


def in_memory(key: str, *, label: str = "org/model", kind: str = "rank") -> Hit:
    pool = Pool.connect(start=True, budget_bytes=64 << 20, timeout_s=10)
    assert pool is not None
    lease = pool.open(key, NBYTES, kind=kind, label=label, reload_cost_s=1.0)  # type: ignore[arg-type]
    assert isinstance(lease, Lease), lease
    with mmap.mmap(lease.fd, NBYTES) as memory:
        memory[:] = key[-1].encode() * NBYTES
    hit = lease.publish(b"{}")
    assert isinstance(hit, Hit), hit
    return hit


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What the command prints; with an error, what it says."""
    assert cli.main(["models", "optimise", *words]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_what_workers_loaded_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        in_memory(KEYS[0]),
        in_memory(KEYS[1]),
        in_memory("f", kind="file"),
        in_memory("x", label="other/one"),
    ):
        answer = json.loads(run(capsys, "org/model", "--tp", "2", "--json"))
    assert (answer["files"], answer["removed"]) == (2, False)
    assert answer["bytes"] == sum(path.stat().st_size for path in Path(answer["path"]).iterdir())
    for key in KEYS:
        found, into = rank_file.find(key), bytearray(NBYTES)
        assert found is not None
        found.read(memoryview(into))
        assert into == key[-1].encode() * NBYTES


def test_nobody_has_loaded_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "start a server of it once" in run(capsys, "org/model", code=1)
    with in_memory(KEYS[0]):
        assert "1 of 2 workers' weights are in memory" in run(capsys, "org/model", "-tp", "2", code=1)
    assert not rank_file.folder().exists()


def test_removed_again(capsys: pytest.CaptureFixture[str]) -> None:
    with in_memory(KEYS[0]), in_memory(KEYS[1], label="other/one"):
        run(capsys, "org/model")
        run(capsys, "other/one")
    assert "removed 1 copies of org/model" in run(capsys, "org/model", "--remove")
    assert [one.label for one in rank_file.all_files()] == ["other/one"]


def test_a_model_in_a_folder_is_known_by_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    with in_memory(KEYS[0], label=str(tmp_path / "mine")):
        assert "1 workers' weights" in run(capsys, "./mine")
    assert "removed 1 copies" in run(capsys, "./mine", "--remove")


def test_an_image_of_another_kind_of_key(capsys: pytest.CaptureFixture[str]) -> None:
    with in_memory("k"):
        assert "not the key of a rank's image" in run(capsys, "org/model", code=1)


@pytest.mark.parametrize("words", [["--tp", "0"], ["--tp", "-1"], ["--tp", "two"], ["--tp", "2", "--remove"]])
def test_words_that_make_no_sense(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with in_memory(KEYS[0]):
        assert words[0] in run(capsys, "org/model", *words, code=2)
    assert not rank_file.folder().exists()


def test_a_folder_with_a_long_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server calls it by the last 256 characters."""
    folder = tmp_path / ("a" * 200) / ("b" * 200)
    folder.mkdir(parents=True)
    with in_memory(KEYS[0], label=str(folder)[-256:]):
        assert "1 workers' weights" in run(capsys, str(folder))
    stop_holder(tmp_path / "run")
    assert "removed 1 copies" in run(capsys, str(folder), "--remove")


def test_what_an_interrupted_one_left_is_removed_with_the_copies(capsys: pytest.CaptureFixture[str]) -> None:
    with in_memory(KEYS[0]):
        run(capsys, "org/model")
    (rank_file.folder() / f"{KEYS[1]}.safetensors.abc.new").write_bytes(b"half")
    run(capsys, "org/model", "--remove")
    assert list(rank_file.folder().iterdir()) == []


def test_the_pool_evicts_it_meanwhile(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between being listed and being kept: no copy of empty memory, and nobody waits for memory that nobody fills."""
    in_memory(KEYS[0]).close()
    keep = rank_file.keep

    def evict_and_keep(pool: Pool, entry: EntryInfo) -> Path:
        pool.drop(entry.key)
        return keep(pool, entry)

    with monkeypatch.context() as evicting:
        evicting.setattr(rank_file, "keep", evict_and_keep)
        assert "have just left the memory" in run(capsys, "org/model", code=1)
    assert not rank_file.folder().exists()
    in_memory(KEYS[0]).close()
    assert "1 workers' weights" in run(capsys, "org/model")
