"""The servers that are compared: how each is started, what it really uses, and that nothing of it stays behind.

All of them: the shipped tiny model, TP=2, float32, eager, one core per rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import psutil
from script import say

import ghostserve
from ghostserve.testing.server import ServerProcess, ghostserve_command, stock_command

MODELS_DIR = Path(ghostserve.__file__).parent / "models"
MODEL_DIR = MODELS_DIR / "tiny-llama"
MODEL_NAME = "tiny"
TENSOR_PARALLEL = 2
BLOCK_TOKENS = 32
FLOAT32_BYTES = 4
READY_TIMEOUT_S = 300.0
OUR_SEGMENT = "memfd:ghostserve-collectives"
_SHM = "/dev/shm/"

COMMON_FLAGS = (
    "--tensor-parallel-size", str(TENSOR_PARALLEL),
    "--dtype", "float32",
    "--enforce-eager",
    "--block-size", str(BLOCK_TOKENS),
    "--max-num-seqs", "16",
    "--max-num-batched-tokens", "2048",
    "--served-model-name", MODEL_NAME,
)  # fmt: skip


class Collectives(Enum):
    """How the ranks of a server add up their partial results."""

    GLOO = "gloo"
    SHARED_MEMORY = "vLLM's shared memory"  # it spins, and never notices that a peer died
    OURS = "our shared memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to serve; `letter` is how the tables call it."""

    letter: str
    title: str
    ours: bool
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def command(self, flags: Sequence[str]) -> list[str]:
        start = ghostserve_command if self.ours else stock_command
        return start(MODEL_DIR, *COMMON_FLAGS, *self.flags, *flags)


OURS_ON = Variant(letter="a", title="ghostserve serve", ours=True)
OURS_OFF = Variant(
    letter="b", title="ghostserve serve --protection none", ours=True, flags=("--protection", "none")
)
STOCK_OURS = Variant(
    letter="c",
    title="stock vLLM with our collectives",
    ours=False,
    env={"GHOSTSERVE_PLATFORM": "1"},  # our platform plugin alone: it changes the communicator, nothing else
)
STOCK = Variant(letter="d", title="stock vLLM", ours=False)
STOCK_AGAIN = Variant(letter="f", title="stock vLLM, a second server", ours=False)
OURS_ASYNC = Variant(
    letter="e", title="ghostserve serve --async-scheduling", ours=True, flags=("--async-scheduling",)
)


def kv_bytes_per_token() -> int:
    """What one token's KV takes on one rank, all layers."""
    config = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    heads = config["num_key_value_heads"] // TENSOR_PARALLEL
    return int(2 * config["num_hidden_layers"] * heads * config["head_dim"] * FLOAT32_BYTES)


def shipped_prompts() -> list[str]:
    """The prompts that come with the model."""
    items = json.loads((MODELS_DIR / "prompts.json").read_text(encoding="utf-8"))
    return [str(item["prompt"]) for item in items]


def bind_cpus() -> str:
    """One CPU per rank, in vLLM's notation."""
    cpus = sorted(os.sched_getaffinity(0))
    return "|".join(str(cpus[rank % len(cpus)]) for rank in range(TENSOR_PARALLEL))


def mapped_segments(server: ServerProcess) -> set[Path]:
    """The named shared-memory segments that the server's processes have mapped now."""
    found: set[Path] = set()
    for mark in server.processes:
        for line in _maps(mark.pid).splitlines():
            name = line.partition(_SHM)[2]
            if name and not name.endswith(" (deleted)"):
                found.add(Path(_SHM + name))
    return found


def _maps(pid: int) -> str:
    """What a process has mapped; nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


class Servers:
    """Starts servers and ends them all; a context manager. Use it from the main thread.

    Their temporary files go to a directory that is removed at the end. Segments that vLLM leaves in /dev/shm,
    some of them even after a clean exit, are told by who had them mapped, and removed with their server.
    """

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="gs-bench-"))
        self._running: dict[int, ServerProcess] = {}
        self._segments: dict[int, set[Path]] = {}

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for server in list(self._running.values()):
            pause(server, stopped=False)
            self.stop(server)
        shutil.rmtree(self._directory, ignore_errors=True)

    def start(self, variant: Variant, *flags: str, env: Mapping[str, str] | None = None) -> ServerProcess:
        """Start and wait until it serves. Raises StartError with the log's end."""
        own = {
            "VLLM_CPU_OMP_THREADS_BIND": bind_cpus(),
            "TMPDIR": str(self._directory),
            "VLLM_RPC_BASE_PATH": str(self._directory),
            "GHOSTSERVE_PLATFORM": "0",
        }
        server = ServerProcess(
            variant.command(flags), log_dir=self._directory, env={**own, **variant.env, **(env or {})}
        )
        server.start()
        self._running[server.port] = server
        server.wait_ready(
            timeout_s=READY_TIMEOUT_S,
            on_progress=lambda seconds, _: say(f"  {variant.title}: starting, {seconds:.0f} s"),
        )
        self.note(server)
        return server

    def note(self, server: ServerProcess) -> None:
        """Remember processes and segments of a server, e.g. before some of them are killed."""
        server.record_processes()
        self._segments.setdefault(server.port, set()).update(mapped_segments(server))

    def stop(self, server: ServerProcess) -> None:
        """End it, whatever state it is in, and remove what it left."""
        if server.poll() is None:
            self.note(server)
        server.stop()
        for segment in self._segments.pop(server.port, ()):
            segment.unlink(missing_ok=True)
        self._running.pop(server.port, None)

    def collectives(self, server: ServerProcess) -> Collectives:
        """What the ranks use, told by what they have mapped."""
        if any(OUR_SEGMENT in _maps(mark.pid) for mark in server.processes):
            return Collectives.OURS
        shared = any("cpushm" in segment.name for segment in self._segments[server.port])
        return Collectives.SHARED_MEMORY if shared else Collectives.GLOO


def pause(server: ServerProcess, *, stopped: bool) -> None:
    """SIGSTOP or SIGCONT every process of the server: an idle one still wakes its gloo threads 100 times a second."""
    server.record_processes()
    for mark in server.processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(mark.pid, signal.SIGSTOP if stopped else signal.SIGCONT)


def cpu_s(server: ServerProcess) -> float:
    """CPU seconds that the server's living processes have used so far."""
    total = 0.0
    for mark in server.processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(mark.pid).cpu_times()
            total += times.user + times.system
    return total
