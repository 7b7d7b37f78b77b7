"""Which files a model consists of, and which model that is: the headers of all of them, checked against each other.

Knows plain folders and snapshots of the hub's cache, whose files are links into its folder of blobs. Reads headers only.

Of each name only what lies in the model's folder is opened: a name in an index is text that somebody else wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ghostserve.errors import (
    BadWeightsFileError,
    MissingShardError,
    UnsafeWeightsError,
    WeightsReadError,
)
from ghostserve.weights.bounded import STALL_S, answer_within
from ghostserve.weights.header import LENGTH_BYTES, Header, header_bytes, parse_header
from ghostserve.weights.remote_names import INDEX, PICKLES
from ghostserve.weights.source import Source

INDEX_BYTES_MAX = 100_000_000
ONE_OF_SEVERAL = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
CONVERT = (
    "convert them on a machine where that does no harm: load them there with torch.load(..., weights_only=True) and write "
    "them with safetensors.torch.save_file, or use https://huggingface.co/spaces/safetensors/convert"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """One file, as it was when its header was read."""

    path: Path
    """As named in the model's folder; it may be a link."""
    target: Path
    """Where it lies."""
    inode: tuple[int, int, int]
    """Device, number, and when anything of it changed last: as long as the machine runs no other file has the same."""
    nbytes: int
    mtime_ns: int
    header: Header

    @property
    def name(self) -> str:
        """For people."""
        return self.path.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """All files of a model, in the order of their names. No tensor is in two of them."""

    folder: Path
    files: tuple[WeightsFile, ...]
    identity: str
    """Of these bytes, as far as that can be known without reading them: names, sizes, times of change, headers; and inodes, since two
    models of one kind have all else in common where times are set (images, archives, object stores)."""

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(file.nbytes for file in self.files)


def open_model(folder: Path, *, stall_s: float = STALL_S) -> ModelFiles:
    """The model in `folder`: by its index if it has one, else every `*.safetensors` in it.

    WeightsError by its kind: a pickle only, a shard missing, a header or the index wrong, a tensor twice. No call into the
    file system takes longer than `stall_s`.
    """
    names = answer_within(stall_s, lambda: _read_index(folder), folder)
    if names is None:
        paths = answer_within(stall_s, lambda: _listed(folder), folder)
        demand_complete(paths)
        return open_files(paths, stall_s=stall_s)
    files = open_files(sorted({folder / name for name in names.values()}), folder=folder, stall_s=stall_s)
    _check_index(folder, names, files)
    return files


def open_files(paths: Sequence[Path], *, folder: Path | None = None, stall_s: float = STALL_S) -> ModelFiles:
    """These files as one model. `folder` is what they are named in, by default where the first is."""
    if not paths:
        raise ValueError("no files")
    folder = folder or paths[0].parent
    files = tuple(open_file(path, stall_s=stall_s) for path in paths)
    seen: dict[str, Path] = {}
    for file in files:
        for span in file.header.tensors:
            if span.name in seen:
                raise BadWeightsFileError(
                    f"{folder}: tensor {span.name[:200]!r} is both in {seen[span.name].name} and in {file.name}; "
                    f"take out the file that does not belong there, or add {INDEX}"
                )
            seen[span.name] = file.path
    return ModelFiles(folder=folder, files=files, identity=_identity(folder, files))


def open_file(path: Path, *, stall_s: float = STALL_S) -> WeightsFile:
    """One file by its header."""
    return answer_within(stall_s, lambda: _open(path), path)


def _open(path: Path) -> WeightsFile:
    _check_link(path)
    source = Source(path, direct=False)
    try:
        first = source.read_bytes(0, min(LENGTH_BYTES, source.nbytes))
        rest = header_bytes(first, file_bytes=source.nbytes, name=str(path)) - LENGTH_BYTES
        first += source.read_bytes(LENGTH_BYTES, rest)
        header = parse_header(first, file_bytes=source.nbytes, name=str(path))
        source.check_unchanged(nbytes=source.nbytes, mtime_ns=source.mtime_ns)
        return WeightsFile(
            path=path,
            target=path.resolve(),
            inode=source.inode,
            nbytes=source.nbytes,
            mtime_ns=source.mtime_ns,
            header=header,
        )
    finally:
        source.leave()


def _identity(folder: Path, files: Iterable[WeightsFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        name = os.path.relpath(file.path, folder)
        text = json.dumps([name, file.nbytes, file.mtime_ns, file.inode, file.header.digest])
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


# ---- which files there are -------------------------------------------------------------------------------------------


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name to file name; None without an index."""
    index = folder / INDEX
    try:
        if not index.exists():
            return None
        if index.stat().st_size > INDEX_BYTES_MAX:
            raise BadWeightsFileError(f"{index}: more than {INDEX_BYTES_MAX} bytes; download it again")
        found = json.loads(index.read_text())
    except OSError as error:
        raise WeightsReadError(f"{index}: {error.strerror}; check its permissions and its disk") from error
    except (ValueError, RecursionError) as error:
        raise BadWeightsFileError(f"{index}: is not JSON ({str(error)[:200]}); download it again") from None
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise BadWeightsFileError(f"{index}: has no weight_map of names; download it again")
    for name in set(names.values()):
        parts = PurePosixPath(name).parts
        if not name.isprintable() or not parts or parts[0] == "/" or ".." in parts:
            raise BadWeightsFileError(
                f"{index}: names {name[:200]!r}, which is not a file in the model's folder; do not use this model"
            )
        if not name.endswith(".safetensors"):
            raise UnsafeWeightsError(
                f"{index}: names {name[:200]!r}, which is no safetensors file; {CONVERT}"
            )
    return names


def _check_index(folder: Path, names: dict[str, str], files: ModelFiles) -> None:
    """Each tensor is in the file that the index says."""
    there = {file.path: {span.name for span in file.header.tensors} for file in files.files}
    for tensor, name in names.items():
        if tensor not in there[folder / name]:
            raise BadWeightsFileError(
                f"{folder / name}: has no tensor {tensor[:200]!r}, which {INDEX} says it has: a shard of another "
                "model or of another revision, or two shards exchanged; download the model again"
            )


def demand_complete(paths: Sequence[Path]) -> None:
    """No number is missing where the names count: model-00001-of-00003.safetensors. MissingShardError names the first that is.

    For all files of a model that has no index: an index knows better which there are, and who needs some only does not have all.
    """
    counted: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if found := ONE_OF_SEVERAL.fullmatch(path.name):
            counted.setdefault((str(path.parent / found["stem"]), int(found["count"])), set()).add(
                int(found["number"])
            )
    for (stem, count), numbers in counted.items():
        first = 0 if 0 in numbers else 1
        if missing := sorted({*range(first, first + count)} - numbers):
            raise MissingShardError(
                f"{stem}-{missing[0]:05}-of-{count:05}.safetensors: is not there ({len(missing)} of {count} are missing); "
                "download the model again"
            )


def _check_link(path: Path) -> None:
    """A link may lead out of the model's folder only to another safetensors file, or to a blob of the same cache.

    People keep weights on other disks; but a link that came with a model must not have us open what it likes.
    """
    if not path.is_symlink():
        return
    target = Path(os.path.realpath(path))  # of a circle: the link itself, which cannot be opened
    blobs = [parent.parent / "blobs" for parent in path.absolute().parents if parent.name == "snapshots"]
    if target.suffix != ".safetensors" and target.parent not in [folder.resolve() for folder in blobs]:
        raise BadWeightsFileError(
            f"{path}: is a link to {target}, which is neither a safetensors file nor in the blobs of the hub's cache; "
            "put the file itself there"
        )


def _listed(folder: Path) -> list[Path]:
    """Every safetensors file; an error that says why there is none."""
    if not folder.is_dir():
        raise MissingShardError(f"{folder}: is no folder; download the model, or correct the path")
    if found := sorted(folder.glob("*.safetensors")):
        return found
    if pickles := pickles_in(folder):
        raise UnsafeWeightsError(
            f"{folder}: has only pickled weights ({', '.join(pickles[:3])}), which could run code and are never opened; {CONVERT}"
        )
    raise MissingShardError(f"{folder}: has no *.safetensors; download the model again")


def pickles_in(folder: Path) -> list[str]:
    """The names of files that could run code."""
    return sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
