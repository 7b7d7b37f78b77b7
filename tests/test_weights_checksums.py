"""Checksums of model files: compared, kept, merged; and `verify_model`, which asks the disk."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from ghostserve.errors import BadWeightsFileError, CorruptionError, WeightsChecksumError, WeightsError
from ghostserve.weights import checksum_file
from ghostserve.weights.cache_home import NO_HOME
from ghostserve.weights.checksum_file import ChecksumFile, default_folder
from ghostserve.weights.checksums import CELL_BYTES, Checksums
from ghostserve.weights.model_files import open_model
from ghostserve.weights.ranges import Range
from ghostserve.weights.reader import read_ranges
from ghostserve.weights.verify import Report, verify_model
from weights_kit import flip_byte, write_bytes_file, write_weights

NBYTES = 2 * CELL_BYTES + 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    write_bytes_file(tmp_path / "model" / "model.safetensors", NBYTES)
    return tmp_path / "model"


@pytest.fixture
def kept_in(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def load(folder: Path, kept_in: Path, *, begin: int = 0, end: int = NBYTES) -> ChecksumFile:
    """What a loader does."""
    model = open_model(folder)
    book = ChecksumFile(model, folder=kept_in)
    for file in model.files:
        read_ranges(file.path, [Range(begin, end, 0)], None, verify=book.of(file), expect=file)
    if book.learned:
        assert book.save()
    return book


def test_cells_are_learned_and_compared() -> None:
    data = np.random.default_rng(1).integers(0, 256, NBYTES, dtype=np.uint8)
    sums = Checksums(Path("x"), NBYTES)
    assert not sums.complete
    sums.check(CELL_BYTES, data[CELL_BYTES:])
    sums.check(0, data[:CELL_BYTES])
    assert sums.values == [zlib.crc32(data[at : at + CELL_BYTES]) for at in (0, CELL_BYTES, 2 * CELL_BYTES)]
    assert (sums.complete, sums.learned) == (True, 3)
    sums.check(0, data)
    for at in (0, CELL_BYTES - 1, CELL_BYTES, NBYTES - 1):
        wrong = data.copy()
        wrong[at] ^= 1
        with pytest.raises(
            WeightsChecksumError, match=f"bytes {at // CELL_BYTES * CELL_BYTES} to "
        ) as caught:
            sums.check(0, wrong)
        assert isinstance(caught.value, CorruptionError)
    assert Checksums(Path("x"), 0).complete


def test_they_are_kept_between_loads(folder: Path, kept_in: Path) -> None:
    first = load(folder, kept_in)
    assert first.complete
    assert first.path.parent == kept_in
    assert kept_in.stat().st_mode & 0o077 == 0
    again = ChecksumFile(open_model(folder), folder=kept_in)
    assert again.complete
    assert not again.learned


def test_a_byte_of_the_header_is_one_of_the_file(folder: Path, kept_in: Path) -> None:
    load(folder, kept_in)
    flip_byte(folder / "model.safetensors", 8 + len('{"a'))  # of the tensor's name: still a right header
    with pytest.raises(WeightsChecksumError, match=f"bytes 0 to {CELL_BYTES} are not what they were"):
        load(folder, kept_in)


def test_models_alike_in_all_but_their_bytes_have_one_each(tmp_path: Path, kept_in: Path) -> None:
    """As images, archives and object stores leave them: all times are one."""
    for place, seed in (("one", 1), ("two", 2)):
        (tmp_path / place).mkdir()
        write_bytes_file(tmp_path / place / "model.safetensors", NBYTES, seed=seed)
        os.utime(tmp_path / place / "model.safetensors", ns=(0, 0))
    (tmp_path / "link").symlink_to(tmp_path / "one")
    for place in ("one", "two", "one"):
        assert load(tmp_path / place, kept_in).complete
    assert ChecksumFile(open_model(tmp_path / "link"), folder=kept_in).complete


def test_what_two_processes_learn_is_put_together(folder: Path, kept_in: Path) -> None:
    model = open_model(folder)
    books = [ChecksumFile(model, folder=kept_in) for _ in range(2)]  # neither knows of the other
    for book, begin in zip(books, (0, CELL_BYTES), strict=True):
        read_ranges(model.files[0].path, [Range(begin, begin + 10, 0)], None, verify=book.of(model.files[0]))
        assert book.save()
    both = ChecksumFile(model, folder=kept_in).of(model.files[0])
    assert [value is not None for value in both.values] == [True, True, False]


DAMAGES = {
    "empty": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "a digit": lambda text: text.replace('"cell_bytes": 4', '"cell_bytes": 5'),
    "a checksum": lambda text: text.replace("]}}}", "0]}}}"),
    "a list": lambda text: "[]",
    "another version": lambda text: text.replace('"format": 1', '"format": 2'),
    "no UTF-8": lambda text: "\udcff",
    "other files": lambda text: sealed(text, files={}),
    "another model": lambda text: sealed(text, identity="x"),
}


def sealed(text: str, **changes: object) -> str:
    document = json.loads(text)
    document["body"].update(changes)
    document["crc32"] = zlib.crc32(json.dumps(document["body"], sort_keys=True).encode())
    return json.dumps(document)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_of_ours_stops_no_load(
    folder: Path, kept_in: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    path = load(folder, kept_in).path
    before = path.read_text()
    path.write_bytes(damage(before).encode(errors="surrogateescape"))  # type: ignore[operator]
    assert not ChecksumFile(open_model(folder), folder=kept_in).complete
    assert "is of no use" in caplog.text
    assert load(folder, kept_in).complete
    assert path.read_text() == before


def test_where_nothing_can_be_written_loads_go_on(
    folder: Path, kept_in: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept_in.write_text("a file, not a folder")
    book = ChecksumFile(open_model(folder), folder=kept_in)
    assert not book.save()
    assert "are not kept" in caplog.text


def test_a_lock_that_is_held_holds_nobody_up(
    folder: Path, kept_in: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checksum_file, "LOCK_S", 0.05)
    kept_in.mkdir()
    with (kept_in / checksum_file.LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not ChecksumFile(open_model(folder), folder=kept_in).save()
    assert "held by another process" in caplog.text
    assert ChecksumFile(open_model(folder), folder=kept_in).save()


def test_they_lie_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "ghostserve" / "weights"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "ghostserve" / "weights"


def test_a_user_without_a_home_loads_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user id that no passwd knows."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError):
        Path.home()
    assert default_folder() == NO_HOME / ".cache" / "ghostserve" / "weights"
    assert not ChecksumFile(open_model(folder)).complete


# ---- verify ----------------------------------------------------------------------------------------------------------


def verify(folder: Path, kept_in: Path) -> Report:
    seen: list[tuple[int, int]] = []
    report = verify_model(folder, lambda done, total: seen.append((done, total)), kept_in=kept_in)
    assert seen == sorted(seen)
    assert seen[-1] == (report.model.nbytes, report.model.nbytes)
    return report


def test_verify_makes_checksums_and_then_compares(folder: Path, kept_in: Path) -> None:
    first = verify(folder, kept_in)
    assert first.ok
    assert [file.compared for file in first.files] == [False]
    second = verify(folder, kept_in)
    assert second.ok
    assert [file.compared for file in second.files] == [True]
    flip_byte(folder / "model.safetensors", NBYTES - 3)
    third = verify(folder, kept_in)
    assert not third.ok
    assert isinstance(third.files[0].error, WeightsChecksumError)
    assert f"{folder / 'model.safetensors'}: bytes {2 * CELL_BYTES} to {NBYTES}" in str(third.files[0].error)
    flip_byte(folder / "model.safetensors", NBYTES - 3)
    assert verify(folder, kept_in).ok  # back again; the report of the wrong byte taught it nothing


def test_verify_looks_at_every_file(tmp_path: Path, kept_in: Path) -> None:
    folder = tmp_path / "m"
    for name in "abc":
        write_weights(folder / f"{name}.safetensors", {name: ("F32", [100])})
    assert verify(folder, kept_in).ok
    flip_byte(folder / "a.safetensors", 400)
    flip_byte(folder / "c.safetensors", 400)
    assert [file.error is None for file in verify(folder, kept_in).files] == [False, True, False]


def test_exchanged_files_of_one_layout_are_refused(tmp_path: Path, kept_in: Path) -> None:
    """Another model of the same architecture: same names, shapes and size, here even the same time."""
    folder, other = tmp_path / "m", tmp_path / "other"
    for seed, where in enumerate((folder, other)):
        write_weights(where / "model.safetensors", {"a": ("F32", [1000])}, seed=seed)
        os.utime(where / "model.safetensors", ns=(5, 5))
    load(folder, kept_in, end=100)
    shutil.copy2(other / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(WeightsChecksumError, match="or the file was exchanged"):
        load(folder, kept_in, end=100)


def hub_blob(tmp_path: Path, *, name: str | None = None) -> Path:
    """A snapshot of the hub's cache; its blob is named by its sha256."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    content = write_bytes_file(tmp_path / "x", 40 << 20)  # more than one window
    blob = repository / "blobs" / (name or hashlib.sha256(content).hexdigest())
    (tmp_path / "x").replace(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    return snapshot


def test_the_hubs_sha256_is_compared(tmp_path: Path, kept_in: Path) -> None:
    snapshot = hub_blob(tmp_path)
    report = verify(snapshot, kept_in)
    assert report.ok
    assert report.files[0].compared_with_hub
    flip_byte((snapshot / "model.safetensors").resolve(), 20 << 20)
    shutil.rmtree(kept_in)  # so that only the sha256 can tell
    error = verify(snapshot, kept_in).files[0].error
    assert isinstance(error, WeightsChecksumError)
    assert "the hub says" in str(error)
    assert not list(kept_in.glob("*.json"))  # what is wrong is not learned


def test_a_blob_with_another_name_has_no_known_sha256(tmp_path: Path, kept_in: Path) -> None:
    report = verify(hub_blob(tmp_path, name="f" * 40), kept_in)  # a git hash: not of the content alone
    assert report.ok
    assert not report.files[0].compared_with_hub


def test_a_download_into_a_folder_leaves_a_note(folder: Path, kept_in: Path) -> None:
    path = folder / "model.safetensors"
    note = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    written_s = path.stat().st_mtime + 0.5
    note.write_text(f"{'c' * 40}\n{digest}\n{written_s}\n")
    assert verify(folder, kept_in).files[0].compared_with_hub
    note.write_text(f"{'c' * 40}\n{'0' * 64}\n{written_s}\n")
    assert "the hub says" in str(verify(folder, kept_in).files[0].error)
    note.write_text(
        f"{'c' * 40}\n{'0' * 64}\n{written_s - 100}\n"
    )  # the file is newer: the note is not about it
    assert not verify(folder, kept_in).files[0].compared_with_hub
    note.write_text("nonsense")
    assert verify(folder, kept_in).ok


def test_what_is_no_model_is_an_error_at_once(folder: Path, kept_in: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(BadWeightsFileError) as caught:
        verify_model(folder, kept_in=kept_in)
    assert isinstance(caught.value, WeightsError)
