"""What an erasure code over byte shards is. Knows no KV, no arena and no process.

A stripe is n data shards and m parity shards of equal length. Shards are numbered 0..n-1 (data), n..n+m-1
(parity). A code is systematic: data shards are stored as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ghostserve.errors import UsageError

Bytes: TypeAlias = npt.NDArray[np.uint8]
"""A shard: uint8, one dimension, contiguous. All shards of one call have the same length, zero included."""


class Codec(Protocol):
    """An erasure code. Calls keep no state and may run in several threads on different shards.

    Each byte of parity depends only on the bytes at the same place of the data, so a stripe may be encoded
    or reconstructed in pieces. Contents are not checked: that needs checksums, and they are the caller's.
    """

    @property
    def n(self) -> int:
        """Data shards of a stripe."""

    @property
    def m(self) -> int:
        """Parity shards of a stripe, which is also how many lost shards can be rebuilt."""

    def encode(self, data: Sequence[Bytes], parity: Sequence[Bytes]) -> None:
        """Fill the m shards `parity` from the n shards `data`; what `parity` held is overwritten.

        Raises UsageError if number, type or length of the shards is wrong, or if parity overlaps data.
        """

    def reconstruct(
        self, shards: Sequence[Bytes | None], *, lost: Sequence[int], out: Sequence[Bytes]
    ) -> None:
        """Rebuild the shards numbered `lost` into `out`, in that order.

        `shards` are all n + m, None for the missing ones; `lost` names missing ones, not necessarily all.
        Raises UsageError if that is not so, if more than m are missing, or if `out` overlaps a shard.
        """


def check_shards(shards: Sequence[Bytes], *, count: int, what: str) -> None:
    """UsageError unless these are `count` contiguous one-dimensional uint8 arrays of one length."""
    if len(shards) != count:
        raise UsageError(f"{len(shards)} {what} shards given, {count} needed")
    for index, shard in enumerate(shards):
        if shard.dtype != np.uint8 or shard.ndim != 1 or not shard.flags.c_contiguous:
            raise UsageError(
                f"{what} shard {index} is {shard.dtype} of shape {shard.shape}, strides {shard.strides}; "
                "contiguous uint8 of one dimension needed"
            )
        if shard.size != shards[0].size:
            raise UsageError(f"{what} shard {index} has {shard.size} bytes, shard 0 has {shards[0].size}")


def check_targets(targets: Sequence[Bytes], sources: Sequence[Bytes], *, what: str) -> None:
    """UsageError unless every target has the sources' length and shares no memory with any source."""
    for index, target in enumerate(targets):
        for source in sources:
            if target.size != source.size:
                raise UsageError(f"{what} shard {index} has {target.size} bytes, the others {source.size}")
            if np.may_share_memory(target, source):
                raise UsageError(f"{what} shard {index} overlaps a shard it is computed from")
