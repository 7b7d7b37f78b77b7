"""torch operations on tensors of any device: what is left where neither the C library nor Triton can work.

Plain XOR runs at a good part of the memory's speed; products go bit by bit. Work is queued on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ghostserve.codec.base import Shard
from ghostserve.codec.field import POLYNOMIAL, Elements
from ghostserve.errors import UsageError

_REDUCE = POLYNOMIAL & 0xFF


class TorchArrays:
    """The part of `Backend` that looks at torch tensors."""

    def pieces(self, shard: Shard) -> list[torch.Tensor]:
        """See `Backend.pieces`."""
        if isinstance(shard, torch.Tensor):
            return _runs(shard)
        if isinstance(shard, Sequence) and not isinstance(shard, (str, bytes)):
            return [run for tensor in shard for run in self.pieces(tensor)]
        raise UsageError(f"a shard is a tensor or a sequence of them, not {type(shard).__name__}")

    def is_writable(self, piece: torch.Tensor) -> bool:
        """See `Backend.is_writable`; torch has no read-only tensors."""
        return True

    def span(self, piece: torch.Tensor) -> tuple[int, int]:
        """See `Backend.span`."""
        return piece.data_ptr(), piece.numel()

    def empty(self, nbytes: int, *, like: torch.Tensor | None) -> torch.Tensor:
        """See `Backend.empty`."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu" if like is None else like.device)

    def any_difference(self, left: torch.Tensor, right: torch.Tensor) -> bool:
        """See `Backend.any_difference`. Waits for the device."""
        return not torch.equal(left, right)


class TorchBackend(TorchArrays):
    """`Backend` with torch alone."""

    name = "torch"

    def combine(
        self,
        matrix: Elements,
        sources: Sequence[Sequence[torch.Tensor]],
        targets: Sequence[Sequence[torch.Tensor]],
        *,
        accumulate: bool,
    ) -> None:
        """See `Backend.combine`."""
        rows = matrix.tolist()
        for segment_sources, segment_targets in zip(sources, targets, strict=True):
            for row, target in zip(rows, segment_targets, strict=True):
                _row(row, segment_sources, target, accumulate=accumulate)


def _row(
    row: Sequence[int], sources: Sequence[torch.Tensor], target: torch.Tensor, *, accumulate: bool
) -> None:
    """One target, by Horner's rule over the coefficients' bits."""
    top = max(row).bit_length()
    total = target if top <= 1 else torch.zeros_like(target)
    if top <= 1 and not accumulate:
        total.zero_()
    for bit in reversed(range(max(top, 1))):
        if bit < top - 1:
            total = (total << 1) ^ ((total >> 7) * _REDUCE)
        for coefficient, source in zip(row, sources, strict=True):
            if coefficient >> bit & 1:
                total.bitwise_xor_(source)
    if total is not target:
        target.copy_(target ^ total if accumulate else total)


def _runs(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The contiguous runs of a tensor of any type and shape, in the order of its elements."""
    if not tensor.numel():
        return []
    if tensor.dim() == 0:
        return _runs(tensor.reshape(1))
    if tensor.is_contiguous():
        return [tensor.view(-1).view(torch.uint8)]
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise UsageError(
            f"a tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}: its innermost dimension must be contiguous"
        )
    return [run for part in tensor for run in _runs(part)]
