"""A memory cgroup for one process: where it may be made, and what is said where it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ghostserve.arena.memory_group import LIMIT_BYTES, MemoryGroup
from ghostserve.errors import UnsupportedError


def world(tmp_path: Path, own: str, *groups: str) -> dict[str, Path]:
    """A cgroup file system of plain files, and what /proc/self/cgroup says in it."""
    root = tmp_path / "cgroup"
    for group in groups:
        (root / group).mkdir(parents=True, exist_ok=True)
    cgroups = tmp_path / "self"
    cgroups.write_text(own)
    return {"cgroups": cgroups, "root": root}


def test_v1_below_our_own_group(tmp_path: Path) -> None:
    paths = world(tmp_path, "9:cpu:/\n4:memory:/box\n0::/\n", "memory/box")
    group = MemoryGroup.create("g", **paths)
    assert group.path == paths["root"] / "memory/box/g"
    assert (group.path / "memory.limit_in_bytes").read_text() == str(LIMIT_BYTES)
    assert (group.path / "memory.memsw.limit_in_bytes").read_text() == str(LIMIT_BYTES)


def test_v1_where_the_path_is_one_of_the_host(tmp_path: Path) -> None:
    paths = world(tmp_path, "4:memory:/docker/0123\n", "memory")
    assert MemoryGroup.create("g", **paths).path == paths["root"] / "memory/g"


def test_v2_beside_our_own_group(tmp_path: Path) -> None:
    paths = world(tmp_path, "0::/slice/service\n", "slice/service")
    (paths["root"] / "slice/cgroup.subtree_control").write_text("cpu memory\n")
    group = MemoryGroup.create("g", **paths)
    assert group.path == paths["root"] / "slice/g"
    assert (group.path / "memory.max").read_text() == str(LIMIT_BYTES)
    assert (group.path / "memory.swap.max").read_text() == "0"


@pytest.mark.parametrize("own", ["0::/slice/service\n", "9:cpu:/\n", ""])
def test_refused_with_a_way_out(tmp_path: Path, own: str) -> None:
    with pytest.raises(UnsupportedError, match=r"no memory cgroup can be made here.*use crash"):
        MemoryGroup.create("g", **world(tmp_path, own, "slice/service"))


def test_refused_where_the_name_is_taken(tmp_path: Path) -> None:
    paths = world(tmp_path, "4:memory:/\n", "memory/g")
    with pytest.raises(UnsupportedError, match="no memory cgroup"):
        MemoryGroup.create("g", **paths)
    assert (paths["root"] / "memory/g").is_dir()
