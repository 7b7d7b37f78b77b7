"""Large files of the Hugging Face Hub into the blobs of its cache, under its locks: by byte ranges, so that they go on where they were."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ghostserve.clock import sleep_s
from ghostserve.errors import WeightsChecksumError
from ghostserve.weights.fetch import disk_full, length_of
from ghostserve.weights.waiting_lock import NO_PROGRESS_S

FILES_AT_ONCE = 4
PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""After errors of the server. Broken connections are the library's business."""
T = TypeVar("T")


class BlobFetcher:
    """For one model at one commit. `on_bytes` gets what arrived, less what had to be thrown away, from several threads."""

    def __init__(
        self, model: str, commit: str, blobs: Path, locks: Path, *, on_bytes: Callable[[int], None]
    ) -> None:
        self._model, self._commit = model, commit
        self._blobs, self._locks = blobs, locks
        self._on_bytes = on_bytes
        self._stopped = threading.Event()

    def fetch(self, files: Sequence[Any]) -> None:
        """All that are not there yet; the first error ends the others, too."""
        with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="pull") as pool:
            running = [pool.submit(self._fetch_one, file) for file in files]
            try:
                for one in wait(running, return_when=FIRST_EXCEPTION).done:
                    one.result()
            finally:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _fetch_one(self, file: Any) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import WeakFileLock

        blob = self._blobs / etag_of(file)
        if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            return  # only the library's own protocol gives it
        with WeakFileLock(self._locks / f"{blob.name}.lock", timeout=NO_PROGRESS_S):
            if blob.exists():
                return
            partial, found = partial_of(blob), None
            for _ in range(2):
                retried(lambda: self._go_on(file, partial))
                found = _sha256(partial) if file.lfs is not None else None
                if found is None or found == file.lfs.sha256:
                    partial.replace(blob)
                    return
                partial.unlink()
                self._on_bytes(-file.size)
        raise WeightsChecksumError(
            f"{self._model}/{file.path}: what arrived has SHA-256 {found}, the Hub says {file.lfs.sha256}, twice: somebody between "
            "here and there changes it"
        )

    def _go_on(self, file: Any, partial: Path) -> None:
        """Complete the partial file, from where it is."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self._model, file.path, revision=self._commit)
        location, headers = get_hf_file_metadata(url).location, build_hf_headers()
        if urlsplit(location).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)
        if length_of(partial) > file.size:
            partial.unlink()
        try:
            with open(partial, "ab") as into:
                http_get(
                    location,
                    into,
                    resume_size=into.tell(),
                    headers=headers,
                    expected_size=file.size,
                    tqdm_class=_bar_for(self._arrived),
                )
                into.flush()
                os.fsync(into.fileno())
        except OSError as error:
            raise disk_full(error, partial, there=length_of(partial), nbytes=file.size) or error from error

    def _arrived(self, nbytes: int) -> None:
        if self._stopped.is_set():
            raise InterruptedError(f"{self._model}: interrupted")
        self._on_bytes(nbytes)


def retried(ask: Callable[[], T]) -> T:
    """What `ask` returns; after an error of the server it is asked again, for a minute."""
    from huggingface_hub.errors import HfHubHTTPError

    for pause_s in PAUSES_S:
        try:
            return ask()
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code < 500:
                raise
        sleep_s(pause_s)
    return ask()


def etag_of(file: Any) -> str:
    """The name of its blob in the cache."""
    return str(file.lfs.sha256 if file.lfs is not None else file.blob_id)


def partial_of(blob: Path) -> Path:
    """Where the beginning of a blob lies."""
    return blob.with_name(f"{blob.name}.partial")


def _sha256(path: Path) -> str:
    with open(path, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _bar_for(on_bytes: Callable[[int], None]) -> Any:
    """What `http_get` takes for a progress bar: passes on how much arrived."""

    class Bar:
        def __init__(self, *_words: Any, **_options: Any) -> None:
            pass

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_error: Any) -> None:
            pass

        def update(self, nbytes: float | None = 1) -> None:
            on_bytes(int(nbytes or 0))

        def close(self) -> None:
            pass

    return Bar
