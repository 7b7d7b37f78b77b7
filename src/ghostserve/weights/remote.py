"""Reads files of a model from S3, Google Cloud Storage or an HTTP server, by byte ranges. Knows nothing of the cache.

Requests go through obstore, which tries again after server errors and broken connections, with a back-off and a bound. Its
asynchronous half is not used: a process that did has been seen to abort at its end, once in four.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import httpx
import obstore
from obstore.exceptions import (
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import HTTPStore, from_url

from ghostserve.errors import BadWeightsFileError, RemoteError, UsageError, WeightsChangedError
from ghostserve.weights.cache_home import user_home
from ghostserve.weights.remote_names import INDEX, PROBED, RemoteFile, checked_name, choose, shards

CHUNK_BYTES = 8 * 2**20
"""Of one request."""
REQUESTS = 8
"""Under way at once: a single stream from an object store gives a tenth of what a machine can take."""
SMALL_FILE_BYTES = 64 * 2**20
"""What is read in one piece is no longer than this: an index of 100,000 tensors has 10 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long one request may take, and for how long it is tried again."""

    request_s: float = 60.0
    retries: int = 8
    retry_s: float = 60.0


class NoRanges(Exception):
    """The server gives whole files only; inside of this package."""


class Remote:
    """One folder at a URL. Every wait is bounded by `patience`; what goes wrong is a RemoteError or WeightsChangedError."""

    def __init__(
        self, url: str, *, patience: Patience | None = None, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.url = url
        self._patience = patience or Patience()
        self._environment = environment

    @cached_property
    def _store(self) -> Any:
        extra: dict[str, Any] = {}
        if self.url.startswith("s3://"):
            endpoint = self._environment.get("AWS_ENDPOINT_URL_S3") or self._environment.get(
                "AWS_ENDPOINT_URL", ""
            )
            extra["config"] = {"endpoint": endpoint} if endpoint else {}
            if (provider := profile_credentials(self._environment)) is not None:
                extra["credential_provider"] = provider
        retry_s = timedelta(seconds=self._patience.retry_s)
        try:
            return from_url(
                self.url,
                client_options={"allow_http": True, "timeout": f"{round(self._patience.request_s * 1000)}ms"},
                retry_config={"max_retries": self._patience.retries, "retry_timeout": retry_s},
                **extra,
            )
        except (BaseError, ValueError) as error:
            raise UsageError(f"{self.url}: {first_line(error)}") from None

    def files(self) -> tuple[RemoteFile, ...]:
        """What serving needs of this folder. Raises as `choose` does, too."""
        if isinstance(self._store, HTTPStore):
            names, indexed = self._probed()
            chosen = choose(names, where=self.url)
        else:
            names = self._listed()
            chosen = choose(names, where=self.url)
            indexed = self._indexed() if INDEX in names else []
        if missing := [name for name in indexed if name not in names]:
            raise BadWeightsFileError(
                f"{self.url}/{INDEX} names {missing[0]}, which is not there: the upload is not complete"
            )
        return tuple(names[name] for name in chosen)

    def read(self, name: str) -> bytes:
        """A small file."""
        try:
            answer = obstore.get(self._store, name)
            if answer.meta["size"] > SMALL_FILE_BYTES:
                raise BadWeightsFileError(
                    f"{self.url}/{name} has {answer.meta['size']} bytes: too long for what it is"
                )
            return bytes(answer.bytes())
        except (BaseError, OSError) as error:
            raise self._ours(error, name) from error

    def chunks(self, file: RemoteFile, start: int) -> Iterator[memoryview]:
        """The bytes of `file` from `start` on, in order. Raises NoRanges before the first one if only whole files are given."""
        spans = [(at, min(at + CHUNK_BYTES, file.nbytes)) for at in range(start, file.nbytes, CHUNK_BYTES)]
        with ThreadPoolExecutor(REQUESTS, thread_name_prefix="pull") as pool:
            waiting: list[Future[memoryview]] = []
            try:
                for span in spans:
                    if len(waiting) == REQUESTS:
                        yield waiting.pop(0).result()
                    waiting.append(pool.submit(self._chunk, file, *span))
                while waiting:
                    yield waiting.pop(0).result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def whole(self, file: RemoteFile) -> Iterator[bytes]:
        """All bytes of `file` in one answer, from a server that gives nothing less."""
        url = f"{self.url}/{file.name}"
        try:
            with httpx.stream("GET", url, timeout=self._patience.request_s, follow_redirects=True) as answer:
                answer.raise_for_status()
                yield from answer.iter_bytes(2**20)
        except httpx.HTTPError as error:
            raise RemoteError(f"{url}: {first_line(error) or type(error).__name__}: try again") from error

    def _chunk(self, file: RemoteFile, start: int, end: int) -> memoryview:
        strong = file.etag is not None and not file.etag.startswith("W/")
        try:
            answer = obstore.get(
                self._store,
                file.name,
                options={"range": (start, end), **({"if_match": file.etag} if strong else {})},
            )
            found = _described(file.name, answer.meta)
            data = memoryview(answer.bytes())
        except NotSupportedError:
            raise NoRanges from None
        except PreconditionError:
            raise self._changed(file) from None
        except (BaseError, OSError) as error:
            raise self._ours(error, file.name) from error
        if found != file:
            raise self._changed(file)
        if len(data) != end - start:
            raise RemoteError(f"{self.url}/{file.name}: {len(data)} bytes came of {end - start}: try again")
        return data

    def _listed(self) -> dict[str, RemoteFile]:
        """The files of this folder; what lies in folders below is not needed."""
        try:
            found = obstore.list_with_delimiter(self._store)["objects"]
        except (BaseError, OSError) as error:
            raise self._ours(error, "") from error
        if not found:
            raise RemoteError(f"{self.url}: nothing is there: look at the bucket and the folder's name")
        return {meta["path"]: _described(meta["path"], meta) for meta in found}

    def _indexed(self) -> list[str]:
        return shards(self.read(INDEX), where=self.url)

    def _probed(self) -> tuple[dict[str, RemoteFile], list[str]]:
        """The same where there is no list: the names that models have, and what their index names, which is the second."""
        found = {name: file for name in PROBED if (file := self._described(name)) is not None}
        indexed = self._indexed() if INDEX in found else []
        for name in indexed if INDEX in found else ["model.safetensors"]:
            if (file := self._described(name)) is not None:
                found[name] = file
        if not found:
            raise RemoteError(
                f"{self.url}: there is neither a config.json nor weights: look at the folder's name"
            )
        return found, indexed

    def _described(self, name: str) -> RemoteFile | None:
        try:
            return _described(name, obstore.head(self._store, checked_name(name, where=self.url)))
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise self._ours(error, name) from error

    def _changed(self, file: RemoteFile) -> WeightsChangedError:
        return WeightsChangedError(
            f"{self.url}/{file.name} was changed while it was fetched: pull again once the upload is complete"
        )

    def _ours(self, error: Exception, name: str) -> RemoteError:
        where = f"{self.url}/{name}".rstrip("/")
        if isinstance(error, FileNotFoundError):
            return RemoteError(f"{where}: there is no such file")
        if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
            return RemoteError(
                f"{where}: access is denied; credentials come from the environment (AWS_ACCESS_KEY_ID, "
                "GOOGLE_APPLICATION_CREDENTIALS, the machine's role; AWS_SKIP_SIGNATURE=true for a public bucket)"
            )
        return RemoteError(f"{where}: {first_line(error)}")


def _described(name: str, meta: Any) -> RemoteFile:
    """obstore's description as ours. The time is for servers without etags: a list and an answer round it differently."""
    etag = meta["e_tag"] or None
    modified = None if etag else meta["last_modified"].isoformat()
    return RemoteFile(name=name, nbytes=meta["size"], etag=etag, modified=modified)


def first_line(error: Exception) -> str:
    """Of the several pages that obstore and the Hub's library write."""
    return str(error).strip().partition("\n")[0].rstrip(": ")[:400]


def profile_credentials(environment: Mapping[str, str]) -> Any:
    """Credentials of ~/.aws, which only boto3 reads, where it is installed and the environment names none."""
    profile = environment.get("AWS_PROFILE")
    if environment.get("AWS_ACCESS_KEY_ID") or environment.get("AWS_SKIP_SIGNATURE"):
        return None
    if not profile and not (user_home() / ".aws" / "credentials").exists():
        return None
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider

        session = boto3.Session(profile_name=profile)
        return Boto3CredentialProvider(session) if session.get_credentials() else None
    except ImportError:
        return None
    except Exception as error:  # botocore has many kinds for a profile that is not there or not complete
        raise UsageError(f"the credentials of AWS cannot be read: {first_line(error)}") from None
