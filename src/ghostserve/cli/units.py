"""Numbers as people read them. Pure."""

from __future__ import annotations

_STEPS = ("B", "KiB", "MiB", "GiB", "TiB")


def bytes_text(count: float) -> str:
    """`1536` as `1.5 KiB`."""
    for step in _STEPS[:-1]:
        if abs(count) < 1024:
            return f"{count:.0f} {step}" if step == "B" else f"{count:.1f} {step}"
        count /= 1024
    return f"{count:.1f} {_STEPS[-1]}"


def count_text(count: int, noun: str) -> str:
    """`2 blocks`, `1 block`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def milliseconds_text(milliseconds: float) -> str:
    """Whole milliseconds, or tenths below ten."""
    return f"{milliseconds:.1f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"
