"""Tensors on a GPU, by the Triton kernel: launched on the current stream, nothing waited for.

Pointer tables are uploaded once for the same buffers and stream (the last few are kept). Runs on a CPU, too, under
TRITON_INTERPRET=1, for tests. Imports Triton, which makes vLLM choose another model runner where it can be
imported: so this module is imported only where Triton is wanted. Nothing of the server selects it yet.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ghostserve.codec.field import Elements
from ghostserve.codec.matrix import POWERS_M_MAX, powers_matrix
from ghostserve.codec.torch_backend import TorchArrays
from ghostserve.codec.triton_kernel import combine_kernel
from ghostserve.errors import UsageError

_Addresses: TypeAlias = npt.NDArray[np.int64]

ROWS_MAX = 4  # targets in one pass
SEGMENTS_MAX = 65535  # of one launch: CUDA's limit of a grid's second dimension
BLOCK_LANES = 1024
_ALIGNMENT = 16
_WORD_BYTES = 4


class TritonBackend(TorchArrays):
    """`Backend` by `combine_kernel`. UsageError unless all tensors of a call are on one device."""

    name = "triton"

    def combine(
        self,
        matrix: Elements,
        sources: Sequence[Sequence[torch.Tensor]],
        targets: Sequence[Sequence[torch.Tensor]],
        *,
        accumulate: bool,
    ) -> None:
        """See `Backend.combine`."""
        if not sources:
            return
        devices = {piece.device for segment in (*sources, *targets) for piece in segment}
        if len(devices) > 1:
            raise UsageError(f"shards on several devices: {', '.join(sorted(map(str, devices)))}")
        reads = np.array([[piece.data_ptr() for piece in segment] for segment in sources], np.int64)
        writes = np.array([[piece.data_ptr() for piece in segment] for segment in targets], np.int64)
        lengths = np.array([segment[0].numel() for segment in sources], np.int64)
        misaligned = (reads % _ALIGNMENT).any(axis=1) | (writes % _ALIGNMENT).any(axis=1)
        whole = np.where(misaligned, 0, lengths // _ALIGNMENT * _ALIGNMENT)
        (device,) = devices
        with torch.cuda.device_of(sources[0][0]):
            for first in range(0, len(matrix), ROWS_MAX):
                rows = slice(first, first + ROWS_MAX)
                launch = functools.partial(_launch, matrix[rows], accumulate=accumulate, device=device)
                launch(reads, writes[:, rows], whole // _WORD_BYTES, words=True)
                skip = whole[:, None]
                launch(reads + skip, writes[:, rows] + skip, lengths - whole, words=False)


def _launch(
    matrix: Elements,
    reads: _Addresses,
    writes: _Addresses,
    lanes: _Addresses,
    *,
    words: bool,
    accumulate: bool,
    device: torch.device,
) -> None:
    """One launch for all segments that have lanes of this kind."""
    rows, columns = matrix.shape
    horner = rows <= POWERS_M_MAX and np.array_equal(matrix, powers_matrix(columns, rows))
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    some = np.flatnonzero(lanes)
    for first in range(0, len(some), SEGMENTS_MAX):
        part = some[first : first + SEGMENTS_MAX]
        read, write, lane = reads[part], writes[part], lanes[part]
        table = _upload(np.concatenate([read.ravel(), write.ravel(), lane]).tobytes(), device, stream)
        ends = read.size, read.size + write.size
        combine_kernel[-(-int(lane.max()) // BLOCK_LANES), len(part)](
            table[: ends[0]],
            table[ends[0] : ends[1]],
            table[ends[1] :],
            COLUMNS=columns,
            ROWS=rows,
            MATRIX=0 if horner else int.from_bytes(matrix.tobytes(), "little"),
            HORNER=horner,
            WORDS=words,
            ACCUMULATE=accumulate,
            BLOCK=BLOCK_LANES,
        )


@functools.lru_cache(maxsize=64)
def _upload(content: bytes, device: torch.device, stream: int) -> torch.Tensor:
    """A table of addresses on the device, there for this stream: the copy is queued on it and not waited for."""
    table = torch.frombuffer(bytearray(content), dtype=torch.int64)
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)
