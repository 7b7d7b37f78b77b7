"""A rank's copy on the disk: whole and as it was, or refused by name; whatever is done to the file."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ghostserve.errors import (
    BadWeightsFileError,
    DiskFullError,
    TruncatedWeightsError,
    WeightsChecksumError,
    WeightsError,
)
from ghostserve.weights import rank_file, rank_folder
from ghostserve.weights.checksums import CELL_BYTES
from weights_kit import flip_byte, raw

pytestmark = pytest.mark.long

KEY = "rank-" + "5a" * 32
TABLE = b'{"version": 1}'


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def image_of(nbytes: int) -> np.ndarray:
    return np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)


def written(nbytes: int = 2 * CELL_BYTES + 4096) -> tuple[Path, np.ndarray]:
    image = image_of(nbytes)
    return rank_file.write(image, TABLE, key=KEY, label="org/model"), image


def read(key: str = KEY) -> bytearray:
    found = rank_file.find(key)
    assert found is not None
    into = bytearray(found.file.header.tensors[0].end - found.file.header.tensors[0].begin)
    found.read(memoryview(into))
    return into


@pytest.mark.parametrize(
    "nbytes", [1, 4096, CELL_BYTES - 1, CELL_BYTES, CELL_BYTES + 1, 3 * CELL_BYTES + 4096]
)
def test_what_was_kept_is_there(nbytes: int) -> None:
    path, image = written(nbytes)
    assert read() == image.tobytes()
    found = rank_file.find(KEY)
    assert found is not None
    assert (found.label, found.table) == ("org/model", TABLE)
    assert [one.file.path for one in rank_file.all_files()] == [path]
    assert os.listdir(path.parent) == [path.name]


def test_any_reader_of_safetensors_reads_it() -> None:
    path, image = written()
    (tensor,) = safetensors.numpy.load_file(path).values()
    assert (tensor == image).all()


def test_the_image_is_read_in_place() -> None:
    path, image = written()
    found = rank_file.find(KEY)
    assert found is not None
    (tensor,) = found.file.header.tensors
    assert tensor.begin % CELL_BYTES == 0
    assert path.stat().st_size == tensor.begin + image.size


def test_there_is_none() -> None:
    assert rank_file.find(KEY) is None
    assert list(rank_file.all_files()) == []


@pytest.mark.parametrize(
    "key", ["", "rank-", "rank-" + "5A" * 32, "../" + KEY, f"{KEY}/x", f"{KEY}\n", "file-" + "5a" * 32]
)
def test_no_key_leads_out_of_the_folder(key: str) -> None:
    with pytest.raises(WeightsError, match="not the key"):
        rank_file.find(key)
    with pytest.raises(WeightsError, match="not the key"):
        rank_file.write(image_of(1), TABLE, key=key, label="x")


@pytest.mark.parametrize(
    "place", [CELL_BYTES, CELL_BYTES + 5, 2 * CELL_BYTES - 1, 2 * CELL_BYTES, 3 * CELL_BYTES + 4095]
)
def test_a_flipped_byte_is_found(place: int) -> None:
    path, _ = written()
    flip_byte(path, place)
    with pytest.raises(WeightsChecksumError, match=path.name):
        read()


@pytest.mark.parametrize("cut", [1, 4096, CELL_BYTES, 2 * CELL_BYTES + 4096, 3 * CELL_BYTES])
def test_a_file_that_was_cut(cut: int) -> None:
    path, _ = written()
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(TruncatedWeightsError, match=path.name):
        rank_file.find(KEY)


Header = dict[str, Any]


def metadata(**more: str) -> Callable[[Header], None]:
    return lambda header: header["__metadata__"].update(more)


def without(name: str) -> Callable[[Header], None]:
    return lambda header: header["__metadata__"].pop(name)


def rename(header: Header) -> None:
    header["other"] = header.pop("image")


def retype(header: Header) -> None:
    header["image"]["dtype"] = "I8"


def split(header: Header) -> None:
    (nbytes,) = header.pop("image")["shape"]
    header["image"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    header["more"] = {"dtype": "U8", "shape": [nbytes - 1], "data_offsets": [1, nbytes]}


WRONG: dict[str, tuple[Callable[[Header], object], str]] = {
    "another format": (metadata(format="2"), "format '2', known is '1'"),
    "no format": (without("format"), "format '', known"),
    "no key": (without("key"), "no key"),
    "no label": (without("label"), "no label"),
    "no table": (without("table"), "no table"),
    "no checksums": (without("crc32"), "no crc32"),
    "too few checksums": (metadata(crc32="0" * 8), "not 3 checksums"),
    "too many checksums": (metadata(crc32="0" * 32), "not 3 checksums"),
    "half a checksum": (metadata(crc32="0" * 23), "not 3 checksums"),
    "no digits": (metadata(crc32="x" * 24), "not 3 checksums"),
    "digits of others": (metadata(crc32="\N{ARABIC-INDIC DIGIT ONE}" * 24), "not 3 checksums"),
    "another key": (metadata(key="rank-" + "00" * 32), "another key"),
    "another tensor": (rename, "one tensor of bytes"),
    "another type": (retype, "one tensor of bytes"),
    "two tensors": (split, "one tensor of bytes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_the_header_is_named(name: str) -> None:
    change, said = WRONG[name]
    path, _ = written()
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    path.write_bytes(raw(json.dumps(header).encode().ljust(length), data[8 + length :]))
    with pytest.raises(BadWeightsFileError, match=said) as raised:
        rank_file.find(KEY)
    assert path.name in str(raised.value)


def test_an_image_at_an_odd_place() -> None:
    path, _ = written()
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes(raw(data[8 : 8 + length] + b" " * 8, data[8 + length :]))
    with pytest.raises(BadWeightsFileError, match="no multiple of"):
        rank_file.find(KEY)


def test_a_full_disk_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path, image = written()
    path.unlink()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"No space left.* another folder with XDG_CACHE_HOME$"):
        rank_file.write(image, TABLE, key=KEY, label="x")
    assert os.listdir(path.parent) == []


WRITE_AND_WAIT = """
import os, sys, time
import numpy as np
from ghostserve.weights import rank_file, rank_folder
def wait(fd):
    print("written", flush=True)
    time.sleep(60)
os.fsync = wait
rank_file.write(np.zeros(4096, np.uint8), b"{}", key=sys.argv[1], label="x")
"""


@pytest.fixture
def writing(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is about to put its copy into its place."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_AND_WAIT, "rank-" + "00" * 32], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        yield process
        process.kill()


def test_what_a_killed_process_left_goes_with_the_next_copy(writing: subprocess.Popen[str]) -> None:
    """And not before it is dead."""
    path, _ = written()
    assert [one.file.path for one in rank_file.all_files()] == [path]
    assert len(os.listdir(path.parent)) == 2
    writing.kill()
    writing.wait(10)
    assert [one.file.path for one in rank_file.all_files()] == [path]
    written()
    assert os.listdir(path.parent) == [path.name]


def test_leftovers_go_when_copies_are_removed(writing: subprocess.Popen[str]) -> None:
    rank_folder.remove_leftovers(rank_file.folder())
    assert len(os.listdir(rank_file.folder())) == 1
    writing.kill()
    writing.wait(10)
    rank_folder.remove_leftovers(rank_file.folder())
    assert os.listdir(rank_file.folder()) == []


def test_two_that_write_the_same_copy() -> None:
    """Each beside the other: machines that share a disk may even have the same process number."""
    image = image_of(4 * CELL_BYTES)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: rank_file.write(image, TABLE, key=KEY, label="x"), range(8)))
    assert read() == image.tobytes()
    assert len(os.listdir(rank_file.folder())) == 1


def test_only_its_user_can_read_or_change_it() -> None:
    before = os.umask(0)
    try:
        path, _ = written()
    finally:
        os.umask(before)
    assert [stat.S_IMODE(one.stat().st_mode) for one in (path, path.parent)] == [0o600, 0o700]


@pytest.mark.parametrize("of", ["the folder", "the file"])
def test_one_that_anybody_may_have_put_there(of: str) -> None:
    path, image = written()
    other = path.parent if of == "the folder" else path
    mode = other.stat().st_mode
    other.chmod(mode | stat.S_IWOTH)
    with pytest.raises(BadWeightsFileError, match="every user can write to it") as raised:
        read()
    assert str(other) in str(raised.value)
    other.chmod(mode | stat.S_IWGRP)  # as where a volume is given to the group of a service
    assert read() == image.tobytes()


@pytest.mark.parametrize("of", ["the folder", "the file"])
def test_one_that_belongs_to_somebody_else(monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    path, _ = written()
    other = path.parent if of == "the folder" else path
    if os.geteuid() == 0:
        os.chown(other, 4711, 4711)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(BadWeightsFileError, match="belongs to user"):
        rank_file.find(KEY)
    if of == "the folder":
        with pytest.raises(BadWeightsFileError, match="XDG_CACHE_HOME"):
            written()


@pytest.mark.parametrize("label", ["m\udc80", "a\nb", "x" * 300, '"}', "\0"])
def test_any_name_of_a_model(label: str) -> None:
    path = rank_file.write(image_of(10), TABLE, key=KEY, label=label)
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata()["key"] == KEY
    found = rank_file.find(KEY)
    assert found is not None
    assert found.label == rank_file.label_of(label)


def test_one_that_is_there_is_replaced_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that has it open goes on with what it was."""
    _, image = written()
    before = rank_file.find(KEY)
    assert before is not None
    with open(before.file.path, "rb"):
        rank_file.write(image_of(4096), TABLE, key=KEY, label="x")
        assert read() == image_of(4096).tobytes()
    assert len(image) != 4096
