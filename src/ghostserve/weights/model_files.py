"""Which files a model consists of, and which model that is: the headers of all of them, checked against each other.

Knows plain folders and snapshots of the hub's cache, whose files are links into its folder of blobs. Reads headers only.

Of each name only what lies in the model's folder is opened: a name in an index is text that somebody else wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ghostserve.errors import (
    BadWeightsFileError,
    MissingShardError,
    UnsafeWeightsError,
    WeightsChangedError,
    WeightsError,
    WeightsReadError,
)
from ghostserve.weights.header import LENGTH_BYTES, Header, header_bytes, parse_header

INDEX = "model.safetensors.index.json"
INDEX_BYTES_MAX = 100_000_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
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
    """Of these bytes, as far as that can be known without reading them: names, sizes, times of change, headers."""

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(file.nbytes for file in self.files)


def open_model(folder: Path) -> ModelFiles:
    """The model in `folder`: by its index if it has one, else every `*.safetensors` in it.

    WeightsError by its kind: a pickle only, a shard missing, a header or the index wrong, a tensor twice.
    """
    index = folder / INDEX
    if index.exists():
        names = _read_index(index)
        files = open_files(sorted({folder / name for name in names.values()}))
        _check_index(index, names, files)
        return files
    return open_files(sorted(folder.glob("*.safetensors")), folder=folder)


def open_files(paths: Iterable[Path], *, folder: Path | None = None) -> ModelFiles:
    """These files as one model. `folder` is where they are, by default where the first is."""
    paths = list(paths)
    folder = folder or (paths[0].parent if paths else Path())
    if not paths:
        raise _nothing_in(folder)
    _check_complete(paths)
    files = tuple(open_file(path) for path in paths)
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


def open_file(path: Path) -> WeightsFile:
    """One file by its header."""
    _check_link(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not hold us up
    except FileNotFoundError:
        raise MissingShardError(f"{path}: is not there; download the model again") from None
    except OSError as error:
        raise WeightsReadError(
            f"{path}: {error.strerror}; check its permissions and its file system"
        ) from error
    try:
        return _open(path, fd)
    except OSError as error:
        raise WeightsReadError(
            f"{path}: {error.strerror} while reading its header; check the disk or file system"
        ) from error
    finally:
        os.close(fd)


def _open(path: Path, fd: int) -> WeightsFile:
    before = os.fstat(fd)
    if not stat.S_ISREG(before.st_mode):
        raise BadWeightsFileError(f"{path}: is no regular file")
    first = _read(fd, LENGTH_BYTES, 0)
    rest = header_bytes(first, file_bytes=before.st_size, name=str(path)) - LENGTH_BYTES
    header = parse_header(first + _read(fd, rest, LENGTH_BYTES), file_bytes=before.st_size, name=str(path))
    file = WeightsFile(path=path, nbytes=before.st_size, mtime_ns=before.st_mtime_ns, header=header)
    check_unchanged(file, fd)
    return file


def check_unchanged(file: WeightsFile, fd: int) -> None:
    """WeightsChangedError unless the open file `fd` has the size and time of change of `file`."""
    now = os.fstat(fd)
    if now.st_size != file.nbytes:
        raise WeightsChangedError(
            f"{file.path}: has {now.st_size} bytes now, and had {file.nbytes} when its header was read: somebody is writing "
            "to it; wait until the download or copy has ended and start again"
        )
    if now.st_mtime_ns != file.mtime_ns:
        raise WeightsChangedError(
            f"{file.path}: was written to since its header was read; wait until the download or copy has ended and start again"
        )


def _read(fd: int, nbytes: int, offset: int) -> bytes:
    """Up to `nbytes`, fewer only at the end of the file."""
    pieces = []
    while nbytes and (piece := os.pread(fd, nbytes, offset)):
        pieces.append(piece)
        nbytes -= len(piece)
        offset += len(piece)
    return b"".join(pieces)


def _identity(folder: Path, files: Iterable[WeightsFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        name = os.path.relpath(file.path, folder)
        digest.update(json.dumps([name, file.nbytes, file.mtime_ns, file.header.digest]).encode() + b"\n")
    return digest.hexdigest()


# ---- which files there are -------------------------------------------------------------------------------------------


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name to file name."""
    try:
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


def _check_index(index: Path, names: dict[str, str], files: ModelFiles) -> None:
    """Each tensor is in the file that the index says."""
    there = {file.path: {span.name for span in file.header.tensors} for file in files.files}
    for tensor, name in names.items():
        if tensor not in there[index.parent / name]:
            raise BadWeightsFileError(
                f"{index.parent / name}: has no tensor {tensor[:200]!r}, which {index.name} says it has: a shard of another "
                "model or of another revision, or two shards exchanged; download the model again"
            )


def _check_complete(paths: list[Path]) -> None:
    """No number is missing where the names count: model-00001-of-00003.safetensors."""
    counted: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if found := ONE_OF_SEVERAL.fullmatch(path.name):
            counted.setdefault((str(path.parent / found["stem"]), int(found["count"])), set()).add(
                int(found["number"])
            )
    for (stem, count), numbers in counted.items():
        if missing := sorted({*range(1, count + 1)} - numbers):
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
    target = path.resolve()
    blobs = [parent.parent / "blobs" for parent in path.absolute().parents if parent.name == "snapshots"]
    if target.suffix != ".safetensors" and target.parent not in [folder.resolve() for folder in blobs]:
        raise BadWeightsFileError(
            f"{path}: is a link to {target}, which is neither a safetensors file nor in the blobs of the hub's cache; "
            "put the file itself there"
        )


def _nothing_in(folder: Path) -> WeightsError:
    if not folder.is_dir():
        return MissingShardError(f"{folder}: is no folder; download the model, or correct the path")
    if pickles := sorted(file.name for pattern in PICKLES for file in folder.glob(pattern)):
        return UnsafeWeightsError(
            f"{folder}: has only pickled weights ({', '.join(pickles[:3])}), which could run code and are never opened; {CONVERT}"
        )
    return MissingShardError(f"{folder}: has no *.safetensors; download the model again")
