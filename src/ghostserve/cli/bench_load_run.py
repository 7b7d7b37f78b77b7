"""Runs the trials of `ghostserve bench load`: one cell at a time, the page cache as the cell wants it, the disk's ceiling just before.

A disk's speed changes while a bench runs (others use it, a virtual disk has an allowance). So each cold load comes right after a direct
read of the same files, and its share of the ceiling is the share of that read.
"""

from __future__ import annotations

import glob
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ghostserve.cli import bench_load_cache
from ghostserve.cli.bench_load_ceiling import Depth, read_s
from ghostserve.cli.bench_load_plan import Cell, State
from ghostserve.errors import StartError
from ghostserve.weights import rank_file
from ghostserve.weights.pool import Pool
from ghostserve.weights.pool_types import ImageKind
from ghostserve.weights.runtime_dir import RUNTIME_DIR_ENV

START_S, TRIAL_S, END_S = 120.0, 300.0, 10.0
SHARED_MEMORY = Path("/dev/shm")
_PACKET_BYTES = 1 << 16


class Trials:
    """The process that forks a new one for each trial (engine/load_trials.py). Use it as a context manager."""

    MODULE = "ghostserve.engine.load_trials"

    def __init__(self, *, scratch: Path, log: Path) -> None:
        self._scratch, self._log, self._number = scratch, log, 0
        self._pool = scratch / "pool"  # not the user's own, nor are the checksums
        self._places = {RUNTIME_DIR_ENV: str(self._pool), "XDG_CACHE_HOME": str(scratch / "cache")}
        self._copies, self._copies_used = scratch / "copies", scratch / "cache" / "ghostserve" / "ranks"

    def __enter__(self) -> Trials:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", self.MODULE, str(theirs.fileno())]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "VLLM_LOGGING_LEVEL": "WARNING"}
        with theirs, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdout=log, stderr=log
            )
        self._socket = ours
        try:
            self._hear("started", timeout_s=START_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_pool()
        self._socket.close()  # it ends by itself
        try:
            self._process.wait(END_S if error is None else 0.1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_S)

    def run(
        self, cell: Cell, *, model: Path, digest: bool, before: Callable[[], None]
    ) -> list[dict[str, Any]]:
        """The figures of each rank. `before` is called when all models are built, before the clock starts."""
        self._number += 1
        meeting = self._scratch / f"{self._scratch.parent.name}-{self._number}"
        try:
            return self._run(cell, model=model, digest=digest, before=before, meeting=meeting)
        finally:
            for left in SHARED_MEMORY.glob(f"{glob.escape(meeting.name)}-*"):
                left.unlink(missing_ok=True)  # of vLLM's collectives between ranks

    def _run(
        self, cell: Cell, *, model: Path, digest: bool, before: Callable[[], None], meeting: Path
    ) -> list[dict[str, Any]]:
        loader = cell.loader
        task = {
            "model": str(model),
            "ranks": cell.ranks,
            "raw": cell.raw,
            "reader": loader.reader,
            "load_format": loader.load_format,
            "strategy": loader.strategy,
            "environment": loader.environment | self._places,
            "meeting": str(meeting),
            "digest": digest,
        }
        self._say(task)
        self._gather("ready", cell.ranks)
        before()
        self._go(cell.ranks)
        self._gather("loaded", cell.ranks)
        self._go(cell.ranks)
        figures = self._gather("figures", cell.ranks)
        self._hear("ended", timeout_s=TRIAL_S)
        return sorted(figures, key=lambda of_rank: int(of_rank["rank"]))

    def make_copies(self, cell: Cell, *, model: Path) -> None:
        """What `models optimise` makes of a load."""
        self.use_copies(False)
        self.run(cell, model=model, digest=False, before=self.stop_pool)
        pool = Pool.connect(start=False, directory=self._pool)
        if pool is None:
            raise StartError(f"a load left no pool{self._tail()}")
        for entry in pool.list():
            if entry.kind is ImageKind.RANK:
                rank_file.keep(pool, entry, into=self._copies)

    def use_copies(self, wanted: bool) -> list[Path]:
        """Have them where loads find them, or elsewhere. They are what is returned."""
        here, there = (self._copies_used, self._copies) if wanted else (self._copies, self._copies_used)
        if there.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            there.rename(here)
        return sorted(here.glob("*.safetensors")) if here.exists() else []

    def stop_pool(self) -> None:
        """End the holder that earlier trials started, and all that it holds."""
        pool = Pool.connect(start=False, directory=self._pool)
        if pool is not None:
            pool.stop()

    def _say(self, what: dict[str, Any]) -> None:
        self._socket.send(json.dumps(what).encode())

    def _go(self, ranks: int) -> None:
        for _ in range(ranks):
            self._say({"kind": "go"})

    def _gather(self, kind: str, count: int) -> list[dict[str, Any]]:
        return [self._hear(kind, timeout_s=TRIAL_S) for _ in range(count)]

    def _hear(self, kind: str, *, timeout_s: float) -> dict[str, Any]:
        self._socket.settimeout(timeout_s)
        try:
            packet = self._socket.recv(_PACKET_BYTES)
        except TimeoutError:
            raise StartError(f"a trial did not answer within {timeout_s:.0f} s{self._tail()}") from None
        if not packet:
            raise StartError(f"the process of the trials ended{self._tail()}")
        heard: dict[str, Any] = json.loads(packet)
        if heard["kind"] != kind:
            raise StartError(f"a trial failed: {heard.get('error', heard)}{self._tail()}")
        return heard

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-15:]
        return "".join(f"\n    {line}" for line in lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One trial of a cell. Sizes and times of ranks that run side by side: the slowest, the largest, or the sum, as named."""

    seconds: float  # the slowest rank's
    ceiling_s: float | None  # the direct read just before; None where the disk is not asked
    post_s: float
    cpu_s: float  # all ranks
    read_bytes: int  # all ranks
    peak_rss_growth_bytes: int  # the largest
    pss_bytes: int  # the largest
    pss_shared_bytes: int  # of that, in the pool's memory or the page cache's
    digest: str


def measure_cell(
    trials: Trials, cell: Cell, *, model: Path, files: Sequence[Path], depth: Depth, digest: bool
) -> Sample:
    """One trial, the caches brought into the cell's state when the model stands and before the clock starts."""
    ceiling_s: float | None = None

    def before() -> None:
        nonlocal ceiling_s
        copies = trials.use_copies(cell.loader.copies)
        if cell.state is State.CACHED:
            bench_load_cache.fill(files)
            return
        bench_load_cache.drop(copies)
        bench_load_cache.drop(files)
        if cell.state is State.COLD:
            trials.stop_pool()  # whoever wants one starts it: that belongs to a first load
            ceiling_s = read_s(files, depth)
            bench_load_cache.drop(files)

    ranks = trials.run(cell, model=model, digest=digest, before=before)

    def largest(name: str) -> Any:
        return max(of_rank[name] for of_rank in ranks)

    return Sample(
        seconds=largest("seconds"),
        ceiling_s=ceiling_s,
        post_s=largest("post_s"),
        cpu_s=sum(of_rank["cpu_s"] for of_rank in ranks),
        read_bytes=sum(of_rank["read_bytes"] for of_rank in ranks),
        peak_rss_growth_bytes=largest("peak_rss_growth_bytes"),
        pss_bytes=largest("pss"),
        pss_shared_bytes=max(of_rank["pss_shmem"] + of_rank["pss_file"] for of_rank in ranks),
        digest="/".join(of_rank["digest"] for of_rank in ranks if of_rank["digest"]),
    )
