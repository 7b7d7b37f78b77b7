"""The tensors of a model's files: those that are wanted, in the order in which they lie there, each once its bytes have arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
import torch

from ghostserve.errors import UnsupportedError
from ghostserve.weights.arriving import Bytes
from ghostserve.weights.dtypes import ELEMENT_TYPES
from ghostserve.weights.header import TensorSpan
from ghostserve.weights.model_files import WeightsFile


class FileBytes(Protocol):
    """The bytes of one file, here or on their way."""

    def get(self, begin: int, end: int) -> Bytes:
        """These bytes of the file, writable, nobody else's. Waits for them. Raises WeightsError."""
        ...

    def wait(self) -> None:
        """Until the file has been read to its end, and was what it had been at the beginning. Raises WeightsError."""
        ...

    def close(self) -> None:
        """Nothing more is wanted; what was handed out stays as it is."""
        ...


OpenBytes = Callable[[WeightsFile, list[tuple[int, int]]], FileBytes]
"""Opens a file of which these spans are wanted."""


def tensors(
    files: Iterable[WeightsFile], open_bytes: OpenBytes, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, views of the memory that the bytes came to. Raises WeightsError by its kind."""
    for file in files:
        spans = [span for span in file.header.tensors if wanted(span.name)]
        if not spans:
            continue
        arriving = open_bytes(file, [(span.begin, span.end) for span in spans])
        try:
            for span in spans:
                yield span.name, tensor_of(span, arriving.get(span.begin, span.end), file)
            arriving.wait()
        finally:
            arriving.close()


def tensor_of(span: TensorSpan, data: Bytes, file: WeightsFile) -> torch.Tensor:
    """The tensor whose bytes these are; copied only where torch could not read it in place."""
    kind = ELEMENT_TYPES[span.dtype]
    dtype = None if kind.torch_name is None else getattr(torch, kind.torch_name, None)
    if dtype is None:
        raise UnsupportedError(f"{file.path}: tensor {span.name!r} is {span.dtype}, which torch cannot hold")
    if data.ctypes.data % dtype.itemsize:
        data = np.array(data)  # numpy's own memory is aligned
    return torch.from_numpy(data).view(dtype).view(kind.torch_shape(span.shape))
