"""Whether loading a model does no more than fill its parameters.

Only then are the bytes of the parameters all that a second process needs. What a model is beside them (its modules, their attributes
and those of their quantisation, its buffers) is looked at before and after vLLM's own loading, and compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ghostserve.native.checksum import crc32

SIMPLE = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


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
            parts.update(_attributes(name, parameter))
        for name, buffer in model.named_buffers():
            parts[f"buffer {name}"] = _checksum(buffer)
        for name, module in model.named_modules():
            parts[f"module {name}"] = (_Same(module), type(module))
            parts.update(_attributes(name, module))
            if (method := getattr(module, "quant_method", None)) is not None and hasattr(method, "__dict__"):
                parts[f"{name}.quant_method's class"] = type(method)
                parts.update(_attributes(f"{name}.quant_method", method))
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


def plain_attributes(owner: object) -> Iterator[tuple[str, Any]]:
    """Name and value of what it has beside its parameters, buffers and modules."""
    for name, value in vars(owner).items():
        if name not in ("_parameters", "_buffers", "_modules"):
            yield name, value


def _attributes(name: str, owner: object) -> Iterator[tuple[str, Any]]:
    for attribute, value in plain_attributes(owner):
        yield f"{name}.{attribute}", _token(value)


def _token(value: Any) -> Any:
    if isinstance(value, SIMPLE):
        return type(value), value
    if isinstance(value, dict):
        return dict, [(_one(key), _one(item)) for key, item in value.items()]
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
