"""Models from S3 into the local disk cache, over a server that speaks it (moto): keys, names, etags, credentials, versions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ghostserve.errors import BadWeightsFileError, RemoteError, UsageError
from ghostserve.weights.cache import ModelCache
from ghostserve.weights.pull import Pulled
from ghostserve.weights.remote import Remote, profile_credentials
from model_server import tiny_model
from s3_kit import BUCKET, URL, Store, bucket, serving

pytestmark = pytest.mark.long

pytest.importorskip("boto3")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as address:
        yield address


@pytest.fixture
def store(server: str) -> Iterator[Store]:
    with bucket(server) as store:
        yield store


def is_whole(pulled: Pulled, files: dict[str, bytes]) -> bool:
    same = all((pulled.path / name).read_bytes() == data for name, data in files.items())
    return same and {path.name for path in pulled.path.iterdir()} == set(files)


def test_a_model_is_pulled_and_only_what_serving_needs(tmp_path: Path, store: Store) -> None:
    files = tiny_model(200_001, shards=2)
    store.put(
        {
            **files,
            "train.py": b"x",
            "README.md": b"x",
            "onnx/model.safetensors": b"x",
            "pytorch_model.bin": b"x",
        }
    )
    store.put({"config.json": b"of another model"}, prefix="team/tiny-2/")
    pulled = store.pull(tmp_path)
    assert is_whole(pulled, files)
    assert pulled.fetched_bytes == pulled.nbytes == sum(map(len, files.values()))
    assert store.pull(tmp_path).fetched_bytes == 0


def test_a_new_upload_is_a_new_version(tmp_path: Path, store: Store) -> None:
    files = tiny_model(10_000)
    store.put(files)
    old = store.pull(tmp_path)
    store.put({"config.json": b"{}"})
    new = store.pull(tmp_path)
    assert new.version != old.version
    assert new.fetched_bytes == 2
    assert is_whole(old, files)


def test_a_beginning_on_the_disk_is_gone_on_with_and_checked(tmp_path: Path, store: Store) -> None:
    files = tiny_model(300_000)
    store.put(files)
    cache = ModelCache(tmp_path, URL)
    described = {file.name: file for file in Remote(URL, environment=store.environment).files()}
    cache.blobs.mkdir(parents=True)
    partial = cache.partial_of(described[WEIGHTS])
    partial.write_bytes(files[WEIGHTS][:100_000])
    assert store.pull(tmp_path).fetched_bytes == sum(map(len, files.values())) - 100_000
    cache.remove()
    cache.blobs.mkdir(parents=True)
    partial.write_bytes(
        b"?" * 100_000
    )  # a disk that lies: found by the MD5 sum that S3 gives, and fetched again
    assert is_whole(store.pull(tmp_path), files)


def test_an_upload_in_parts_has_no_sum_and_is_pulled_by_its_length(tmp_path: Path, store: Store) -> None:
    files = tiny_model(6_000_000)
    store.put({name: data for name, data in files.items() if name != WEIGHTS})
    upload = {"Bucket": BUCKET, "Key": f"team/tiny/{WEIGHTS}"}
    number = store.client.create_multipart_upload(**upload)["UploadId"]
    data, parts = files[WEIGHTS], []
    for index, part in enumerate((data[: 5 * 2**20], data[5 * 2**20 :]), 1):
        etag = store.client.upload_part(**upload, UploadId=number, PartNumber=index, Body=part)["ETag"]
        parts.append({"PartNumber": index, "ETag": etag})
    store.client.complete_multipart_upload(**upload, UploadId=number, MultipartUpload={"Parts": parts})
    assert is_whole(store.pull(tmp_path), files)


@pytest.mark.parametrize("key", ["../../../evil.json", "..%2f..%2fevil.json", ".bashrc.json", "a\\b.json"])
def test_a_key_that_leads_elsewhere_is_refused_or_stays_in_the_folder(
    tmp_path: Path, store: Store, key: str
) -> None:
    root = tmp_path / "a" / "b" / "cache"
    store.put({**tiny_model(1000), key: b"evil"})
    with contextlib.suppress(BadWeightsFileError, RemoteError):
        store.pull(root)
    inside = ModelCache(root, URL).folder
    assert all(inside in path.parents or path in (inside, root) for path in root.rglob("*"))
    assert not list(tmp_path.rglob("*evil*"))
    assert not list(tmp_path.rglob("*bashrc*"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://models/team/none", "nothing is there"),
        ("s3://no-such-bucket/x", "does not exist|NoSuchBucket|404"),
        ("s3://models", "nothing is there"),
    ],
)
def test_what_is_not_there_is_said(tmp_path: Path, store: Store, url: str, said: str) -> None:
    with pytest.raises(RemoteError, match=said) as failed:
        store.pull(tmp_path, url)
    assert "\n" not in str(failed.value)


def test_no_server_is_said_within_its_bound(tmp_path: Path, store: Store) -> None:
    store.environment["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1:9"):
        store.pull(tmp_path)


def test_profiles_are_read_where_the_environment_has_no_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = tmp_path / ".aws" / "credentials"
    credentials.parent.mkdir()
    credentials.write_text("[team]\naws_access_key_id = of-the-team\naws_secret_access_key = x\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    provider = profile_credentials({"AWS_PROFILE": "team"})
    assert provider()["access_key_id"] == "of-the-team"
    assert profile_credentials({"AWS_PROFILE": "team", "AWS_ACCESS_KEY_ID": "x"}) is None
    with pytest.raises(UsageError, match="no-such-profile"):
        profile_credentials({"AWS_PROFILE": "no-such-profile"})
    credentials.unlink()
    assert profile_credentials({}) is None
