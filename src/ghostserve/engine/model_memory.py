"""The memory behind a model's parameters: whether it can be exchanged, and exchanging it.

vLLM builds a model with its parameters allocated and not loaded. Here another memory is put below them, at that moment: one that
is filled for all, or one that is filled already. What cannot be exchanged is said in a sentence, and loads as without us.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ghostserve.engine.model_beside import plain_attributes
from ghostserve.weights.mapping import Mapped, written_pages
from ghostserve.weights.rank_image import PAGE_BYTES, Layout, Parameter, lay_out


def why_not(model: nn.Module) -> str | None:
    """A sentence if the memory of this model's parameters cannot be exchanged; None if it can."""
    seen: dict[int, str] = {}
    devices = set()
    for name, parameter in model.named_parameters():
        if (reason := _why_not(parameter)) is not None:
            return f"{name} {reason}"
        devices.add(parameter.device.type)
        if parameter.numel() == 0:
            continue
        if (other := seen.setdefault(parameter.untyped_storage().data_ptr(), name)) != name:
            return f"{name} shares its memory with {other}"
    if len(devices) > 1:
        return f"its parameters are on several devices ({', '.join(sorted(devices))})"
    for where, tensor in _other_tensors(model):
        if tensor.device.type != "meta" and tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            return f"{where} shares its memory with {seen[tensor.untyped_storage().data_ptr()]}"
    return None if seen else "it has no parameters"


def _why_not(parameter: nn.Parameter) -> str | None:
    if isinstance(parameter, UninitializedParameter):
        return "gets its size while it is loaded"
    if parameter.is_meta:
        return "gets its memory while it is loaded"
    if parameter.layout is not torch.strided or parameter.is_quantized:
        return f"is not dense ({parameter.layout})"
    if not parameter.is_contiguous() or parameter.storage_offset():
        return "does not lie in one piece"
    if parameter.untyped_storage().nbytes() != parameter.nbytes:
        return "is part of a larger memory"
    return None


def _other_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers, and what modules keep as plain attributes."""
    yield from model.named_buffers()
    for name, module in model.named_modules():
        for attribute, value in plain_attributes(module):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor):
                    yield f"{name}.{attribute}", tensor


def layout_of(model: nn.Module) -> Layout:
    """Where the parameters lie in an image of this model; those that two modules share, once."""
    return lay_out(
        Parameter(
            name=name,
            dtype=str(parameter.dtype).removeprefix("torch."),
            shape=tuple(parameter.shape),
            nbytes=parameter.nbytes,
        )
        for name, parameter in model.named_parameters()
    )


class Below:
    """An image's memory below the parameters of a model on the CPU.

    Not for long: as long as this lives, so does all of the memory; then the parameters alone keep it, each its own.
    """

    def __init__(self, model: nn.Module, layout: Layout, fd: int, *, shared: bool) -> None:
        """Map it; `shared` where it is to be filled. Raises OSError. The parameters are as they were until one of the methods runs."""
        self._parameters = dict(model.named_parameters())
        self._ranges: list[Mapped] = []
        self._tensors = dict(self._cut(layout, fd, shared=shared))

    def _cut(self, layout: Layout, fd: int, *, shared: bool) -> Iterator[tuple[str, torch.Tensor]]:
        small = self._map(fd, 0, layout.small_bytes, shared=shared) if layout.small_bytes else None
        for place in layout.places:
            nbytes = place.parameter.nbytes
            if place.large:
                memory = self._map(fd, place.offset, _whole_pages(nbytes), shared=shared)[:nbytes]
            elif nbytes:
                assert small is not None
                memory = small[place.offset : place.offset + nbytes]
            else:
                continue
            parameter = self._parameters[place.parameter.name]
            yield (
                place.parameter.name,
                torch.from_numpy(memory).view(parameter.dtype).view(parameter.shape),
            )

    def _map(self, fd: int, offset: int, length: int, *, shared: bool) -> Any:
        mapped = Mapped(fd, offset=offset, length=length, shared=shared)
        self._ranges.append(mapped)
        return mapped.array()

    def put(self, *, keep: bool) -> None:
        """Put it below the parameters; `keep`: what they hold now goes with them."""
        for name, tensor in self._tensors.items():
            if keep:
                _copy_written(self._parameters[name].data, tensor)
            self._parameters[name].data = tensor
        self._tensors = {}

    def make_private(self, fd: int) -> None:
        """From now on what is written is this process's own. Raises OSError."""
        for mapped in self._ranges:
            mapped.make_private(fd)


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def _copy_written(source: torch.Tensor, target: torch.Tensor) -> None:
    """What was allocated and not written to is zeros on both sides: gigabytes that need not be touched."""
    address, nbytes = source.data_ptr(), source.nbytes
    written = written_pages(address, nbytes)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], written, [False])).astype(np.int8)))
    old, new = source.reshape(-1).view(torch.uint8), target.reshape(-1).view(torch.uint8)
    page = address // PAGE_BYTES
    for first, end in edges.reshape(-1, 2):
        begin = max(0, int(page + first) * PAGE_BYTES - address)
        until = min(nbytes, int(page + end) * PAGE_BYTES - address)
        new[begin:until] = old[begin:until]
