"""Which files are a model: the index, the hub's cache, and what is refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ghostserve.errors import (
    BadWeightsFileError,
    MissingShardError,
    TruncatedWeightsError,
    UnsafeWeightsError,
    WeightsError,
)
from ghostserve.weights.model_files import ModelFiles, open_model
from ghostserve.weights.pooled_file import file_key
from ghostserve.weights.remote_names import INDEX
from weights_kit import flip_byte, raw, write_weights

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(folder: Path, *, index: object = None) -> Path:
    """A model of two shards with its index, and a file that the index does not name."""
    write_weights(folder / ONE, {"a": ("F32", [3]), "b": ("BF16", [5])}, seed=1)
    write_weights(folder / TWO, {"c": ("F32", [3]), "d": ("BF16", [5])}, seed=2)
    write_weights(folder / "consolidated.safetensors", {"a": ("F32", [3])}, seed=3)
    if index is None:
        index = {"metadata": {}, "weight_map": {"a": ONE, "b": ONE, "c": TWO, "d": TWO}}
    (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


def names(model: ModelFiles) -> list[str]:
    return [file.name for file in model.files]


def test_the_index_says_which_files(tmp_path: Path) -> None:
    model = open_model(sharded(tmp_path))
    assert names(model) == [ONE, TWO]
    assert model.nbytes == (tmp_path / ONE).stat().st_size + (tmp_path / TWO).stat().st_size


def test_without_an_index_all_files_count(tmp_path: Path) -> None:
    write_weights(tmp_path / "adapter_model.safetensors", {"a": ("F32", [3])})
    write_weights(tmp_path / "more.safetensors", {"b": ("F32", [3])})
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")  # beside safetensors it is not looked at
    assert names(open_model(tmp_path)) == ["adapter_model.safetensors", "more.safetensors"]


def test_shards_may_lie_in_a_folder_of_the_model(tmp_path: Path) -> None:
    write_weights(tmp_path / "transformer" / "one.safetensors", {"a": ("F32", [3])})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "transformer/one.safetensors"}}))
    assert open_model(tmp_path).files[0].path == tmp_path / "transformer" / "one.safetensors"


INDEXES = {
    "no JSON": ("{", "is not JSON"),
    "no table": ("[]", "no weight_map"),
    "no map": ({}, "no weight_map"),
    "an empty map": ({"weight_map": {}}, "no weight_map"),
    "numbers": ({"weight_map": {"a": 1}}, "no weight_map"),
    "up": ({"weight_map": {"a": "../other.safetensors"}}, "not a file in the model's folder"),
    "up from within": (
        {"weight_map": {"a": "x/../../other.safetensors"}},
        "not a file in the model's folder",
    ),
    "absolute": ({"weight_map": {"a": "/etc/other.safetensors"}}, "not a file in the model's folder"),
    "nothing": ({"weight_map": {"a": ""}}, "not a file in the model's folder"),
    "control characters": ({"weight_map": {"a": "a\n.safetensors"}}, "not a file in the model's folder"),
    "a zero": ({"weight_map": {"a": "a\0.safetensors"}}, "not a file in the model's folder"),
    "a tensor elsewhere": ({"weight_map": {"a": ONE, "c": ONE, "d": TWO}}, "has no tensor 'c'"),
}


@pytest.mark.parametrize(("index", "words"), INDEXES.values(), ids=INDEXES.keys())
def test_a_wrong_index_is_named(tmp_path: Path, index: object, words: str) -> None:
    with pytest.raises(BadWeightsFileError, match=words):
        open_model(sharded(tmp_path / "model", index=index))


def test_exchanged_shards_are_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / ONE).rename(tmp_path / "x")
    (tmp_path / TWO).rename(tmp_path / ONE)
    (tmp_path / "x").rename(tmp_path / TWO)
    with pytest.raises(BadWeightsFileError, match=f"{ONE}: has no tensor 'a'.*two shards exchanged"):
        open_model(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / TWO).unlink()
    with pytest.raises(MissingShardError, match=TWO):
        open_model(tmp_path)
    (tmp_path / INDEX).unlink()
    (tmp_path / "consolidated.safetensors").unlink()
    with pytest.raises(MissingShardError, match=f"{TWO}: is not there .1 of 2 are missing"):
        open_model(tmp_path)  # by the number in the other's name


@pytest.mark.parametrize("numbers", [(1, 2), (0, 1)])
def test_shards_are_counted_from_one_or_from_zero(tmp_path: Path, numbers: tuple[int, int]) -> None:
    for number in numbers:
        write_weights(tmp_path / f"model-{number:05}-of-00002.safetensors", {f"a{number}": ("F32", [3])})
    assert len(open_model(tmp_path).files) == 2
    (tmp_path / f"model-{numbers[1]:05}-of-00002.safetensors").unlink()
    with pytest.raises(MissingShardError, match=f"{numbers[1]:05}-of-00002.*1 of 2 are missing"):
        open_model(tmp_path)


def test_an_index_knows_better_than_names_which_shards_there_are(tmp_path: Path) -> None:
    """As where a head was taken out of a model, and the shard that held it alone."""
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file == ONE}
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / TWO).unlink()
    assert [file.name for file in open_model(tmp_path).files] == [ONE]


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(BadWeightsFileError, match=f"'a' is both in consolidated.safetensors and in {ONE}"):
        open_model(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter_model.bin"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)  # whoever opens it hangs
    with pytest.raises(UnsafeWeightsError, match=f"{name}.*save_file"):
        open_model(tmp_path)


def test_a_pickle_in_the_index_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "pytorch_model.bin"}}
    with pytest.raises(UnsafeWeightsError, match="no safetensors file"):
        open_model(sharded(tmp_path, index=index))


def test_a_pickle_under_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02cos\nsystem\n")
    with pytest.raises(BadWeightsFileError, match="pickle"):
        open_model(tmp_path)


@pytest.mark.parametrize("what", ["nothing", "no folder", "a file"])
def test_no_model_at_all(tmp_path: Path, what: str) -> None:
    folder = tmp_path if what == "nothing" else tmp_path / "x"
    if what == "a file":
        folder.write_text("")
    with pytest.raises(MissingShardError, match="download the model"):
        open_model(folder)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    whole = write_weights(tmp_path / "model.safetensors", {"a": ("F32", [300])})
    for length in (0, 5, 20, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(TruncatedWeightsError, match=r"model\.safetensors"):
            open_model(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(WeightsError, match=r"no regular file"):
        open_model(tmp_path)


OPEN = """
import os, sys
from pathlib import Path
from ghostserve.errors import WeightsError
from ghostserve.weights.model_files import open_model
if os.geteuid() == 0:  # who may read everything
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    print(*(file.name for file in open_model(Path(sys.argv[1])).files))
except WeightsError as error:
    print(type(error).__name__, error)
"""


def test_a_file_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder, file = Path(name), Path(name) / "model.safetensors"
        folder.chmod(0o755)
        write_weights(file, {"a": ("F32", [3])})

        def opened(mode: int) -> str:
            file.chmod(mode)
            command = [sys.executable, "-c", OPEN, name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert opened(0o644) == "model.safetensors\n"
        said = opened(0)
        assert said.startswith(f"WeightsReadError {file}")
        assert "permissions" in said


# ---- links -----------------------------------------------------------------------------------------------------------


def test_the_hubs_cache_is_a_folder_of_links(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    write_weights(repository / "blobs" / ("0" * 64), {"a": ("F32", [3])})
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/" + "0" * 64)
    assert names(open_model(snapshot)) == ["model.safetensors"]
    (repository / "blobs" / ("0" * 64)).unlink()
    with pytest.raises(MissingShardError):
        open_model(snapshot)


def test_a_link_to_weights_elsewhere_is_followed(tmp_path: Path) -> None:
    write_weights(tmp_path / "disk" / "x.safetensors", {"a": ("F32", [3])})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "disk" / "x.safetensors")
    assert len(open_model(tmp_path / "model").files) == 1


@pytest.mark.parametrize("place", ["secret", "elsewhere/blobs/secret"])
def test_a_link_to_anything_else_is_not(tmp_path: Path, place: str) -> None:
    write_weights(tmp_path / place, {"a": ("F32", [3])})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / place)
    with pytest.raises(BadWeightsFileError, match="is a link to"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize("others", [["other.safetensors"], []])
def test_links_in_a_circle_are_named(tmp_path: Path, others: list[str]) -> None:
    names = ["model.safetensors", *others]
    for name, target in zip(names, [*names[1:], names[0]], strict=True):
        (tmp_path / name).symlink_to(target)
    with pytest.raises(WeightsError, match=r"model.safetensors: .*symbolic links; put the file itself there"):
        open_model(tmp_path)


# ---- identity --------------------------------------------------------------------------------------------------------


def test_the_identity_is_that_of_the_source(tmp_path: Path) -> None:
    first = open_model(sharded(tmp_path)).identity
    assert open_model(tmp_path).identity == first
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert open_model(moved).identity == first
    os.utime(moved / TWO, ns=(1, 1))
    touched = open_model(moved).identity
    assert touched != first
    (moved / ONE).write_bytes(raw({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}))
    (moved / INDEX).unlink()
    (moved / "consolidated.safetensors").unlink()
    assert open_model(moved).identity not in (first, touched)


def test_models_alike_in_all_but_their_bytes_are_two(tmp_path: Path) -> None:
    """As images, archives and object stores leave them: all times are one."""
    for place, seed in (("one", 1), ("two", 2)):
        write_weights(tmp_path / place / "model.safetensors", {"a": ("F32", [3])}, seed=seed)
        os.utime(tmp_path / place / "model.safetensors", ns=(0, 0))
    (tmp_path / "link").symlink_to(tmp_path / "one")
    one, two, link = (open_model(tmp_path / name) for name in ("one", "two", "link"))
    assert one.identity != two.identity
    assert one.identity == link.identity  # other names of the same are the same
    assert file_key(one.files[0]) != file_key(two.files[0])
    assert file_key(one.files[0]) == file_key(link.files[0])


def test_a_model_in_the_place_of_another_is_another(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    write_weights(weights, {"a": ("F32", [3])}, seed=1)
    os.utime(weights, ns=(0, 0))
    before = open_model(tmp_path)
    flip_byte(weights, weights.stat().st_size - 1)
    written = open_model(tmp_path)
    assert written.identity != before.identity
    write_weights(tmp_path / "new", {"a": ("F32", [3])}, seed=2)
    os.utime(tmp_path / "new", ns=(0, 0))
    (tmp_path / "new").rename(weights)
    assert open_model(tmp_path).identity not in (before.identity, written.identity)
