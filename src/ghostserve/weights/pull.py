"""A model from a URL into the local disk cache: complete and checked, or not there.

Etags of S3 are MD5 sums as long as nobody encrypts with a key of their own or uploads in parts; what they are in one place is
found out by its small files: if any of them has its sum as etag, those that do not agree are wrong.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ghostserve.errors import RemoteError, UsageError, WeightsChecksumError, WeightsError
from ghostserve.weights.cache import OFFLINE_VARIABLE, KeptFile, ModelCache, Version, cache_of, offline
from ghostserve.weights.fetch import Sums, agrees, demand_room, fetch, length_of, sums_of_bytes
from ghostserve.weights.remote import Patience, Remote
from ghostserve.weights.remote_names import SUMS, RemoteFile, sums_of, version_of

logger = logging.getLogger(__name__)

TELLING_BYTES = 2**20
"""Files up to this length are read again to learn what etags are."""


class Progress(Protocol):
    """Who shows how far a pull is. Calls come from one thread."""

    def begin(self, total_bytes: int, there_bytes: int) -> None:
        """So much in all, of which so much need not be fetched."""

    def advance(self, nbytes: int) -> None:
        """So much more; negative where something is fetched again."""

    def say(self, text: str) -> None:
        """A sentence for people."""


class Silent:
    """Shows nothing, and logs the sentences."""

    def begin(self, total_bytes: int, there_bytes: int) -> None:
        logger.debug("%d of %d bytes are there", there_bytes, total_bytes)

    def advance(self, nbytes: int) -> None:
        pass

    def say(self, text: str) -> None:
        logger.info(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """A model that is on this disk."""

    model: str
    path: Path
    version: str
    nbytes: int
    fetched_bytes: int


def pull(
    url: str,
    *,
    root: Path | None = None,
    progress: Progress | None = None,
    patience: Patience | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Pulled:
    """Have the newest version of what lies at `url` in the cache. Raises UsageError, WeightsError."""
    cache = cache_of(url, root, environment)
    if offline(environment):
        return _from_cache(cache)
    show = progress or Silent()
    try:
        with cache.locked(show.say):
            return _Pull(cache, Remote(cache.url, patience=patience, environment=environment), show).run()
    except OSError as error:
        raise WeightsError(f"{error.filename or cache.folder}: {error.strerror or error}") from error


def resolve(
    url: str,
    *,
    root: Path | None = None,
    progress: Progress | None = None,
    patience: Patience | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Pulled:
    """As `pull`, but where the remote cannot be reached, what was pulled before is good enough; a warning says so."""
    try:
        return pull(url, root=root, progress=progress, patience=patience, environment=environment)
    except RemoteError as error:
        cache = cache_of(url, root, environment)
        if cache.current() is None:
            raise
        (progress or Silent()).say(f"{error}; taking what was pulled before")
        return _from_cache(cache)


def _from_cache(cache: ModelCache) -> Pulled:
    version = cache.current()
    if version is None:
        raise UsageError(
            f"{cache.url} is not in {cache.folder.parent}, and {OFFLINE_VARIABLE} is set: run 'ghostserve models pull "
            f"{cache.url}' where there is a network, or unset it"
        )
    return _pulled(cache, version, fetched_bytes=0)


def _pulled(cache: ModelCache, version: Version, *, fetched_bytes: int) -> Pulled:
    return Pulled(
        model=version.url,
        path=cache.path_of(version),
        version=version.version,
        nbytes=sum(file.nbytes for file in version.files),
        fetched_bytes=fetched_bytes,
    )


@dataclass(slots=True)
class _Pull:
    """One pull, alone in its folder."""

    cache: ModelCache
    remote: Remote
    show: Progress
    fetched_bytes: int = 0
    etags_are_sums: bool = False
    sums: dict[str, str] = field(default_factory=dict)

    def run(self) -> Pulled:
        files = self.remote.files()
        there = self.cache.kept()
        self._demand_room(files, there)
        kept = []
        for file in files:  # small ones first
            known = there.get(file)
            sha256 = known or self._fetched(file)
            if known and file.nbytes <= TELLING_BYTES:
                self.etags_are_sums |= (
                    agrees(file.etag, sums_of_bytes((self.cache.blobs / known).read_bytes())) is True
                )
            if file.name == SUMS:
                self.sums = sums_of((self.cache.blobs / sha256).read_text(encoding="utf-8", errors="replace"))
            kept.append(
                KeptFile(
                    name=file.name, nbytes=file.nbytes, etag=file.etag, modified=file.modified, sha256=sha256
                )
            )
        version = Version(url=self.cache.url, version=version_of(files), files=tuple(kept))
        self.cache.publish(version)
        self.cache.forget_partials()
        return _pulled(self.cache, version, fetched_bytes=self.fetched_bytes)

    def _demand_room(self, files: tuple[RemoteFile, ...], kept: Mapping[RemoteFile, str]) -> None:
        total = sum(file.nbytes for file in files)
        there = sum(
            file.nbytes if file in kept else min(file.nbytes, length_of(self.cache.partial_of(file)))
            for file in files
        )
        demand_room(self.cache.blobs, total - there, model=self.cache.url, options="--download-dir")
        self.show.begin(total, there)

    def _fetched(self, file: RemoteFile) -> str:
        """Fetch one file and check it; a second time where its checksum is wrong. Returns its SHA-256."""
        partial = self.cache.partial_of(file)
        for _ in range(2):
            sums = fetch(self.remote, file, partial, on_bytes=self._on_bytes)
            if not self._is_wrong(file, sums):
                self.cache.keep(partial, sums.sha256)
                return sums.sha256
            partial.unlink()
            self.show.advance(-file.nbytes)
            self.show.say(f"{file.name}: its checksum is wrong; it is fetched again")
        raise WeightsChecksumError(
            f"{self.remote.url}/{file.name}: what arrives differs from the checksum that the remote gives, twice: the upload is "
            "broken, or somebody between here and there changes it"
        )

    def _is_wrong(self, file: RemoteFile, sums: Sums) -> bool:
        if file.name in self.sums:
            return self.sums[file.name] != sums.sha256
        agreed = agrees(file.etag, sums)
        self.etags_are_sums |= agreed is True
        return agreed is False and self.etags_are_sums

    def _on_bytes(self, nbytes: int) -> None:
        self.fetched_bytes += max(0, nbytes)
        self.show.advance(nbytes)
