"""Arrays in host memory, for the backends that compute with numpy or with addresses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ghostserve.codec.base import Bytes, Shard
from ghostserve.errors import UsageError


class HostArrays:
    """The part of `Backend` that looks at numpy arrays."""

    def pieces(self, shard: Shard) -> list[Bytes]:
        """See `Backend.pieces`."""
        if isinstance(shard, np.ndarray):
            if (
                shard.dtype == np.uint8 and shard.ndim == 1 and shard.flags.c_contiguous
            ):  # the usual one, quickly
                return [shard] if shard.size else []
            return _runs(shard)
        if isinstance(shard, Sequence) and not isinstance(shard, (str, bytes)):
            return [run for array in shard for run in self.pieces(array)]
        raise UsageError(f"a shard is a numpy array or a sequence of them, not {type(shard).__name__}")

    def is_writable(self, piece: Bytes) -> bool:
        """See `Backend.is_writable`."""
        return bool(piece.flags.writeable)

    def span(self, piece: Bytes) -> tuple[int, int]:
        """See `Backend.span`."""
        return address(piece), piece.size

    def empty(self, nbytes: int, *, like: Bytes | None) -> Bytes:
        """See `Backend.empty`."""
        return np.empty(nbytes, np.uint8)

    def any_difference(self, left: Bytes, right: Bytes) -> bool:
        """See `Backend.any_difference`."""
        return not np.array_equal(left, right)


def address(array: npt.NDArray[np.uint8]) -> int:
    """Where its first byte lies."""
    return int(array.__array_interface__["data"][0])


def _runs(array: npt.NDArray[np.generic]) -> list[Bytes]:
    """The contiguous runs of an array of any type and shape, in the order of its elements."""
    if array.dtype.hasobject:
        raise UsageError(f"an array of {array.dtype} holds references, not bytes")
    if not array.size:
        return []
    if array.ndim == 0:
        return _runs(array.reshape(1))
    if array.flags.c_contiguous:
        return [array.reshape(-1).view(np.uint8)]
    if array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        raise UsageError(
            f"an array of shape {array.shape} has strides {array.strides}: "
            f"its innermost dimension must be contiguous, {array.itemsize} bytes apart"
        )
    return [run for part in array for run in _runs(part)]
