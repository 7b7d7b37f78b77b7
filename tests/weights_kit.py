"""Safetensors files made by hand, so that they can be wrong."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from ghostserve.weights.dtypes import ELEMENT_TYPES


def raw(header: object, data: bytes = b"") -> bytes:
    """A file: `header` is JSON text, or what becomes JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """One tensor's line."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_weights(path: Path, tensors: dict[str, tuple[str, list[int]]], *, seed: int = 0) -> bytes:
    """A right file of these tensors with random bytes; returns its bytes."""
    rng, header, data = random.Random(seed), {}, b""
    for name, (dtype, shape) in tensors.items():
        bits = ELEMENT_TYPES[dtype].bits
        for count in shape:
            bits *= count
        header[name] = entry(dtype, shape, len(data), len(data) + bits // 8)
        data += rng.randbytes(bits // 8)
    whole = raw(header, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(whole)
    return whole


def write_bytes_file(path: Path, nbytes: int, *, seed: int = 0) -> bytes:
    """A right file of exactly `nbytes` bytes: one tensor that fills it."""
    for room in range(64, 128):  # its length is in its header
        count = nbytes - 8 - room
        text = json.dumps({"all": entry("U8", [count], 0, count)}).encode().ljust(room)
        if len(text) == room:
            whole = raw(text, random.Random(seed).randbytes(count))
            path.write_bytes(whole)
            return whole
    raise AssertionError(nbytes)


def flip_byte(path: Path, offset: int) -> None:
    """One byte becomes another; size and time of change stay, as when a disk rots."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
        file.flush()
        os.fsync(file.fileno())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def open_files(pid: int | str = "self") -> set[tuple[str, str]]:
    """Descriptors of a process, and what each is open on."""
    places = list(Path(f"/proc/{pid}/fd").iterdir())
    return {(place.name, os.readlink(place)) for place in places if place.is_symlink()}
