"""Bytes as they arrive: what is wanted and no more, right at every moment, and never waited for in vain."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from ghostserve.errors import WeightsChangedError, WeightsError
from ghostserve.weights.checksums import Checksums
from ghostserve.weights.model_files import WeightsFile, open_file
from ghostserve.weights.own_file import OwnFile
from ghostserve.weights.recycled import Recycler
from weights_kit import write_weights

TENSORS = {f"t{number}": ("U8", [size]) for number, size in enumerate((5, 1 << 20, 0, 3, 9 << 20, 4096))}


@pytest.fixture
def file(tmp_path: Path) -> WeightsFile:
    write_weights(tmp_path / "model.safetensors", TENSORS)
    return open_file(tmp_path / "model.safetensors")


def spans_of(file: WeightsFile, names: str) -> list[tuple[int, int]]:
    return [(one.begin, one.end) for one in file.header.tensors if one.name[1] in names]


def arrive(file: WeightsFile, names: str, **more: object) -> OwnFile:
    return OwnFile(
        file,
        spans_of(file, names),
        Recycler(),
        **{"direct": None, "verify": None, **more},  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("direct", [None, True, False])
@pytest.mark.parametrize("names", ["012345", "14", "5", "2", "03"])
def test_every_byte_is_right_when_it_is_handed_out(
    file: WeightsFile, names: str, direct: bool | None
) -> None:
    content = file.path.read_bytes()
    arriving = arrive(file, names, direct=direct)
    for begin, end in spans_of(file, names):
        assert arriving.get(begin, end).tobytes() == content[begin:end]
    arriving.wait()
    arriving.close()


def test_only_what_is_wanted_is_read(file: WeightsFile) -> None:
    arriving = arrive(file, "5")
    arriving.wait()
    assert arriving.arriving.stats is not None
    assert arriving.arriving.stats.bytes_read < 1 << 20


def test_a_file_that_changed(file: WeightsFile) -> None:
    os.utime(file.path, ns=(0, 0))
    arriving = arrive(file, "04")
    with pytest.raises(WeightsChangedError, match=r"model\.safetensors"):
        arriving.get(*spans_of(file, "4")[0])
    with pytest.raises(WeightsChangedError):
        arriving.wait()


def test_a_wrong_checksum(file: WeightsFile) -> None:
    cells = -(-file.nbytes // (4 << 20))
    arriving = arrive(file, "4", verify=Checksums(file.path, file.nbytes, [1] * cells))
    with pytest.raises(WeightsError, match="not what they were"):
        arriving.get(*spans_of(file, "4")[0])


def test_closed_in_the_middle(file: WeightsFile) -> None:
    """What was handed out stays as it is, and no thread is left."""
    arriving = arrive(file, "014")
    begin, end = spans_of(file, "1")[0]
    there = arriving.get(begin, end)
    arriving.close()
    assert np.array_equal(there, np.frombuffer(file.path.read_bytes()[begin:end], dtype=np.uint8))
    assert not [thread for thread in threading.enumerate() if thread.name == "ghostserve-weights"]
