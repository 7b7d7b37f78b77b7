"""What a user can set, in one frozen dataclass; the command line is derived from it.

Processes started by vLLM get it as JSON in one environment variable, so that nothing of ours enters vLLM's own
configuration (which would change its compile-cache key).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ghostserve.errors import UsageError

CONFIG_ENV = "GHOSTSERVE_CONFIG"
STANDBYS_MAX = 16
EVICTIONS_MAX = 3
EVENT_LOG_BYTES_MIN, EVENT_LOG_FILES_MAX = 4096, 1000

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip


def parse_bytes(text: str) -> int:
    """`8Gi`, `512MiB`, `2G`, `1048576`: bytes. Raises UsageError naming the value."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"{text!r} is not an amount of memory; write for example 8Gi or 512Mi")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _bytes_argument(text: str) -> int:
    """For argparse, which names the flag."""
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _option(default: Any, help: str, *, secret: bool = False, **extra: Any) -> Any:
    """A secret is neither shown nor handed to other processes."""
    return field(default=default, repr=not secret, metadata={"help": help, "secret": secret, **extra})


@dataclass(frozen=True, slots=True, kw_only=True)
class GhostConfig:
    """Options of `ghostserve serve` beside vLLM's own."""

    protection: str = _option(
        "parity",
        "what the shadow keeps: parity (mirrors of what is being written, parity of the rest), "
        "replica (mirrors of everything), or none (vLLM as it is)",
        choices=("parity", "replica", "none"),
    )
    parity_shards: int = _option(
        1, "parity shards per stripe: so many ranks may lose their KV at once", metavar="M"
    )
    host_memory: int | None = _option(
        None,
        "host memory for the whole shadow, e.g. 8Gi; never exceeded. Default: what full protection needs, at "
        "most a quarter of the machine's or cgroup's memory",
        type=_bytes_argument,
        metavar="BYTES",
    )
    weights_memory: int | None = _option(
        None,
        "host memory for weights that are kept for replacements, for the next start and for other servers of this user, "
        "e.g. 64Gi; 0: none. Default: what the process that holds them chooses",
        type=_bytes_argument,
        metavar="BYTES",
    )
    encode_backlog: int = _option(
        8, "KV blocks that may wait for the keeper in the steady state", metavar="BLOCKS"
    )
    scrub_rate: int = _option(
        parse_bytes("16Mi"),
        "bytes per second of KV, mirrors and parity that are compared with their checksums, e.g. 16Mi; KV only while "
        "nothing is served; 0 = off",
        type=_bytes_argument,
        metavar="BYTES/s",
    )
    recovery_attempts: int = _option(3, "attempts to replace a rank before the server gives up", metavar="N")
    losses_max: int = _option(
        20,
        "losses of one worker within --losses-window seconds before the server gives up instead of replacing it "
        "again and again",
        metavar="N",
    )
    losses_window: float = _option(600.0, "see --losses-max", metavar="SECONDS")
    leave_timeout: float = _option(
        10.0, "bound for survivors to leave a broken collective", metavar="SECONDS"
    )
    start_timeout: float = _option(
        120.0,
        "bound for a replacement to start, regroup and load its weights; three times the longest start so far, "
        "if that is less",
        metavar="SECONDS",
    )
    restore_timeout: float = _option(
        120.0,
        "bound for a replacement to get its KV memory; state and KV come back in messages of 20 s at most",
        metavar="SECONDS",
    )
    standbys: int | None = _option(
        None,
        "processes that wait to take a lost worker's place; each costs some 100 MB of host memory and saves 0.2 s of "
        "a recovery. Default: 1 where memory allows",
        type=int,
        metavar="K",
    )
    hang_timeout: float = _option(
        0.8,
        "a worker that makes no progress in a step for so long, and for --hang-factor times what such a step takes, "
        "is replaced; 0: only vLLM's own limit for a step holds",
        metavar="SECONDS",
    )
    hang_factor: float = _option(
        5.0, "see --hang-timeout: how many times longer than expected a step may take", metavar="K"
    )
    first_step_timeout: float = _option(
        60.0,
        "instead of --hang-timeout for the first step after the start; the first of a new size gets 12 times "
        "--hang-timeout, the first of a replacement 4 times",
        metavar="SECONDS",
    )
    slow_factor: float = _option(
        3.0, "a worker that takes K times as long as the others is shown as slow", metavar="K"
    )
    evict_slow: bool = _option(
        False,
        f"replace a worker that is slow, instead of only showing it; at most {EVICTIONS_MAX} times within --losses-window, "
        "then it is only shown. Does not count in --losses-max",
    )
    restore_cached_within: float = _option(
        0.1,
        "after a loss, how long open requests wait for KV that only the prefix cache holds, the latest used first; the "
        "rest is computed again when it is asked for. While nothing is served all of it is restored",
        metavar="SECONDS",
    )
    recovery_plan: str = _option(
        "exact",
        "after a loss: exact rebuilds all KV that can be rebuilt; fastest computes the context of a request again where "
        "that takes less time, as measured on this server (with dtypes other than float32 its further tokens may then "
        "differ from those without the loss)",
        choices=("exact", "fastest"),
    )
    stall_timeout: float = _option(
        300.0,
        "/health answers 503 once requests have waited for so long without a step being accepted; more than a recovery "
        "may take",
        metavar="SECONDS",
    )
    ready_while_recovering: float = _option(
        10.0,
        "/readyz goes on answering 200 in a recovery for so long: most are over before a load balancer would notice",
        metavar="SECONDS",
    )
    ui: bool = _option(False, "serve the live page at /ui")
    enable_fault_injection: bool = _option(
        False, "allow `ghostserve kill` and the other fault routes; for tests and demonstrations"
    )
    event_log: str | None = _option(
        None,
        "also write what `ghostserve events` shows to this file, a JSON object per line; a disk that is full does not "
        "stop the server",
        type=str,
        metavar="FILE",
    )
    event_log_max_bytes: int = _option(
        parse_bytes("64Mi"),
        "size at which --event-log begins a new file, e.g. 64Mi",
        type=_bytes_argument,
        metavar="BYTES",
    )
    event_log_files: int = _option(5, "files of --event-log that are kept, FILE, FILE.1, ...", metavar="N")
    api_key_file: str | None = _option(
        None,
        "a file with API keys, one a line: as --api-key, but not shown in the list of processes",
        type=str,
        metavar="FILE",
    )
    admin_api_key: str | None = _option(
        None,
        "the key that the fault routes want then, instead of an API key; it opens the other routes of ghostserve, too, "
        "and none of the OpenAI API (default: $GHOSTSERVE_ADMIN_API_KEY, or none)",
        secret=True,
        type=str,
        metavar="KEY",
    )
    admin_api_key_file: str | None = _option(
        None, "a file that holds the admin key", type=str, metavar="FILE"
    )
    max_body_size: int = _option(
        parse_bytes("16Mi"),
        "the longest request body, e.g. 16Mi; a longer one is answered with 413; 0 = no limit",
        type=_bytes_argument,
        metavar="BYTES",
    )
    prefix_cache_salt_per_key: bool = _option(
        True,
        "with several API keys, each has a prefix cache of its own, so that no holder of a key can find out by timing "
        "what others have asked",
    )

    def __post_init__(self) -> None:
        if self.parity_shards < 1:
            raise UsageError(
                f"--parity-shards {self.parity_shards}: at least 1 is needed, or --protection none"
            )
        if self.encode_backlog < 1:
            raise UsageError(f"--encode-backlog {self.encode_backlog}: at least 1 block is needed")
        if self.recovery_attempts < 1:
            raise UsageError(f"--recovery-attempts {self.recovery_attempts}: at least 1 is needed")
        if self.losses_max < 1:
            raise UsageError(f"--losses-max {self.losses_max}: at least 1 is needed")
        if self.standbys is not None and not 0 <= self.standbys <= STANDBYS_MAX:
            raise UsageError(f"--standbys {self.standbys}: 0 to {STANDBYS_MAX}")
        for name in (
            "leave_timeout",
            "start_timeout",
            "restore_timeout",
            "first_step_timeout",
            "losses_window",
            "stall_timeout",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0 seconds")
        if not 0 <= self.hang_timeout < math.inf:
            raise UsageError(f"--hang-timeout {self.hang_timeout}: must not be negative; 0 turns it off")
        if not 0 <= self.restore_cached_within < math.inf:
            raise UsageError(f"--restore-cached-within {self.restore_cached_within}: must not be negative")
        if self.event_log is not None and self.protection == "none":
            raise UsageError(
                "--event-log needs --protection parity or replica: without protection nothing is told"
            )
        if self.event_log_max_bytes < EVENT_LOG_BYTES_MIN:
            raise UsageError(
                f"--event-log-max-bytes {self.event_log_max_bytes}: at least {EVENT_LOG_BYTES_MIN} are needed"
            )
        if not 1 <= self.event_log_files <= EVENT_LOG_FILES_MAX:
            raise UsageError(f"--event-log-files {self.event_log_files}: 1 to {EVENT_LOG_FILES_MAX}")
        if not 0 <= self.ready_while_recovering < math.inf:
            raise UsageError(f"--ready-while-recovering {self.ready_while_recovering}: must not be negative")
        for name in ("hang_factor", "slow_factor"):
            if not 1 < getattr(self, name) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 1")

    def to_json(self) -> str:
        """For the environment of other processes, without secrets: none of them needs any."""
        items = dataclasses.fields(self)
        return json.dumps(
            {item.name: getattr(self, item.name) for item in items if not item.metadata["secret"]}
        )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> GhostConfig:
        """The configuration of the server that started this process."""
        return cls(**json.loads(environ.get(CONFIG_ENV, "{}")))

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """One flag per field, in a group of its own."""
        group = parser.add_argument_group("ghostserve")
        for item in dataclasses.fields(cls):
            flag = "--" + item.name.replace("_", "-")
            extra = {name: item.metadata[name] for name in ("choices", "metavar") if name in item.metadata}
            if item.default is False:
                group.add_argument(flag, action="store_true", help=item.metadata["help"])
            elif item.default is True:
                action = argparse.BooleanOptionalAction
                group.add_argument(flag, action=action, default=True, help=item.metadata["help"])
            else:
                kind = item.metadata.get("type", type(item.default))
                group.add_argument(flag, type=kind, default=item.default, help=item.metadata["help"], **extra)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> GhostConfig:
        """Our part of parsed arguments. Raises UsageError."""
        return cls(**{item.name: getattr(arguments, item.name) for item in dataclasses.fields(cls)})
