"""XOR parity: one parity shard, the bytewise XOR of the data; any one lost shard is the XOR of the others.

With n = 1 the parity is a replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ghostserve.codec.base import Bytes, check_shards, check_targets
from ghostserve.errors import UsageError

_Words: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint64]

_WORD_BYTES = 8
_PIECE_BYTES = 1 << 17  # the target piece stays in the L2 cache while the sources stream through it


class XorCodec:
    """`Codec` for m = 1 and any n >= 1."""

    def __init__(self, n: int, m: int = 1) -> None:
        if n < 1:
            raise UsageError(f"{n} data shards; at least 1 needed")
        if m != 1:
            raise UsageError(f"{m} parity shards; XOR has exactly 1")
        self._n = n

    @property
    def n(self) -> int:
        return self._n

    @property
    def m(self) -> int:
        return 1

    def encode(self, data: Sequence[Bytes], parity: Sequence[Bytes]) -> None:
        check_shards(data, count=self._n, what="data")
        check_shards(parity, count=1, what="parity")
        check_targets(parity, data, what="parity")
        _xor(data, parity[0])

    def reconstruct(
        self, shards: Sequence[Bytes | None], *, lost: Sequence[int], out: Sequence[Bytes]
    ) -> None:
        if len(shards) != self._n + 1:
            raise UsageError(f"{len(shards)} shards given, {self._n} data and 1 parity needed")
        missing = [index for index, shard in enumerate(shards) if shard is None]
        if len(missing) > 1:
            raise UsageError(f"shards {missing} are missing; XOR rebuilds at most 1")
        if len(set(lost)) != len(lost) or not set(lost) <= set(missing):
            raise UsageError(f"shards {list(lost)} to rebuild, but {missing} are missing")
        present = [shard for shard in shards if shard is not None]
        check_shards(present, count=len(present), what="present")
        check_shards(out, count=len(lost), what="output")
        check_targets(out, present, what="output")
        for target in out:
            _xor(present, target)


def _xor(sources: Sequence[Bytes], target: Bytes) -> None:
    """target = XOR of all sources; the arguments are checked."""
    whole = target.size // _WORD_BYTES * _WORD_BYTES
    for start in range(0, whole, _PIECE_BYTES):
        piece = slice(start, min(start + _PIECE_BYTES, whole))
        _xor_words([source[piece].view(np.uint64) for source in sources], target[piece].view(np.uint64))
    if whole < target.size:
        _xor_words([source[whole:] for source in sources], target[whole:])


def _xor_words(sources: Sequence[_Words], target: _Words) -> None:
    if len(sources) == 1:
        np.copyto(target, sources[0])
        return
    np.bitwise_xor(sources[0], sources[1], out=target)
    for source in sources[2:]:
        np.bitwise_xor(target, source, out=target)
