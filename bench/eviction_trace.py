"""Loads of models, made from a trace of real clients.

ServeGen (alibaba/ServeGen, data/reason/deepseek-r1, Apache-2.0; Xiang et al., arXiv 2505.09999) gives for 73 clients of one
day the rate of their requests in windows of 10 minutes and how the gaps between them are distributed. No public trace says
which model a request wanted, so each client is taken for the users of one model: their rates differ by five orders of
magnitude, and rise, fall and pause as real ones do. A model is loaded when a request finds no server of it, and its server
ends KEEP_ALIVE_S after its last request. Sizes and costs are not in the trace: they are drawn, by seed.
"""

from __future__ import annotations

import csv
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

WINDOW_S = 600.0
KEEP_ALIVE_S = 60.0
# Weights in bfloat16 of models that people serve: 0.6B, 1.7B, 3B, 8B, 14B, 32B, 70B.
SIZES_GB = (1.2, 3.4, 6.2, 16.1, 29.5, 65.5, 141.0)
DISK_GB_S = 2.0
SLOW_GB_S = 0.25  # a file system on the network, in the scenario with two kinds of sources
SLOW_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    size_gb: float
    cost_s: float  # to load it without the pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A server of `model` starts, and uses its weights until `until_s`."""

    at_s: float
    until_s: float
    model: int


def read_windows(archive: Path) -> list[list[tuple[float, float, str, float, float]]]:
    """For each client its windows: (begin in s, requests per s, family of gaps, shape, scale in s)."""
    clients = []
    with tarfile.open(archive) as tar:
        names = sorted(name for name in tar.getnames() if name.endswith("-trace.csv"))
        for name in names:
            file = tar.extractfile(name)
            assert file is not None, name
            rows = csv.reader(io.TextIOWrapper(file, encoding="utf-8"))
            clients.append(
                [(float(b), float(rate), family, float(k), float(s)) for b, rate, _, family, k, s in rows]
            )
    return clients


def requests_of(
    windows: list[tuple[float, float, str, float, float]], rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Times of one client's requests, in s."""
    times = []
    for begin_s, rate, family, shape, scale_s in windows:
        at_s = 0.0
        while rate > 0 and at_s < WINDOW_S:
            count = int(rate * WINDOW_S) + 16
            gaps = (
                scale_s * rng.weibull(shape, count)
                if family == "Weibull"
                else rng.gamma(shape, scale_s, count)
            )
            found = at_s + np.cumsum(gaps)
            times.append(begin_s + found[found < WINDOW_S])
            at_s = float(found[-1])
    return np.concatenate(times) if times else np.empty(0)


def loads_of(times_s: npt.NDArray[np.float64], model: int) -> list[Load]:
    """A load wherever a request finds no server any more."""
    if not times_s.size:
        return []
    starts = np.flatnonzero(np.diff(times_s, prepend=-np.inf) > KEEP_ALIVE_S)
    ends = np.append(starts[1:] - 1, times_s.size - 1)
    return [
        Load(at_s=float(times_s[start]), until_s=float(times_s[end]) + KEEP_ALIVE_S, model=model)
        for start, end in zip(starts, ends, strict=True)
    ]


def make(archive: Path, *, seed: int, two_sources: bool) -> tuple[list[Model], list[Load]]:
    """The models and all loads in order of time."""
    rng = np.random.default_rng(seed)
    clients = read_windows(archive)
    models = []
    for _ in clients:
        size_gb = float(rng.choice(SIZES_GB))
        slow = two_sources and rng.random() < SLOW_SHARE
        models.append(Model(size_gb=size_gb, cost_s=size_gb / (SLOW_GB_S if slow else DISK_GB_S)))
    loads = [
        load for number, windows in enumerate(clients) for load in loads_of(requests_of(windows, rng), number)
    ]
    return models, sorted(loads, key=lambda load: load.at_s)
