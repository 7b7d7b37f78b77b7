"""Models from a URL into the local disk cache: which files, which names, checksums, versions, and a remote that misbehaves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ghostserve.errors import (
    BadWeightsFileError,
    DiskFullError,
    GhostserveError,
    RemoteError,
    UnsafeWeightsError,
    UsageError,
    WeightsChangedError,
    WeightsChecksumError,
    WeightsError,
)
from ghostserve.weights import fetch as fetching
from ghostserve.weights import pull as pulling
from ghostserve.weights.cache import ModelCache, default_root, models_in
from ghostserve.weights.fetch import Sums, agrees
from ghostserve.weights.pull import Pulled, resolve
from ghostserve.weights.remote import Patience
from ghostserve.weights.remote_names import (
    RemoteFile,
    checked_name,
    checked_url,
    choose,
    folder_name,
    is_url,
    shards,
    sums_of,
    version_of,
)
from model_server import ModelServer, serving, tiny_model

pytestmark = pytest.mark.long

WEIGHTS = "model.safetensors"
QUICK = Patience(request_s=5.0, retries=2, retry_s=5.0)


class Told:
    """Remembers what a pull says."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, int]] = []
        self.advanced = 0
        self.said: list[str] = []

    def begin(self, total_bytes: int, there_bytes: int) -> None:
        self.begun.append((total_bytes, there_bytes))

    def advance(self, nbytes: int) -> None:
        self.advanced += nbytes

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def world() -> Iterator[ModelServer]:
    with serving(ModelServer(tiny_model(300_001))) as made:
        yield made


def pull(world: ModelServer, root: Path, *, told: Told | None = None, **environment: str) -> Pulled:
    return pulling.pull(world.url, root=root, progress=told, patience=QUICK, environment=environment)


def is_whole(pulled: Pulled, world: ModelServer) -> bool:
    """Every file of the remote, byte for byte, and nothing else."""
    names = {path.name for path in pulled.path.iterdir()}
    same = all((pulled.path / name).read_bytes() == data for name, data in world.files.items())
    return same and names == set(world.files)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../x.json", "/x.json", "a/b.json", "..", ".", "", ".hidden.json", "a\0b.json", "a\nb.json", "-rf.json", "x" * 300,
     "a\\b.json", "x.json ", "x.partial"],
)  # fmt: skip
def test_a_name_that_could_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(BadWeightsFileError, match="not a plain file name"):
        checked_name(name, where="s3://bucket")


def test_an_index_cannot_name_a_file_elsewhere() -> None:
    for name, said in (
        ("../../.bashrc.safetensors", "not a plain file name"),
        ("model.bin", "not \\*.safetensors"),
    ):
        with pytest.raises(BadWeightsFileError, match=said):
            shards(json.dumps({"weight_map": {"t": name}}).encode(), where="s3://bucket")
    for text in (b"[]", b"{}", b'{"weight_map": 1}', b"[" * 100_000, b"\xff"):
        with pytest.raises(BadWeightsFileError, match="no index of weights"):
            shards(text, where="s3://bucket")


def test_what_serving_needs_is_chosen_small_files_first() -> None:
    there = ["model.safetensors", "config.json", "tokenizer.model", "merges.txt", "model.bin", "train.py", "README.md",
             "consolidated.safetensors", "chat_template.jinja", "logo.png"]  # fmt: skip
    wanted = ["chat_template.jinja", "config.json", "merges.txt", "tokenizer.model", "model.safetensors"]
    assert choose(there, where="x") == wanted
    assert choose(["params.json", "consolidated.safetensors"], where="x")[-1] == "consolidated.safetensors"


def test_pickles_alone_are_refused_with_what_to_do() -> None:
    with pytest.raises(UnsafeWeightsError, match=r"pytorch_model\.bin.*convert"):
        choose(["config.json", "pytorch_model.bin"], where="x")
    with pytest.raises(BadWeightsFileError, match=r"no \*\.safetensors"):
        choose(["config.json"], where="x")
    with pytest.raises(BadWeightsFileError, match=r"no config\.json"):
        choose(["model.safetensors"], where="x")


def test_urls() -> None:
    assert checked_url("s3://bucket/a/b/") == "s3://bucket/a/b"
    assert checked_url("HTTPS://host:8443/x") == "https://host:8443/x"
    assert [is_url(word) for word in ("s3://b/x", "gs://b", "org/name", "/s3://x")] == [
        True,
        True,
        False,
        False,
    ]
    bad = (
        "http://u:p@host/x",
        "https://host/x?token=1",
        "http:///x",
        "http://host:99999/",
        "s3://b/../c",
        "http://h/%2e%2e/x",
    )
    for url in bad:
        with pytest.raises(UsageError) as refused:
            checked_url(url)
        assert "u:p" not in str(refused.value)
        assert "token" not in str(refused.value)


def test_folders_of_two_urls_differ_and_can_be_read() -> None:
    assert folder_name("s3://bucket/llama-8b").startswith("s3-bucket-llama-8b-")
    assert folder_name("http://host/a-b") != folder_name("http://host/a/b")
    assert "/" not in folder_name("http://host/" + "ä/" * 200)


def test_a_version_is_its_names_lengths_and_etags() -> None:
    file = RemoteFile(name="a", nbytes=1, etag='"x"')
    same = RemoteFile(name="a", nbytes=1, etag='"x"')
    assert version_of([file]) == version_of([same])
    for other in (
        RemoteFile(name="b", nbytes=1, etag='"x"'),
        RemoteFile(name="a", nbytes=2, etag='"x"'),
        RemoteFile(name="a", nbytes=1, etag='"y"'),
        RemoteFile(name="a", nbytes=1, modified="2026"),
    ):
        assert version_of([other]) != version_of([file])


def test_which_etags_are_checksums() -> None:
    sums = Sums(sha256="a" * 64, md5="b" * 32)
    cases = {'"' + "b" * 32 + '"': True, '"' + "c" * 32 + '"': False, "a" * 64: True, "d" * 64: False}
    for etag, expected in cases.items():
        assert agrees(etag, sums) is expected
    for etag in ('"' + "b" * 32 + '-4"', 'W/"x"', '"6543-abc"', None):
        assert agrees(etag, sums) is None
    assert sums_of("a" * 64 + "  x.json\nnothing\n" + "B" * 64 + " *./y\n") == {
        "x.json": "a" * 64,
        "y": "b" * 64,
    }


def test_the_cache_is_where_caches_are() -> None:
    assert default_root({"XDG_CACHE_HOME": "/c"}) == Path("/c/ghostserve/models")
    assert default_root({}) == Path.home() / ".cache/ghostserve/models"


# ---- pulls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_count", [1, 3])
@pytest.mark.parametrize("etags", ["md5", "sha256", "opaque", "weak", "none"])
def test_every_kind_of_server(tmp_path: Path, etags: str, shard_count: int) -> None:
    told = Told()
    with serving(ModelServer(tiny_model(70_000, shards=shard_count), etags=etags)) as world:
        pulled = pull(world, tmp_path, told=told)
        assert is_whole(pulled, world)
        total = sum(map(len, world.files.values()))
        assert (told.begun, told.advanced, pulled.fetched_bytes) == ([(total, 0)], total, total)
        sent = world.weights_sent
        assert pull(world, tmp_path).fetched_bytes == 0
        assert world.weights_sent == sent


def test_a_server_without_ranges_is_read_from_the_start(tmp_path: Path, world: ModelServer) -> None:
    world.ranges = False
    cache = ModelCache(tmp_path, world.url)
    cache.blobs.mkdir(parents=True)
    data = world.files[WEIGHTS]
    cache.partial_of(RemoteFile(name=WEIGHTS, nbytes=len(data), etag=world.etag(WEIGHTS))).write_bytes(
        data[:1000]
    )
    told = Told()
    assert is_whole(pull(world, tmp_path, told=told), world)
    assert told.begun[0][1] + told.advanced == told.begun[0][0]


@pytest.mark.parametrize(("errors", "cuts"), [(2, 0), (0, 2), (1, 1)])
def test_server_errors_and_cut_answers_are_tried_again(
    tmp_path: Path, world: ModelServer, errors: int, cuts: int
) -> None:
    world.errors, world.cuts = errors, cuts
    assert is_whole(pull(world, tmp_path), world)
    assert (world.errors, world.cuts) == (0, 0)


def test_a_server_that_goes_on_failing_is_given_up(tmp_path: Path, world: ModelServer) -> None:
    world.errors = 1000
    with pytest.raises(RemoteError, match="503") as failed:
        pull(world, tmp_path)
    assert world.url in str(failed.value)
    assert "\n" not in str(failed.value)
    assert ModelCache(tmp_path, world.url).current() is None
    world.errors = 0
    assert is_whole(pull(world, tmp_path), world)


@pytest.mark.parametrize("etags", ["md5", "sha256"])
def test_a_flipped_byte_is_found_and_fetched_again(tmp_path: Path, world: ModelServer, etags: str) -> None:
    world.etags, world.corrupt = etags, 1
    told = Told()
    assert is_whole(pull(world, tmp_path, told=told), world)
    assert told.said == [f"{WEIGHTS}: its checksum is wrong; it is fetched again"]


def test_a_remote_whose_bytes_stay_wrong_is_refused(tmp_path: Path, world: ModelServer) -> None:
    world.corrupt = 1000
    with pytest.raises(WeightsChecksumError, match=WEIGHTS):
        pull(world, tmp_path)
    assert ModelCache(tmp_path, world.url).current() is None
    assert list(tmp_path.rglob("*.partial")) == []


def test_etags_that_are_no_sums_prove_nothing(tmp_path: Path, world: ModelServer) -> None:
    """As with encryption under a key of one's own: they look like MD5 sums and are none. Bytes are taken as they come."""
    world.etag = lambda name: f'"{hashlib.md5(name.encode()).hexdigest()}"'  # type: ignore[method-assign]
    assert is_whole(pull(world, tmp_path), world)


def test_checksums_beside_the_files_are_used(tmp_path: Path, world: ModelServer) -> None:
    world.etags = "none"
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in world.files.items())
    world.files["SHA256SUMS"] = sums.encode()
    world.corrupt = 1
    told = Told()
    assert is_whole(pull(world, tmp_path, told=told), world)
    assert len(told.said) == 1
    world.files["SHA256SUMS"] = sums.replace("a", "b").encode()
    world.files["config.json"] += b" "
    with pytest.raises(WeightsChecksumError):
        pull(world, tmp_path)


def test_a_new_version_takes_only_what_changed_and_leaves_the_old_one(
    tmp_path: Path, world: ModelServer
) -> None:
    old, before = pull(world, tmp_path), dict(world.files)
    inode = (old.path / WEIGHTS).stat().st_ino
    world.files["config.json"] = b'{"architectures": ["Other"]}'
    new = pull(world, tmp_path)
    assert new.fetched_bytes == len(world.files["config.json"])
    assert is_whole(new, world)
    assert new.path != old.path
    assert (new.path / WEIGHTS).stat().st_ino == inode
    assert all((old.path / name).read_bytes() == data for name, data in before.items())
    world.files.update(before)
    assert pull(world, tmp_path).path == old.path


def test_equal_bytes_under_a_new_etag_stay_the_same_file(tmp_path: Path, world: ModelServer) -> None:
    """A server that runs on it compares the time of change before it lets a replacement load."""
    status = (pull(world, tmp_path).path / WEIGHTS).stat()
    world.etags = "opaque"
    again = (pull(world, tmp_path).path / WEIGHTS).stat()
    assert (again.st_ino, again.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)


def test_a_file_that_changes_under_way_is_refused(tmp_path: Path, world: ModelServer) -> None:
    answers = iter(['"one"'])  # when it is looked at; then the file is another one
    honest = world.etag
    world.etag = lambda name: next(answers, '"two"') if name == WEIGHTS else honest(name)  # type: ignore[method-assign]
    with pytest.raises(WeightsChangedError, match=WEIGHTS):
        pull(world, tmp_path)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    with serving(ModelServer(tiny_model(1000, shards=2))) as world:
        del world.files["model-00002-of-00002.safetensors"]
        with pytest.raises(
            BadWeightsFileError, match=r"model-00002-of-00002\.safetensors, which is not there"
        ):
            pull(world, tmp_path)


def test_a_disk_without_room_is_said_before_anything_is_fetched(
    tmp_path: Path, world: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = fetching.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(DiskFullError) as full:
        pull(world, tmp_path)
    needed = sum(map(len, world.files.values()))
    assert f"{needed} more bytes are needed" in str(full.value)
    assert str(tmp_path) in str(full.value)
    assert world.weights_sent == 0


def test_a_remote_that_is_gone_does_not_matter_to_serve(tmp_path: Path) -> None:
    with serving(ModelServer(tiny_model(1000))) as world:
        pulled = pull(world, tmp_path)
    told = Told()
    found = resolve(world.url, root=tmp_path, progress=told, patience=QUICK, environment={})
    assert found.path == pulled.path
    assert "taking what was pulled before" in told.said[0]
    with pytest.raises(RemoteError):
        resolve(world.url + "/other", root=tmp_path, patience=QUICK, environment={})


def test_offline_asks_nobody(tmp_path: Path, world: ModelServer) -> None:
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        pull(world, tmp_path, HF_HUB_OFFLINE="1")
    assert world.asked == []
    pulled = pull(world, tmp_path)
    world.asked.clear()
    assert pull(world, tmp_path, HF_HUB_OFFLINE="1").path == pulled.path
    assert world.asked == []


def test_a_cache_that_lost_a_file_is_not_used_and_is_filled_again(tmp_path: Path, world: ModelServer) -> None:
    pulled = pull(world, tmp_path)
    (pulled.path / WEIGHTS).resolve().unlink()
    with pytest.raises(UsageError):
        pull(world, tmp_path, HF_HUB_OFFLINE="1")
    again = pull(world, tmp_path)
    assert is_whole(again, world)
    assert again.fetched_bytes == len(world.files[WEIGHTS])


def test_a_lock_whose_holder_does_not_get_on_is_given_up(tmp_path: Path) -> None:
    cache, said = ModelCache(tmp_path, "s3://bucket/x"), list[str]()
    with cache.locked(said.append):
        other = ModelCache(tmp_path, "s3://bucket/x")
        with (
            pytest.raises(WeightsError, match=r"has not got on for 0 s.*lock"),
            other.locked(said.append, no_progress_s=0.05),
        ):
            pytest.fail("two have it")
    assert said == ["another process is fetching s3://bucket/x: waiting for it"]
    with cache.locked(said.append):
        pass


def test_what_is_in_the_cache_is_listed(tmp_path: Path, world: ModelServer) -> None:
    assert models_in(tmp_path / "none") == []
    pull(world, tmp_path)
    (tmp_path / "not-ours").mkdir()
    (only,) = models_in(tmp_path)
    assert only.url == world.url
    assert only.nbytes() == sum(map(len, world.files.values()))
    only.remove()
    assert models_in(tmp_path) == []


def test_names_and_errors_are_ours() -> None:
    for kind in (RemoteError, DiskFullError):
        assert issubclass(kind, WeightsError)
        assert issubclass(kind, GhostserveError)
