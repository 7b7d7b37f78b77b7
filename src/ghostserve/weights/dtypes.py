"""The element types of safetensors files: how wide they are, and which torch type holds them. Pure: torch is only named."""

from __future__ import annotations

from dataclasses import dataclass

from ghostserve.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class ElementType:
    """One type."""

    bits: int
    torch_name: str | None
    """The attribute of torch; None where torch has no such type."""
    per_torch_element: int = 1
    """How many elements torch packs into one of its own: its last dimension is that much shorter than the file's."""

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that torch gives to a tensor which the file says has `shape`. UnsupportedError if there is none."""
        packed = self.per_torch_element
        if packed == 1:
            return shape
        if not shape or shape[-1] % packed:
            raise UnsupportedError(
                f"torch holds {self.torch_name} by {packed}, and shape {shape} has no such rows"
            )
        return (*shape[:-1], shape[-1] // packed)


ELEMENT_TYPES = {
    "BOOL": ElementType(8, "bool"),
    "U8": ElementType(8, "uint8"),
    "I8": ElementType(8, "int8"),
    "U16": ElementType(16, "uint16"),
    "I16": ElementType(16, "int16"),
    "U32": ElementType(32, "uint32"),
    "I32": ElementType(32, "int32"),
    "U64": ElementType(64, "uint64"),
    "I64": ElementType(64, "int64"),
    "F16": ElementType(16, "float16"),
    "BF16": ElementType(16, "bfloat16"),
    "F32": ElementType(32, "float32"),
    "F64": ElementType(64, "float64"),
    "C64": ElementType(64, "complex64"),
    "F8_E4M3": ElementType(8, "float8_e4m3fn"),
    "F8_E5M2": ElementType(8, "float8_e5m2"),
    "F8_E8M0": ElementType(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": ElementType(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": ElementType(8, "float8_e5m2fnuz"),
    "F4": ElementType(4, "float4_e2m1fn_x2", per_torch_element=2),
    "F6_E2M3": ElementType(6, None),
    "F6_E3M2": ElementType(6, None),
}
"""By the name in the file's header."""
