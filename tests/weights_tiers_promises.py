"""What every way promises, each promise a function that fails where it is broken; and what happens to files and disks meanwhile."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_bytes

from ghostserve.errors import (
    MissingShardError,
    WeightsChangedError,
    WeightsChecksumError,
    WeightsError,
    WeightsReadError,
)
from ghostserve.weights import source
from ghostserve.weights.model_files import ModelFiles
from weights_kit import flip_byte, open_files
from weights_tiers_kit import LARGE, ODD, SHARDS, Files, Tier

KIB = 1 << 10
Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], None]
Pread = Callable[[int, list[memoryview], int], int]


# ---- what is compared ------------------------------------------------------------------------------------------------


def expected(files: Files) -> Tensors:
    """As the safetensors library reads them."""
    found: Tensors = {}
    for name in SHARDS:
        found |= load_bytes(files[name])
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: a view."""
    return tensor.reshape(-1).view(torch.uint8)


def demand_same(name: str, tensor: torch.Tensor, right: torch.Tensor) -> None:
    assert (tensor.dtype, tensor.shape) == (right.dtype, right.shape), name
    assert tensor.is_contiguous(), name
    assert torch.equal(bits(tensor), bits(right)), f"{name} has wrong bytes"


def demand_model(loaded: list[tuple[str, torch.Tensor]], right: Tensors) -> None:
    names = [name for name, _ in loaded]
    assert sorted(names) == sorted(right), "every tensor, once"
    for name, tensor in loaded:
        demand_same(name, tensor, right[name])


def demand_refused(
    tier: Tier, model: ModelFiles, right: Tensors, kind: type[WeightsError], name: str, words: str
) -> None:
    """The load ends with this error, which names the file, and nothing wrong was handed out before."""
    with pytest.raises(kind, match=words) as refused:
        for tensor_name, tensor in tier.load(model):
            demand_same(tensor_name, tensor, right[tensor_name])
    assert type(refused.value) is kind
    assert str(model.folder / name) in str(refused.value)


# ---- the promises ----------------------------------------------------------------------------------------------------


def every_tensor_is_right(
    tier: Tier, files: Files, wanted: Callable[[str], bool] = lambda name: True
) -> None:
    """As often as it is loaded."""
    model = tier.model(tier.put(files))
    right = {name: tensor for name, tensor in expected(files).items() if wanted(name)}
    for _ in range(2):
        demand_model(list(tier.load(model, wanted)), right)


def each_tensor_is_its_users_own(tier: Tier, files: Files) -> None:
    """Whoever changes it changes no other tensor, not those still to come, no other load, and not the file."""
    folder, right = tier.put(files), expected(files)
    model = tier.model(folder)
    first, second = [], list(tier.load(model))
    for name, tensor in tier.load(model):
        demand_same(name, tensor, right[name])
        bits(tensor).bitwise_not_()
        first.append((name, tensor))
    demand_model(second, right)
    for name, tensor in first:
        bits(tensor).bitwise_not_()
        demand_same(name, tensor, right[name])
    demand_model(list(tier.load(model)), right)
    assert all((folder / name).read_bytes() == files[name] for name in SHARDS)


def what_is_kept_stays_as_it_was(tier: Tier, files: Files, others: Files) -> None:
    """When the load is over, its memory may be used again, but for what somebody still holds."""
    model, right = tier.model(tier.put(files)), expected(files)
    kept = list(tier.load(model))[::2]
    gc.collect()
    for _ in tier.load(tier.model(tier.put(others))):
        pass
    demand_model(kept, {name: right[name] for name, _ in kept})


def who_stops_in_the_middle_leaves_nothing(tier: Tier, files: Files) -> None:
    """And keeps what it has."""
    model, right = tier.model(tier.put(files)), expected(files)
    list(tier.load(model))
    before, threads = open_files(), set(threading.enumerate())
    load = tier.load(model)
    kept = [next(load) for _ in range(3)]
    load.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= threads
    assert open_files() <= before
    demand_model(kept, {name: right[name] for name, _ in kept})


def a_flipped_byte_is_refused(tier: Tier, files: Files, place: int) -> None:
    """Where the bytes come from the disk. The pool has what was checked: what the disk did since does not matter."""
    folder, right = tier.put(files), expected(files)
    model = tier.model(folder)
    demand_model(list(tier.load(model)), right)
    flip_byte(folder / LARGE, place)
    if tier.way.reads_files:
        demand_refused(tier, model, right, WeightsChecksumError, LARGE, "are not what they were")
    else:
        demand_model(list(tier.load(model)), right)


def a_file_that_changed_is_refused(tier: Tier, files: Files, change: Change) -> None:
    """Between its header and its bytes; in every tier, since nobody knows whose bytes would be mixed with whose."""
    folder, right = tier.put(files), expected(files)
    model = tier.model(folder)
    change(folder / ODD)
    kind = WeightsChangedError if (folder / ODD).exists() else MissingShardError
    demand_refused(tier, model, right, kind, ODD, "start again|download the model again")


def a_file_that_changes_meanwhile_does_no_harm(tier: Tier, files: Files) -> None:
    """While its tensors are being taken: the load ends with an error, or it was through before."""
    folder, right = tier.put(files), expected(files)
    model, loaded = tier.model(folder), []
    try:
        for name, tensor in tier.load(model):
            if not loaded:
                overwrite(folder / LARGE)
            loaded.append((name, tensor))
    except WeightsChangedError as error:
        refused = str(error)
    else:
        demand_model(loaded, right)
        return
    assert str(folder / LARGE) in refused


def a_read_error_is_named(tier: Tier, files: Files, fail: Pread, words: str) -> None:
    folder, right = tier.put(files), expected(files)
    model = tier.model(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source.os, "preadv", fail)
        if tier.way.reads_files:
            demand_refused(tier, model, right, WeightsReadError, LARGE, words)
        else:
            demand_model(list(tier.load(model)), right)
    demand_model(list(tier.load(model)), right)


# ---- what happens to files and disks ---------------------------------------------------------------------------------


def rewrite(path: Path, data: bytes) -> None:
    """Other content, later than the old one by any clock."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))


def overwrite(path: Path) -> None:
    rewrite(path, path.read_bytes()[:-1] + b"?")


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(0, 0))
    other.replace(path)


CHANGES: dict[str, Change] = {
    "a byte is gone": lambda path: os.truncate(path, path.stat().st_size - 1),
    "half is gone": lambda path: os.truncate(path, path.stat().st_size // 2),
    "it grew": lambda path: rewrite(path, path.read_bytes() + b"?"),
    "written to": overwrite,
    "replaced": replace,
    "removed": Path.unlink,
}
FAULT_AT = 400 * KIB  # in the large file only, and far from its header
pread = os.preadv


def input_output_error(fd: int, buffers: list[memoryview], offset: int) -> int:
    if offset + len(buffers[0]) > FAULT_AT:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return pread(fd, buffers, offset)


def early_end(fd: int, buffers: list[memoryview], offset: int) -> int:
    return 0 if offset + len(buffers[0]) > FAULT_AT else pread(fd, buffers, offset)


def short_reads(fd: int, buffers: list[memoryview], offset: int) -> int:
    return pread(fd, [buffers[0][:5000]], offset)


def no_direct_reads_after_all(fd: int, buffers: list[memoryview], offset: int) -> int:
    if offset > FAULT_AT and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return pread(fd, buffers, offset)
