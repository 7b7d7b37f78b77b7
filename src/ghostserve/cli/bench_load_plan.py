"""What `ghostserve bench load` measures: loaders, in which state of the caches, around a model or without one. Pure."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from ghostserve.config import CONFIG_ENV
from ghostserve.engine.load_format import LOAD_FORMAT


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
    environment: dict[str, str] = field(default_factory=dict)
    package: str = ""  # what has to be installed for it
    copies: bool = False  # `models optimise` was run before
    ours: bool = False

    @property
    def available(self) -> bool:
        return not self.package or importlib.util.find_spec(self.package) is not None


VLLM = Loader(name="vLLM (lazy)", reader="vllm")
VLLM_EAGER = Loader(name="vLLM eager", reader="vllm-eager", strategy="eager")
VLLM_PREFETCH = Loader(name="vLLM prefetch", reader="vllm-prefetch", strategy="prefetch")
FASTSAFETENSORS = Loader(
    name="fastsafetensors",
    reader="fastsafetensors",
    load_format="fastsafetensors-cpu",
    package="fastsafetensors",
)
RUNAI = Loader(
    name="runai-model-streamer", reader="runai", load_format="runai_streamer", package="runai_model_streamer"
)
ALONE = Loader(
    name="ghostserve without a pool",
    reader="ghostserve",
    load_format=LOAD_FORMAT,
    environment={CONFIG_ENV: json.dumps({"weights_memory": 0})},
    ours=True,
)
POOL = Loader(name="ghostserve", reader="ghostserve-pool", load_format=LOAD_FORMAT, ours=True)
OPTIMISED = Loader(name="ghostserve, optimised", load_format=LOAD_FORMAT, copies=True, ours=True)
LOADERS = (VLLM, VLLM_EAGER, VLLM_PREFETCH, FASTSAFETENSORS, RUNAI, ALONE, POOL, OPTIMISED)


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


def plan_cells(loaders: Sequence[Loader] = LOADERS) -> list[Cell]:
    """All of them."""
    known = [loader for loader in loaders if loader.available]
    cells = [
        Cell(loader=loader, state=State.COLD, raw=raw)
        for raw in (False, True)
        for loader in known
        if loader.reader or not raw
    ]
    cells += [
        Cell(loader=loader, state=State.COLD, ranks=2)
        for loader in known
        if loader in (VLLM, VLLM_PREFETCH, POOL, OPTIMISED)
    ]
    cells += [Cell(loader=POOL, state=State.COLD, ranks=2, raw=True)]
    works = ((False, 1), (True, 1), (False, 2), (True, 2))
    for raw, ranks in works:
        cells.append(Cell(loader=VLLM, state=State.CACHED, ranks=ranks, raw=raw))
        cells.append(Cell(loader=POOL, state=State.POOLED, ranks=ranks, raw=raw))
    return cells


def shuffled(cells: Sequence[Cell], rng: random.Random) -> list[Cell]:
    """In an order by chance, but what loads out of the pool right after what filled it."""
    pooled = {cell.work: cell for cell in cells if cell.state is State.POOLED}
    order: list[Cell] = []
    for cell in rng.sample(
        [cell for cell in cells if cell.state is not State.POOLED], k=len(cells) - len(pooled)
    ):
        order.append(cell)
        if cell.loader is POOL and cell.work in pooled:
            order.append(pooled.pop(cell.work))
    assert not pooled, f"nothing fills the pool for {list(pooled.values())}"
    return order
