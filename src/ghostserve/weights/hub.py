"""Models of the Hugging Face Hub, in its own cache, by its own library: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE as everywhere.

The library fetches a file that was interrupted from its start. Weights have gigabytes each, so they are fetched by `hub_fetch`, and
go on where they were; the library then finds them in its cache and makes the folder.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostserve.errors import RemoteError, UsageError, WeightsError
from ghostserve.weights.cache import offline
from ghostserve.weights.fetch import demand_room, length_of
from ghostserve.weights.hub_fetch import BlobFetcher, etag_of, partial_of, retried
from ghostserve.weights.pull import Progress, Pulled, Silent
from ghostserve.weights.remote import first_line
from ghostserve.weights.remote_names import BESIDE, INDEX, WEIGHTS, choose, is_weights
from ghostserve.weights.waiting_lock import locked

FAST_VARIABLE = "HF_XET_HIGH_PERFORMANCE"
"""Who sets it wants the library's own way, with many streams and without going on where it was."""


def pull(
    model: str,
    *,
    revision: str | None = None,
    download_dir: Path | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Have what serving needs of a model of the Hub in the cache. Raises UsageError, WeightsError.

    As with vLLM's `--download-dir`, that is where weights go; configuration and tokenizer are looked for in the usual cache.
    """
    with _errors_as_ours(model, download_dir):
        if offline():
            return _found(model, revision=revision, download_dir=download_dir)
        return _Pull(model, revision, download_dir, progress or Silent()).run()


def folder_of(model: str, *, revision: str | None = None, download_dir: Path | None = None) -> Path:
    """Where a model that was pulled lies; asks nobody. Raises UsageError."""
    with _errors_as_ours(model, download_dir):
        return _found(model, revision=revision, download_dir=download_dir).path


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """One model in a cache of the Hub."""

    model: str
    folder: Path
    snapshots: tuple[Path, ...]
    nbytes: int
    last_used_s: float


def known(download_dir: Path | None = None) -> list[HubModel]:
    """Every model in the cache; what is damaged is left out, as `hf cache` does."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        found = scan_cache_dir(download_dir or constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    return [
        HubModel(
            model=repo.repo_id,
            folder=repo.repo_path,
            snapshots=tuple(sorted(revision.snapshot_path for revision in repo.revisions)),
            nbytes=repo.size_on_disk,
            last_used_s=repo.last_accessed,
        )
        for repo in sorted(found.repos, key=lambda repo: repo.repo_id)
        if repo.repo_type == "model"
    ]


def _found(model: str, *, revision: str | None, download_dir: Path | None) -> Pulled:
    from huggingface_hub import snapshot_download

    path = Path(
        snapshot_download(
            model,
            revision=revision,
            cache_dir=download_dir,
            local_files_only=True,
            allow_patterns=[*WEIGHTS, *BESIDE] if download_dir is None else [*WEIGHTS],
        )
    )
    weights = [file for file in path.iterdir() if is_weights(file.name)]
    if not weights:
        raise UsageError(f"{model}: {path} has no weights: run 'ghostserve models pull {model}'")
    nbytes = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return Pulled(model=model, path=path, version=path.name, nbytes=nbytes, fetched_bytes=0)


class _Pull:
    """One pull. Weights are fetched by several threads."""

    def __init__(self, model: str, revision: str | None, download_dir: Path | None, show: Progress) -> None:
        from huggingface_hub import HfApi, constants

        self._model, self._revision, self._show = model, revision, show
        self._download_dir = download_dir
        self._cache = Path(download_dir or constants.HF_HUB_CACHE).expanduser()
        name = f"models--{model.replace('/', '--')}"
        self._blobs = self._cache / name / "blobs"
        self._locks = self._cache / ".locks" / name
        self._api = HfApi()
        self._lock = threading.Lock()
        self._fetched_bytes = 0

    def run(self) -> Pulled:
        from huggingface_hub import RepoFile, snapshot_download

        commit = retried(lambda: self._api.model_info(self._model, revision=self._revision)).sha
        tree = retried(lambda: list(self._api.list_repo_tree(self._model, revision=commit)))
        files = {file.path: file for file in tree if isinstance(file, RepoFile)}
        chosen = choose(files, where=self._model)
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._locks.mkdir(parents=True, exist_ok=True)
        with locked(
            self._locks / "pull.lock", what=self._model, on_wait=self._show.say, sign_of_life=self._sizes
        ):
            self._demand_room([files[name] for name in chosen])
            if os.environ.get(FAST_VARIABLE, "") in ("", "0"):
                weights = [files[name] for name in chosen if is_weights(name)]
                BlobFetcher(
                    self._model, str(commit), self._blobs, self._locks, on_bytes=self._on_bytes
                ).fetch(weights)
            beside = [name for name in chosen if not is_weights(name)]
            if self._download_dir is not None:
                snapshot_download(
                    self._model, revision=self._revision, allow_patterns=beside, tqdm_class=_no_bar()
                )
                beside = [INDEX]
            path = snapshot_download(
                self._model,
                revision=self._revision,
                cache_dir=self._download_dir,
                allow_patterns=[*beside, *filter(is_weights, chosen)],
                tqdm_class=_no_bar(),
            )
        return Pulled(
            model=self._model,
            path=Path(path),
            version=str(commit),
            nbytes=sum(files[name].size for name in chosen),
            fetched_bytes=self._fetched_bytes,
        )

    def _sizes(self) -> list[tuple[str, int]]:
        return [(entry.name, length_of(Path(entry.path))) for entry in os.scandir(self._blobs)]

    def _demand_room(self, files: list[Any]) -> None:
        total = sum(file.size for file in files)
        there = sum(
            file.size
            if (blob := self._blobs / etag_of(file)).exists()
            else min(file.size, length_of(partial_of(blob)))
            for file in files
        )
        demand_room(self._blobs, total - there, model=self._model, options="HF_HOME or --download-dir")
        self._show.begin(total, there)

    def _on_bytes(self, nbytes: int) -> None:
        with self._lock:
            self._fetched_bytes += max(0, nbytes)
            self._show.advance(nbytes)


def _no_bar() -> Any:
    from tqdm.auto import tqdm

    class Disabled(tqdm):  # type: ignore[misc]
        def __init__(self, *words: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*words, **{**options, "disable": True})

    return Disabled


@contextmanager
def _errors_as_ours(model: str, download_dir: Path | None) -> Iterator[None]:
    """The library's many kinds of errors, as one sentence with a remedy."""
    from huggingface_hub import errors

    again = f"run 'ghostserve models pull {model}' where there is a network"
    try:
        yield
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        raise RemoteError(
            f"{model}: there is no such model, or it may not be read: look at its name, and for a private or gated one at HF_TOKEN "
            f"({first_line(error)})"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{model}: there is no such --revision ({first_line(error)})") from error
    except errors.HFValidationError as error:
        raise UsageError(f"{model}: neither a folder nor a Hugging Face id: {first_line(error)}") from error
    except errors.LocalEntryNotFoundError as error:
        where = f" in {download_dir}" if download_dir else ""
        raise UsageError(
            f"{model} is not{where or ' in the cache'}: {again}, without HF_HUB_OFFLINE"
        ) from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled) as error:
        raise RemoteError(f"{model}: {first_line(error)}") from error
    except OSError as error:
        raise _disk_error(error, model) from error
    except (UsageError, WeightsError):
        raise
    except Exception as error:  # of its HTTP client, which is not ours to import
        raise RemoteError(f"{model}: {type(error).__name__}: {first_line(error)}") from error


def _disk_error(error: OSError, model: str) -> WeightsError:
    if error.errno is not None:
        return WeightsError(f"{error.filename or model}: {error.strerror}")
    return RemoteError(f"{model}: {first_line(error)}")
