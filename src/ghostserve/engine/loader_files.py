"""The tensors of a model's files: those that are wanted, in the order in which they lie there, each once its bytes have arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
import torch

from ghostserve.errors import UnsupportedError
from ghostserve.weights.destination import Bytes
from ghostserve.weights.dtypes import ELEMENT_TYPES
from ghostserve.weights.header import TensorSpan
from ghostserve.weights.model_files import WeightsFile


class FileBytes(Protocol):
    """The bytes of one file, here or on their way."""

    def get(self, begin: int, end: int) -> Bytes:
        """These bytes of the file, writable, nobody else's as long as the array lives. In ascending order. Waits for them. Raises
        WeightsError."""
        ...

    @property
    def arrived(self) -> bool:
        """Whether all that is wanted is there: `get` would not wait."""
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
    """Name and tensor, views of the memory that the bytes came to. Raises WeightsError by its kind.

    A file is opened as soon as the bytes of the one before are there, so that the disk is busy while its last tensors are taken.
    """
    todo = _wanted_of(files, wanted)
    now, then = _opened(todo, open_bytes), None
    try:
        while now is not None:
            file, spans, arriving = now
            for span in spans:
                data = arriving.get(span.begin, span.end)
                if then is None and arriving.arrived:
                    then = _opened(todo, open_bytes)
                yield span.name, tensor_of(span, data, file)
            arriving.wait()
            arriving.close()
            now, then = then or _opened(todo, open_bytes), None
    finally:
        for opened in (now, then):
            if opened is not None:
                opened[2].close()


def _wanted_of(
    files: Iterable[WeightsFile], wanted: Callable[[str], bool]
) -> Iterator[tuple[WeightsFile, list[TensorSpan]]]:
    """Each file of which something is wanted, and what."""
    for file in files:
        if spans := [span for span in file.header.tensors if wanted(span.name)]:
            yield file, spans


def _opened(
    todo: Iterator[tuple[WeightsFile, list[TensorSpan]]], open_bytes: OpenBytes
) -> tuple[WeightsFile, list[TensorSpan], FileBytes] | None:
    """The next file, opened; None if there is none."""
    for file, spans in todo:
        return file, spans, open_bytes(file, [(span.begin, span.end) for span in spans])
    return None


def tensor_of(span: TensorSpan, data: Bytes, file: WeightsFile) -> torch.Tensor:
    """The tensor whose bytes these are; copied only where torch could not read it in place."""
    kind = ELEMENT_TYPES[span.dtype]
    dtype = None if kind.torch_name is None else getattr(torch, kind.torch_name, None)
    if dtype is None:
        raise UnsupportedError(f"{file.path}: tensor {span.name!r} is {span.dtype}, which torch cannot hold")
    shape = kind.torch_shape(span.shape)
    if data.size == 0:  # torch views nothing as nothing else
        return torch.empty(shape, dtype=dtype)
    if data.ctypes.data % dtype.itemsize:
        data = np.array(data)  # numpy's own memory is aligned
    return torch.from_numpy(data).view(dtype).view(shape)
