"""What `ghostserve bench load` measures: loaders, in which state of the caches, around a model or without one. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

OURS = "ghostserve"
OURS_FORMAT = "ghostserve"


class State(Enum):
    """What is in memory when the clock starts."""

    COLD = "cold"  # nothing: neither the page cache nor a pool has a byte of the files
    CACHED = "cached"  # the page cache has the files, whole
    POOLED = "pooled"  # the page cache has nothing, the pool has what an earlier load left there


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loader:
    """One way to load; `name` is what tables call it."""

    name: str
    load_format: str = "safetensors"
    reader: str = ""  # without a model; "" where there is no such thing
    strategy: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    pool: bool = False
    ours: bool = False


VLLM = Loader(name="vLLM (lazy)", reader="vllm")
VLLM_EAGER = Loader(name="vLLM eager", reader="vllm-eager", strategy="eager")
VLLM_PREFETCH = Loader(name="vLLM prefetch", reader="vllm-prefetch", strategy="prefetch")
FASTSAFETENSORS = Loader(name="fastsafetensors", reader="fastsafetensors", load_format="fastsafetensors-cpu")
RUNAI = Loader(name="runai-model-streamer", reader="runai", load_format="runai_streamer")
OTHERS = (VLLM, VLLM_EAGER, VLLM_PREFETCH, FASTSAFETENSORS, RUNAI)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A loader in a state, for a number of ranks."""

    loader: Loader
    state: State
    ranks: int = 1
    raw: bool = False  # every tensor in memory and looked at, no model

    @property
    def work(self) -> tuple[bool, int]:
        """Cells that agree in this do the same work."""
        return self.raw, self.ranks

    @property
    def group(self) -> str:
        """What it is compared with."""
        what = "no model" if self.raw else "model"
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{'cold' if self.state is State.COLD else 'warm'}, {what}{ranks}"

    @property
    def label(self) -> str:
        return self.loader.name + (", page cache" if self.state is State.CACHED else "")

    def __str__(self) -> str:
        return f"{self.group}: {self.label}"


def plan_cells() -> list[Cell]:
    """All of them."""
    cells = [Cell(loader=loader, state=State.COLD) for loader in OTHERS]
    cells += [Cell(loader=VLLM, state=State.CACHED)]
    cells += [Cell(loader=loader, state=State.COLD, raw=True) for loader in OTHERS]
    cells += [Cell(loader=VLLM, state=State.CACHED, raw=True)]
    return cells
