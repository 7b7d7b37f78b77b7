"""The local disk cache of models that come from a URL: its folders, its lock, its records.

    ROOT/s3-bucket-llama-8b-0f3a9c2e41/     one source
        source.json                         its URL
        lock                                held (flock) by whoever pulls; its content means nothing
        blobs/SHA256                        the bytes of a file, named by what they are
        blobs/DIGEST.partial                the beginning of one that is being fetched
        snapshots/VERSION/config.json ...   the folder to load: links to blobs, as in the cache of the Hub
        snapshots/VERSION.json              what is in it and where it came from, written once it is complete
        current.json                        the version pulled last, written at the very end

So a model's folder is complete or has no record, and a file that did not change between two versions is fetched and kept once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ghostserve.weights.cache_home import cache_home
from ghostserve.weights.remote_names import RemoteFile, checked_url, folder_name
from ghostserve.weights.waiting_lock import NO_PROGRESS_S, locked
from ghostserve.weights.whole_file import write_whole

OFFLINE_VARIABLE = "HF_HUB_OFFLINE"
TRUE = ("1", "true", "yes", "on")


def offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user wants no network, said as to Hugging Face's library."""
    return environment.get(OFFLINE_VARIABLE, "").lower() in TRUE


def default_root(environment: Mapping[str, str] = os.environ) -> Path:
    """Where they are kept unless the user says otherwise."""
    return cache_home(environment) / "models"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptFile:
    """One file of a version: as the remote described it, and what its bytes are."""

    name: str
    nbytes: int
    etag: str | None
    modified: str | None
    sha256: str

    @property
    def remote(self) -> RemoteFile:
        return RemoteFile(name=self.name, nbytes=self.nbytes, etag=self.etag, modified=self.modified)


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One complete version of a model."""

    url: str
    version: str
    files: tuple[KeptFile, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, path: Path) -> Version | None:
        """What was written, or None for what is not there or was not written by us."""
        try:
            found = json.loads(path.read_bytes())
            files = tuple(KeptFile(**file) for file in found["files"])
            return cls(url=str(found["url"]), version=str(found["version"]), files=files)
        except (OSError, ValueError, KeyError, TypeError):
            return None


class ModelCache:
    """The folder of one source."""

    def __init__(self, root: Path, url: str) -> None:
        self.url = url
        self.folder = root / folder_name(url)
        self.blobs = self.folder / "blobs"
        self._snapshots = self.folder / "snapshots"

    def current(self) -> Version | None:
        """The version pulled last, if all its files are there with their lengths."""
        found = Version.read(self.folder / "current.json")
        return found if found is not None and found.url == self.url and self.is_complete(found) else None

    def is_complete(self, version: Version) -> bool:
        """Whether a version's folder can be used."""
        folder = self.path_of(version)
        return all(_length(folder / file.name) == file.nbytes for file in version.files)

    def known(self) -> list[Version]:
        """Every version that has a record."""
        found = (Version.read(path) for path in sorted(self._snapshots.glob("*.json")))
        return [version for version in found if version is not None]

    def path_of(self, version: Version) -> Path:
        """The folder to load the model from."""
        return self._snapshots / version.version

    def partial_of(self, file: RemoteFile) -> Path:
        return self.blobs / f"{file.digest}.partial"

    def kept(self) -> dict[RemoteFile, str]:
        """The SHA-256 under which each version of a file is kept."""
        found = [file for version in self.known() for file in version.files]
        return {
            file.remote: file.sha256 for file in found if _length(self.blobs / file.sha256) == file.nbytes
        }

    def keep(self, partial: Path, sha256: str) -> None:
        """A complete partial file gets its name. Bytes that are there stay as they are: a server may run on that file."""
        if _length(self.blobs / sha256) == partial.stat().st_size:
            partial.unlink()
        else:
            partial.replace(self.blobs / sha256)

    def publish(self, version: Version) -> None:
        """Make the folder of a version whose blobs are all there, then say so."""
        folder = self.path_of(version)
        folder.mkdir(parents=True, exist_ok=True)
        for file in version.files:
            link, target = folder / file.name, Path("../../blobs", file.sha256)
            if not link.is_symlink() or link.readlink() != target:
                link.unlink(missing_ok=True)
                link.symlink_to(target)
        write_whole(folder.with_suffix(".json"), version.to_json())
        write_whole(self.folder / "current.json", version.to_json())

    def forget_partials(self) -> None:
        """Once a version is complete, what was begun of others is of no use."""
        for path in self.blobs.glob("*.partial"):
            path.unlink(missing_ok=True)

    def locked(
        self, on_wait: Callable[[str], None], *, no_progress_s: float = NO_PROGRESS_S
    ) -> AbstractContextManager[None]:
        """Alone in this folder; a process that dies lets go by that. Raises WeightsError when the other one does not get on."""
        self.blobs.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "source.json").exists():
            write_whole(self.folder / "source.json", json.dumps({"url": self.url}))
        return locked(
            self.folder / "lock",
            what=self.url,
            on_wait=on_wait,
            sign_of_life=lambda: [(file.st_size, file.st_mtime_ns) for file in self._blob_files()],
            no_progress_s=no_progress_s,
        )

    def nbytes(self) -> int:
        """What it takes on the disk, partial files included."""
        return sum(file.st_size for file in self._blob_files())

    def _blob_files(self) -> Iterator[os.stat_result]:
        for path in sorted(self.blobs.glob("*")):
            with suppress(FileNotFoundError):  # it has just got its name
                yield path.stat()

    def remove(self) -> None:
        """All of it. A server that runs on it keeps what it has mapped, but cannot load it again."""
        shutil.rmtree(self.folder)


def cache_of(url: str, root: Path | None = None, environment: Mapping[str, str] = os.environ) -> ModelCache:
    """Where what lies at `url` is kept, by default below `default_root`. Raises UsageError."""
    return ModelCache(root or default_root(environment), checked_url(url))


def models_in(root: Path) -> list[ModelCache]:
    """Every source that has a complete version or the beginning of one."""
    found = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        try:
            url = str(json.loads((folder / "source.json").read_bytes())["url"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if folder.name == folder_name(url):
            found.append(ModelCache(root, url))
    return found


def _length(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
