"""A rank image on the disk: `$XDG_CACHE_HOME/ghostserve/ranks/KEY.safetensors`, read in place of the model's files.

    header     a safetensors header, filled with spaces until the image begins at a multiple of 4 MiB
    image      one tensor of bytes, as it lies in the pool (`rank_image.py`): in the order and at the distances of a load

    metadata   format "1" · key, the image's name in the pool · label, the model's · table, where which parameter lies ·
               crc32, of each 4 MiB of the image, eight hexadecimal digits each

The header is distrusted as that of any file (`header.py`); then key, table and length have to be those that the load expects, and each byte that of
its checksum. What is not so is not used, and the model's own files are read.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ghostserve.errors import BadWeightsFileError, DiskFullError, MissingShardError, WeightsError
from ghostserve.native.checksum import crc32
from ghostserve.weights.bounded import STALL_S, answer_within
from ghostserve.weights.cache_home import cache_home
from ghostserve.weights.checksums import CELL_BYTES, Checksums
from ghostserve.weights.destination import Bytes
from ghostserve.weights.fetch import NO_ROOM, demand_room
from ghostserve.weights.header import LENGTH_BYTES
from ghostserve.weights.mapping import Mapped
from ghostserve.weights.model_files import WeightsFile, open_file
from ghostserve.weights.pool import Hit, Pool, Refused
from ghostserve.weights.pool_types import EntryInfo
from ghostserve.weights.ranges import Range
from ghostserve.weights.rank_folder import demand_ours, remove_leftovers, written_whole
from ghostserve.weights.rank_image import Layout
from ghostserve.weights.reader import read_ranges

FORMAT = "1"
TENSOR = "image"
SUFFIX = ".safetensors"
_KEY = re.compile(r"rank-[0-9a-f]{64}")
_CRC_DIGITS = 8
AGAIN = "remove it, or make it again with 'ghostserve models optimise'"


def folder() -> Path:
    """Where they lie."""
    return cache_home() / "ranks"


def path_of(key: str) -> Path:
    """Where the image with this key lies, or would. WeightsError for what is no key of a rank's image, so never outside of the folder."""
    if not _KEY.fullmatch(key):
        raise WeightsError(f"{key[:80]!r} is not the key of a rank's image")
    return folder() / f"{key}{SUFFIX}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFile:
    """One that was found to be in order, but for the bytes of the image."""

    file: WeightsFile
    label: str
    table: bytes
    checksums: Checksums

    def refuse_other(self, layout: Layout) -> None:
        """Raise WeightsError, naming the file, if it is not an image of this layout: by its table, and by its length."""
        path, (image,) = self.file.path, self.file.header.tensors
        try:
            layout.refuse_other(self.table)
        except WeightsError as error:
            raise BadWeightsFileError(f"{path}: {error}") from error
        if image.nbytes != layout.nbytes:
            raise BadWeightsFileError(f"{path}: has {image.nbytes} bytes, not {layout.nbytes}")

    def read(self, into: memoryview) -> None:
        """All of the image, compared with its checksums. WeightsError by its kind; what is in `into` then is undefined."""
        (image,) = self.file.header.tensors
        read_ranges(
            self.file.path,
            [Range(image.begin, image.end, 0)],
            into,
            verify=self.checksums,
            expect=self.file,
        )


def find(key: str, *, stall_s: float = STALL_S) -> RankFile | None:
    """The image with this key; None if there is none, WeightsError, naming the file and the flaw, if it is not in order; OSError.

    No longer than `stall_s`.
    """
    path = path_of(key)
    try:
        found = answer_within(stall_s, partial(_open_ours, path), path)
    except MissingShardError:
        return None
    if found.file.header.metadata["key"] != key:
        raise BadWeightsFileError(f"{path}: is the image of another key")
    return found


def _open_ours(path: Path) -> RankFile:
    found = open_rank_file(path)
    for one in (path.parent, path):
        demand_ours(one)
    return found


def open_rank_file(path: Path) -> RankFile:
    """Read and check the header. WeightsError by its kind."""
    file = open_file(path)
    metadata, tensors = file.header.metadata, file.header.tensors
    if metadata.get("format") != FORMAT:
        raise BadWeightsFileError(f"{path}: format {metadata.get('format', '')[:80]!r}, known is {FORMAT!r}")
    if missing := [name for name in ("key", "label", "table", "crc32") if name not in metadata]:
        raise BadWeightsFileError(f"{path}: its metadata has no {missing[0]}")
    if [(one.name, one.dtype) for one in tensors] != [(TENSOR, "U8")]:
        raise BadWeightsFileError(f"{path}: has not one tensor of bytes named {TENSOR!r}")
    begin = tensors[0].begin
    if begin % CELL_BYTES:
        raise BadWeightsFileError(f"{path}: its image begins at {begin}, no multiple of {CELL_BYTES}")
    sums = _sums(metadata["crc32"])
    cells = -(-(file.nbytes - begin) // CELL_BYTES)
    if sums is None or len(sums) != cells:
        raise BadWeightsFileError(f"{path}: its crc32 are not {cells} checksums")
    known = [*[None] * (begin // CELL_BYTES), *sums]
    return RankFile(
        file=file,
        label=metadata["label"],
        table=metadata["table"].encode(errors="replace"),  # half a character is valid JSON, and in no table
        checksums=Checksums(path, file.nbytes, known),
    )


def all_files() -> Iterator[RankFile]:
    """All that are in order."""
    for path in sorted(folder().glob(f"rank-*{SUFFIX}")):
        with contextlib.suppress(WeightsError):
            yield open_rank_file(path)


def keep(pool: Pool, entry: EntryInfo, *, into: Path | None = None) -> Path:
    """Write an image that the pool has to where it is found, or `into` a folder. Raises WeightsError, OSError."""
    opened = pool.open(entry.key, entry.nbytes, kind="rank", label=entry.label, reload_cost_s=0.0)
    if not isinstance(opened, Hit):
        if not isinstance(opened, Refused):
            opened.close()
        raise WeightsError(
            f"{entry.label}: a worker's weights have just left the memory: do this while its server runs"
        )
    with opened as hit:
        image = Mapped(hit.fd, offset=0, length=hit.nbytes, shared=False).array()
        return write(image, hit.meta, key=entry.key, label=entry.label, into=into)


def write(image: Bytes, table: bytes, *, key: str, label: str, into: Path | None = None) -> Path:
    """Keep an image on the disk, whole or not at all. Raises WeightsError, OSError."""
    path = (into or folder()) / path_of(key).name
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    demand_ours(path.parent)
    remove_leftovers(path.parent)
    header = _header(image, table, key=key, label=label)
    nbytes = len(header) + image.size
    demand_room(path.parent, nbytes, model=label, options="XDG_CACHE_HOME")
    try:
        with written_whole(path) as file:
            file.write(header)
            for begin in range(0, image.size, 16 * CELL_BYTES):
                file.write(image[begin : begin + 16 * CELL_BYTES].data)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFullError(
                f"{path}: {error.strerror}: it takes {nbytes} bytes; make room, or take another folder with XDG_CACHE_HOME"
            ) from error
        raise
    return path


def label_of(model: str) -> str:
    """How a copy names its model: in characters that any reader of safetensors takes, whatever the name of its folder is made of."""
    return model.encode(errors="replace").decode()


def _header(image: Bytes, table: bytes, *, key: str, label: str) -> bytes:
    sums = "".join(
        f"{crc32(image[begin : begin + CELL_BYTES]):0{_CRC_DIGITS}x}"
        for begin in range(0, image.size, CELL_BYTES)
    )
    metadata = {
        "format": FORMAT,
        "key": key,
        "label": label_of(label),
        "table": table.decode(),
        "crc32": sums,
    }
    tensor = {"dtype": "U8", "shape": [image.size], "data_offsets": [0, image.size]}
    text = json.dumps({"__metadata__": metadata, TENSOR: tensor}).encode()
    length = -(-(LENGTH_BYTES + len(text)) // CELL_BYTES) * CELL_BYTES - LENGTH_BYTES
    return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)


def _sums(text: str) -> list[int] | None:
    """None if they are none."""
    if not re.fullmatch(rf"([0-9a-f]{{{_CRC_DIGITS}}})*", text):
        return None
    return [int(text[at : at + _CRC_DIGITS], 16) for at in range(0, len(text), _CRC_DIGITS)]
