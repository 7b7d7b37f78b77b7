"""A rank image and a device with memory of its own: copied, through pages that the device reads by itself where it can.

Not measured on a device yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from ghostserve.weights.mapping import Mapped
from ghostserve.weights.rank_image import Layout

_READ_ONLY = 0x08  # cudaHostRegisterReadOnly: the image is sealed


def copy_in(model: nn.Module, layout: Layout, fd: int) -> None:
    """Image to device, on a stream of its own; returns when all of it is there. Raises OSError."""
    parameters = dict(model.named_parameters())
    mapped = Mapped(fd, offset=0, length=layout.nbytes, shared=False)
    memory = mapped.array()
    with _registered(memory), _stream():
        for place in layout.places:
            target = parameters[place.parameter.name].data
            target.copy_(_cut(memory, place.offset, target), non_blocking=True)
    del memory, mapped


def copy_out(model: nn.Module, layout: Layout, fd: int) -> None:
    """Device to image, which is shared with nobody yet. Raises OSError."""
    parameters = dict(model.named_parameters())
    memory = Mapped(fd, offset=0, length=layout.nbytes, shared=True).array()
    for place in layout.places:
        source = parameters[place.parameter.name].data
        _cut(memory, place.offset, source).copy_(source)


def _cut(memory: np.ndarray, offset: int, like: torch.Tensor) -> torch.Tensor:
    if not like.nbytes:
        return torch.empty(like.shape, dtype=like.dtype)
    return torch.from_numpy(memory[offset : offset + like.nbytes]).view(like.dtype).view(like.shape)


@contextlib.contextmanager
def _registered(memory: np.ndarray) -> Iterator[None]:
    """Pinned where CUDA agrees: then copies overlap. Where it does not they are as exact, and slower."""
    address, registered = memory.ctypes.data, False
    if torch.cuda.is_available():
        registered = int(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, _READ_ONLY)) == 0
    try:
        yield
    finally:
        if registered:
            torch.cuda.cudart().cudaHostUnregister(address)


@contextlib.contextmanager
def _stream() -> Iterator[None]:
    if not torch.accelerator.is_available():
        yield
        return
    stream = torch.Stream()
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        yield
    stream.synchronize()
