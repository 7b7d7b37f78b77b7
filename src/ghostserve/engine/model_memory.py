"""The memory behind a model's parameters: whether it can be exchanged, and exchanging it.

vLLM builds a model with its parameters allocated and not loaded. Here another memory is put below them, at that moment: one that
is filled for all, or one that is filled already. What cannot be exchanged is said in a sentence, and loads as without us.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

from ghostserve.native.checksum import crc32
from ghostserve.weights.mapping import Mapped, written_pages
from ghostserve.weights.rank_image import PAGE_BYTES, Layout, Parameter, lay_out

SIMPLE = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


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
    if isinstance(parameter, UninitializedTensorMixin):
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
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
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
    """An image's memory below the parameters of a model on the CPU."""

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
        """From now on what is written is this process's own. Ends this object's hold on the memory. Raises OSError."""
        for mapped in self._ranges:
            mapped.make_private(fd)
        self.let_go()

    def take_away(self) -> None:
        """Give the parameters memory of their own, with what they hold."""
        for parameter in self._parameters.values():
            parameter.data = parameter.data.clone()
        self.let_go()

    def let_go(self) -> None:
        """The parameters alone keep the memory; what is dropped of them is given back."""
        self._ranges, self._tensors, self._parameters = [], {}, {}


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


# ---- whether loading does no more than fill parameters -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a model is beside the bytes of its parameters."""

    parts: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module) -> Beside:
        """Keeps what it names, so that nothing new can be taken for it."""
        parts: dict[str, Any] = {}
        for name, parameter in model.named_parameters():
            parts[f"parameter {name}"] = (_Same(parameter), parameter.dtype, tuple(parameter.shape))
            parts[f"the memory of {name}"] = parameter.data_ptr()
            parts.update(_attributes(name, vars(parameter)))
        for name, buffer in model.named_buffers():
            parts[f"buffer {name}"] = _checksum(buffer)
        for name, module in model.named_modules():
            parts[f"module {name}"] = (_Same(module), type(module))
            parts.update(_attributes(name, vars(module)))
            if (method := getattr(module, "quant_method", None)) is not None and hasattr(method, "__dict__"):
                parts[f"{name}.quant_method's class"] = type(method)
                parts.update(_attributes(f"{name}.quant_method", vars(method)))
        return cls(parts=parts)

    def first_difference(self, other: Beside) -> str | None:
        """What is not the same there."""
        if changed := [name for name, value in self.parts.items() if other.parts.get(name) != value]:
            return changed[0]
        return next((name for name in other.parts if name not in self.parts), None)


class _Same:
    """An object that equals itself alone, whatever it says about it."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    __hash__ = None  # type: ignore[assignment]


def _attributes(name: str, attributes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for attribute, value in attributes.items():
        if attribute not in ("_parameters", "_buffers", "_modules"):
            yield f"{name}.{attribute}", _token(value)


def _token(value: Any) -> Any:
    if isinstance(value, SIMPLE):
        return type(value), value
    if isinstance(value, dict):
        return (
            dict,
            [(_one(key), _one(item)) for key, item in value.items()],
        )
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), [_one(item) for item in _in_order(value)]
    return _Same(value)


def _in_order(values: Iterable[Any]) -> list[Any]:
    return sorted(values, key=repr) if isinstance(values, (set, frozenset)) else list(values)


def _one(value: Any) -> Any:
    return (type(value), value) if isinstance(value, SIMPLE) else _Same(value)


def _checksum(buffer: torch.Tensor) -> Any:
    if buffer.is_meta or buffer.layout is not torch.strided:
        return _Same(buffer)
    flat = buffer.detach().cpu().contiguous().reshape(-1)
    return (
        buffer.dtype,
        tuple(buffer.shape),
        crc32(flat.view(torch.uint8).numpy()) if flat.numel() else 0,
    )
