"""What the machine has to give: memory, shared memory, open files, a port, room for caches."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil

from ghostserve.cli.doctor_checks import Finding, Subject, fail, ok, warn
from ghostserve.cli.units import bytes_text
from ghostserve.engine.leftovers import run_root
from ghostserve.engine.settings import STANDBY_NEEDS_BYTES, Settings, memory_limit_bytes
from ghostserve.engine.unix_socket import is_stale
from ghostserve.errors import UsageError
from ghostserve.weights.cache_home import user_home

CGROUP = Path("/sys/fs/cgroup/memory.max")
SHARED_MEMORY = Path("/dev/shm")
QUEUE_BYTES = 10 * (16 << 20)  # vLLM's message queue: chunks times VLLM_MQ_MAX_CHUNK_BYTES_MB
QUEUE_LEAST_BYTES = 32 << 20
OPEN_FILES, OPEN_FILES_LEAST = (
    65535,
    1024,
)  # what vLLM raises its own limit to; what a small server gets by with
PROCESSES_BYTES, RANK_BYTES = (
    1536 << 20,
    256 << 20,
)  # front, engine core, fork server, keeper, standby; and each rank
UDS_BYTES_MAX = 107  # of a Unix socket's path
CACHE_BYTES, CACHE_LEAST_BYTES = 2 << 30, 64 << 20


def check_memory(subject: Subject, *, cgroup: Path = CGROUP) -> list[Finding]:
    """The budget for the shadow, and what else is known to need memory, against the limit."""
    if subject.config.protection == "none":
        return [ok("memory", "--protection none: no shadow is kept")]
    limit = memory_limit_bytes(cgroup)
    try:
        budget = Settings(config=subject.config).memory_budget_bytes(available=limit)
    except UsageError as error:
        return [fail("memory", str(error), "give a smaller --host-memory, or raise the limit")]
    weights = weights_bytes(subject.model_directory)
    kv = subject.ranks * (subject.kv_cache_bytes or 0)
    processes = PROCESSES_BYTES + subject.ranks * RANK_BYTES
    need = budget + weights + kv + processes
    found = (
        f"{bytes_text(need)} of {bytes_text(limit)}: at most {bytes_text(budget)} shadow, "
        f"{bytes_text(weights)} weights, {bytes_text(kv)} KV cache as given, about {bytes_text(processes)} processes"
    )
    if need > limit:
        return [warn("memory", found, "raise the limit, or lower --host-memory or --kv-cache-memory-bytes")]
    return [ok("memory", found)]


def weights_bytes(directory: Path | None) -> int:
    """The size of a model's weights on disk; 0 where it is not known."""
    if directory is None:
        return 0
    for pattern in ("*.safetensors", "*.bin"):
        if sizes := [path.stat().st_size for path in directory.glob(pattern)]:
            return sum(sizes)
    return 0


def check_standby(subject: Subject, *, available_bytes: int | None = None) -> list[Finding]:
    """Whether one will wait: it saves the time in which a process starts."""
    asked = subject.config.standbys
    if asked == 0 or subject.config.protection == "none":
        return [ok("standbys", "none, as asked for")]
    available = int(psutil.virtual_memory().available) if available_bytes is None else available_bytes
    if available >= STANDBY_NEEDS_BYTES:
        return [ok("standbys", f"{asked or 1}; {bytes_text(available)} are available")]
    found = f"{bytes_text(available)} are available, and {bytes_text(STANDBY_NEEDS_BYTES)} are wanted"
    if asked:
        return [
            warn("standbys", f"{found}: {asked} are started all the same", "free memory or ask for fewer")
        ]
    return [
        warn("standbys", f"{found}: none will wait", "free memory; without one a recovery takes 0.2 s longer")
    ]


def check_shared_memory(subject: Subject, *, directory: Path = SHARED_MEMORY) -> list[Finding]:
    """vLLM's message queues live in /dev/shm; the shadow does not."""
    if not directory.is_dir():
        remedy = "mount a tmpfs there (Docker: --shm-size, Kubernetes: an emptyDir of medium Memory)"
        return [fail("shared memory", f"{directory} is missing", remedy)]
    free, want = shutil.disk_usage(directory).free, (subject.ranks + 1) * QUEUE_BYTES
    found = f"{bytes_text(free)} free in {directory}, at most {bytes_text(want)} needed"
    remedy = f"make it larger (Docker: --shm-size={want >> 20}m, Kubernetes: sizeLimit of the emptyDir)"
    if free < QUEUE_LEAST_BYTES:
        return [fail("shared memory", found, remedy)]
    return [ok("shared memory", found)] if free >= want else [warn("shared memory", found, remedy)]


def check_open_files(_subject: Subject) -> list[Finding]:
    """A descriptor per connection, and some dozens per process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else hard
    found = f"{soft}, may be raised to {'any number' if hard == resource.RLIM_INFINITY else hard}"
    remedy = f"ulimit -n {OPEN_FILES} (systemd: LimitNOFILE, Docker: --ulimit nofile)"
    if allowed < OPEN_FILES_LEAST:
        return [fail("open files", found, remedy)]
    return [ok("open files", found)] if allowed >= OPEN_FILES else [warn("open files", found, remedy)]


def check_port(subject: Subject) -> list[Finding]:
    """Bind as the server will, and let go."""
    if subject.uds is not None:
        return [_unix_socket(subject.uds)]
    name, place = "port", f"{subject.host}:{subject.port}"
    if not 0 <= subject.port <= 65535:
        return [fail(name, f"{subject.port} is no port", "give --port 1 to 65535")]
    family = socket.AF_INET6 if ":" in subject.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((subject.host, subject.port))
            probe.listen(1)
        except OSError as error:
            remedies = {
                errno.EADDRINUSE: "stop what listens there, or give another --port",
                errno.EACCES: "give a --port from 1024 on",
            }
            remedy = remedies.get(error.errno or 0, "give a --host that is an address of this machine")
            return [fail(name, f"cannot listen on {place}: {error.strerror or error}", remedy)]
    return [ok(name, f"{place} is free")]


def _unix_socket(path: str) -> Finding:
    """A file that is there is in the way, unless a killed server left it: that one is removed by the next."""
    folder = Path(path).absolute().parent
    if len(os.fsencode(path)) > UDS_BYTES_MAX:
        return fail("port", f"--uds {path}: longer than {UDS_BYTES_MAX} bytes", "give a shorter path")
    if not os.access(folder, os.W_OK | os.X_OK):
        return fail("port", f"--uds {path}: cannot write to {folder}", "make the folder, or name another")
    if os.path.lexists(path) and not is_stale(path):
        return fail(
            "port",
            f"--uds {path} is there, and in use or no socket",
            "stop what listens there, or give another path",
        )
    return ok("port", f"{path} can be bound")


def check_disk(_subject: Subject, *, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Room, and the right to write, where caches, sockets and logs go."""
    cache = Path(environment.get("XDG_CACHE_HOME") or user_home() / ".cache")
    places = {
        "vLLM's cache": Path(environment.get("VLLM_CACHE_ROOT") or cache / "vllm"),
        "temporary files": Path(tempfile.gettempdir()),
        "run directory": run_root(),
    }
    return [_room(name, path, least=CACHE_BYTES if "cache" in name else 0) for name, path in places.items()]


def _room(name: str, path: Path, *, least: int) -> Finding:
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    free, name = shutil.disk_usage(there).free, f"disk: {name}"
    found = f"{bytes_text(free)} free in {path}"
    if not os.access(there, os.W_OK | os.X_OK):
        return fail(name, f"{there} cannot be written to", "give it to the user that serves, or name another")
    if free < CACHE_LEAST_BYTES:
        return fail(name, found, "make room: a server writes compiled graphs, sockets and logs there")
    if free < least:
        return warn(name, found, f"make room: compiled graphs may take {bytes_text(least)}")
    return ok(name, found)
