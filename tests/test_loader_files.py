"""Which file is opened when: the next one as soon as the bytes of this one are there, never two that are on their way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ghostserve.engine.loader_files import tensors
from ghostserve.errors import WeightsReadError
from ghostserve.weights.model_files import WeightsFile, open_files


class Bytes:
    """A file whose bytes arrive when they are asked for."""

    def __init__(self, file: WeightsFile, log: list[str]) -> None:
        self._data = np.fromfile(file.path, np.uint8)
        self._name, self._log, self._ready = file.path.stem, log, 0
        log.append(f"open {self._name}")

    def get(self, begin: int, end: int) -> np.ndarray:
        self._ready = max(self._ready, end)
        return self._data[begin:end]

    @property
    def arrived(self) -> bool:
        return self._ready == self._data.size

    def wait(self) -> None:
        self._log.append(f"wait {self._name}")

    def close(self) -> None:
        self._log.append(f"close {self._name}")


@pytest.fixture
def files(tmp_path: Path) -> tuple[WeightsFile, ...]:
    """Files a, b and c, each with two tensors of two bytes."""
    paths = []
    for stem in "abc":
        header = json.dumps(
            {
                f"{stem}{number}": {"dtype": "U8", "shape": [2], "data_offsets": [2 * number, 2 * number + 2]}
                for number in (0, 1)
            }
        ).encode()
        paths.append(tmp_path / f"{stem}.safetensors")
        paths[-1].write_bytes(len(header).to_bytes(8, "little") + header + bytes([ord(stem)] * 2 + [1, 2]))
    return open_files(paths, folder=tmp_path).files


def loaded(files: tuple[WeightsFile, ...], log: list[str], unwanted: str = "") -> Iterator[str]:
    for name, tensor in tensors(
        files, lambda file, spans: Bytes(file, log), lambda name: name[0] != unwanted
    ):
        assert tensor.tolist() == ([ord(name[0])] * 2 if name.endswith("0") else [1, 2])
        yield name


def test_the_next_file_is_read_while_the_last_tensor_is_used(files: tuple[WeightsFile, ...]) -> None:
    log: list[str] = []
    for name in loaded(files, log):
        log.append(name)  # noqa: PERF402 - the log grows in between
    assert log == [
        *("open a", "a0", "open b", "a1", "wait a", "close a"),
        *("b0", "open c", "b1", "wait b", "close b"),
        *("c0", "c1", "wait c", "close c"),
    ]


def test_a_file_of_which_nothing_is_wanted_is_not_opened(files: tuple[WeightsFile, ...]) -> None:
    log: list[str] = []
    assert list(loaded(files, log, unwanted="b")) == ["a0", "a1", "c0", "c1"]
    assert [what for what in log if what.startswith("open")] == ["open a", "open c"]


def test_who_stops_in_the_middle_leaves_nothing_open(files: tuple[WeightsFile, ...]) -> None:
    log: list[str] = []
    names = loaded(files, log)
    assert [next(names), next(names)] == ["a0", "a1"]  # b is open by now
    names.close()  # type: ignore[attr-defined]
    assert sorted(what for what in log if what.startswith("close")) == ["close a", "close b"]


def test_an_error_leaves_nothing_open(
    files: tuple[WeightsFile, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Bytes) -> None:
        raise WeightsReadError("the disk is gone")

    monkeypatch.setattr(Bytes, "wait", fail)
    log: list[str] = []
    with pytest.raises(WeightsReadError, match="the disk is gone"):
        list(loaded(files, log))
    assert sorted(what for what in log if what.startswith("close")) == ["close a", "close b"]
