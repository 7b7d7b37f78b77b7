"""Every metric of ours: name, kind, meaning, and how it is read off the control page.

Names and labels follow Prometheus: base units, `_total` for what only grows, and no label whose values a client or a
request decides. Every series is there from the first scrape on. Gauges are as old as the engine core's last word on the
page: a quarter of a second, two at most when there is much to count, longer if it hangs (`ghostserve_state_age_seconds`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ghostserve.arena.ledger import Histogram, Ledger
from ghostserve.types import FailureKind, Phase, RecoveryOutcome, RecoveryPath, ServerState
from ghostserve.web.weights_pool import PoolReading
from ghostserve.weights.pool_types import ImageKind, PoolStats

WORKER_STATES = ("starting", "alive", "slow", "suspect", "lost")
PATHS = (RecoveryPath.REBUILD, RecoveryPath.RECOMPUTE)  # a restart ends the process, and its metrics with it

Value = float | Histogram
Series = Iterable[tuple[tuple[str, ...], Value]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The page at one moment."""

    state: Mapping[str, Any]  # the state document; empty before there is one
    counters: Mapping[str, int]
    ledger: Ledger
    keeper_pid: int | None
    keeper_given_up: bool
    now_s: float
    pool: PoolReading = field(default_factory=PoolReading)

    @property
    def shadow(self) -> Mapping[str, Any]:
        shadow: Mapping[str, Any] = self.state.get("shadow") or {}
        return shadow

    @property
    def standbys(self) -> list[Mapping[str, Any]]:
        return list(self.state.get("standbys") or ())


@dataclass(frozen=True, slots=True)
class Metric:
    """One family; `read` gives label values and value of each of its series."""

    name: str  # of a counter with its _total
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    read: Callable[[Snapshot], Series]
    labels: tuple[str, ...] = ()


def _counted(*names: str) -> Callable[[Snapshot], Series]:
    """The sum of counters of the page."""
    return lambda page: [((), float(sum(page.counters[name] for name in names)))]


def _plain(value: Callable[[Snapshot], float | None]) -> Callable[[Snapshot], Series]:
    return lambda page: [((), float(value(page) or 0))]


def _info(page: Snapshot) -> Series:
    named = (page.state.get(name, "") for name in ("version", "vllm", "torch"))
    protected = (page.shadow.get(name, "") for name in ("protection", "parity_shards"))
    yield tuple(str(value) for value in (*named, *protected)), 1.0


def _server_states(page: Snapshot) -> Series:
    now = page.state.get("state", ServerState.STARTING.value)
    for state in ServerState:
        yield (state.value,), float(state.value == now)


def worker_state(rank: Mapping[str, Any]) -> str:
    """One word for what the state document says of a rank."""
    if rank["state"] != "alive":
        return str(rank["state"])
    health = str(rank.get("health", "alive"))
    return "lost" if health == "dead" else health


def _worker_states(page: Snapshot) -> Series:
    for rank in page.state.get("ranks") or ():
        now = worker_state(rank)
        for state in WORKER_STATES:
            yield (str(rank["rank"]), state), float(state == now)


def _state_age_s(page: Snapshot) -> float:
    return max(0.0, page.now_s - float(page.state.get("written_at_s", page.now_s)))


def _failures(page: Snapshot) -> Series:
    found = (
        "scrub_kv_mismatches_total",
        "scrub_mirror_mismatches_total",
        "scrub_parity_mismatches_total",
        "checksum_refusals_total",
    )
    for kind in FailureKind:
        count = page.ledger.failures(kind)
        if kind is FailureKind.CORRUPTION:  # counted where it is found, by whichever process
            count += sum(page.counters[name] for name in found)
        yield (kind.value,), float(count)


def _recoveries(page: Snapshot) -> Series:
    for path in PATHS:
        for outcome in RecoveryOutcome:
            yield (path.value, outcome.value), float(page.ledger.recoveries(path, outcome))


def _phases(page: Snapshot) -> Series:
    for phase in Phase:
        yield (phase.value,), page.ledger.histogram(phase)


def _nonfinite(page: Snapshot) -> Series:
    for kind in ("nan", "inf"):
        yield (kind,), float(page.counters[f"kv_{kind}_total"])


def _pool(value: Callable[[PoolStats], float]) -> Callable[[Snapshot], Series]:
    """0 without a holder."""
    return lambda page: [((), 0.0 if page.pool.stats is None else float(value(page.pool.stats)))]


def _pool_kinds(what: str) -> Callable[[Snapshot], Series]:
    """A gauge by kind of image."""

    def read(page: Snapshot) -> Series:
        for kind in ImageKind:
            yield (
                (kind.value,),
                0.0 if page.pool.stats is None else float(getattr(page.pool.stats, what)[kind]),
            )

    return read


def _pool_counts(what: str) -> Callable[[Snapshot], Series]:
    """A counter by kind of image."""
    return lambda page: [((kind.value,), float(getattr(page.pool.counts[kind], what))) for kind in ImageKind]


METRICS: tuple[Metric, ...] = (
    # -- the server --------------------------------------------------------------------------------------
    Metric("ghostserve_info", "gauge", "Always 1; versions and kind of protection as labels.", _info,
           ("version", "vllm", "torch", "protection", "parity_shards")),
    Metric("ghostserve_server_state", "gauge", "1 for the state that the server is in, 0 for the others.",
           _server_states, ("state",)),
    Metric("ghostserve_worker_state", "gauge", "1 for the state that a rank is in, 0 for the others.",
           _worker_states, ("rank", "state")),
    Metric("ghostserve_state_age_seconds", "gauge", "Time since the engine core last wrote its state; above 10 it hangs.",
           _plain(_state_age_s)),
    Metric("ghostserve_longest_quiet_seconds", "gauge",
           "Longest time without progress in a step after which a rank went on by itself.",
           _plain(lambda page: page.state.get("longest_quiet_s"))),
    Metric("ghostserve_epoch", "gauge", "Raised at each loss, and at each step that raised.",
           _plain(lambda page: page.state.get("epoch"))),
    Metric("ghostserve_steps_total", "counter", "Engine steps that were accepted.", _counted("steps_total")),
    # -- failures and recoveries -------------------------------------------------------------------------
    Metric("ghostserve_failures_total", "counter", "What went wrong, once per process, step or place concerned.",
           _failures, ("kind",)),
    Metric("ghostserve_recoveries_total", "counter", "Recoveries that ended, by how lost KV came back and how they ended.",
           _recoveries, ("path", "outcome")),
    Metric("ghostserve_recovery_seconds", "histogram", "Time of each phase of each recovery; phases that did not run are not in it.",
           _phases, ("phase",)),
    Metric("ghostserve_outage_seconds", "histogram", "Time of each whole recovery, from the loss being noticed to the step having run again.",
           lambda page: [((), page.ledger.histogram(None))]),
    Metric("ghostserve_requests_resumed_total", "counter", "Requests that ran when a recovery began and went on after it.",
           _counted("requests_resumed_total")),
    Metric("ghostserve_requests_recomputed_total", "counter", "Requests whose context was computed again from their tokens.",
           _counted("requests_recomputed_total")),
    Metric("ghostserve_requests_failed_total", "counter", "Requests that got an error since their step raised again and again.",
           _counted("requests_failed_total")),
    Metric("ghostserve_tokens_recomputed_total", "counter", "Tokens whose KV was computed again after a loss; not those of the step that is retried.",
           _counted("tokens_recomputed_total")),
    Metric("ghostserve_kv_rebuilt_bytes_total", "counter", "KV that came back from mirrors, or from other ranks and parity.",
           _counted("kv_bytes_rebuilt_total")),
    # -- what is protected -------------------------------------------------------------------------------
    Metric("ghostserve_protected_tokens", "gauge",
           "Tokens whose KV can be restored on a lost rank, of running requests and of the prefix cache (once per KV cache group).",
           _counted("protected_tokens")),
    Metric("ghostserve_shadow_lag_tokens", "gauge",
           "Tokens whose KV is written by steps that are not accepted yet: not restorable, and shown to nobody.",
           _counted("shadow_lag_tokens")),
    Metric("ghostserve_unprotected_tokens", "gauge",
           "Tokens whose KV is in the workers only: after a loss they are computed again (once per KV cache group).",
           _counted("unprotected_tokens")),
    Metric("ghostserve_parity_bytes", "gauge", "Host memory that holds parity.", _counted("parity_bytes")),
    Metric("ghostserve_mirror_bytes", "gauge", "Host memory that holds mirrors.", _counted("mirror_bytes")),
    Metric("ghostserve_host_budget_bytes", "gauge", "Host memory that protection may use (--host-memory).",
           _plain(lambda page: page.shadow.get("budget_bytes"))),
    Metric("ghostserve_host_used_bytes", "gauge", "Host memory behind the arena now: parity, mirrors, staging, and frames that wait to be wiped.",
           _counted("host_used_bytes")),
    Metric("ghostserve_encode_bytes_total", "counter", "KV that the keeper has encoded.", _counted("encode_bytes_total")),
    Metric("ghostserve_encode_backlog_blocks", "gauge", "Blocks that are whole and not encoded yet; their mirrors protect them.",
           _counted("encode_backlog")),
    Metric("ghostserve_shadow_errors_total", "counter", "Errors inside protection; what they concerned went on unprotected.",
           _counted("shadow_errors_total")),
    # -- corruption --------------------------------------------------------------------------------------
    Metric("ghostserve_scrub_bytes_total", "counter", "KV, mirrors and parity that the scrub compared with their checksums.",
           _counted("scrubbed_bytes_total")),
    Metric("ghostserve_scrub_mismatch_total", "counter", "Blocks of KV, mirrors and parities that the scrub found to differ from their checksum.",
           _counted("scrub_kv_mismatches_total", "scrub_mirror_mismatches_total", "scrub_parity_mismatches_total")),
    Metric("ghostserve_scrub_repaired_total", "counter", "Of the mismatches, those made right in place.", _counted("scrub_repaired_total")),
    Metric("ghostserve_scrub_refused_total", "counter", "Of the mismatches, those given up: recomputed or protected anew.",
           _counted("scrub_refused_total")),
    Metric("ghostserve_checksum_refusals_total", "counter", "Mirrors and rebuilt blocks refused since their checksum did not hold.",
           _counted("checksum_refusals_total")),
    Metric("ghostserve_kv_nonfinite_total", "counter", "Elements of encoded KV that are no number.", _nonfinite, ("kind",)),
    # -- processes ---------------------------------------------------------------------------------------
    Metric("ghostserve_keeper_up", "gauge", "1 while there is a keeper process.", _plain(lambda page: page.keeper_pid is not None)),
    Metric("ghostserve_keeper_given_up", "gauge", "1 while the keeper is left alone for a minute, having died too often.",
           _plain(lambda page: page.keeper_given_up)),
    Metric("ghostserve_keeper_restarts_total", "counter", "Times that the keeper was started again.", _counted("keeper_restarts")),
    Metric("ghostserve_standby_ready", "gauge", "Standbys that wait to take a lost rank's place.",
           _plain(lambda page: sum(standby.get("state") == "ready" for standby in page.standbys))),
    Metric("ghostserve_standby_wanted", "gauge", "Standbys that are to be kept (--standbys).",
           _plain(lambda page: page.state.get("standbys_wanted"))),
    Metric("ghostserve_standby_memory_bytes", "gauge", "Memory that would be free without the standbys; measured every minute.",
           _plain(lambda page: sum(standby.get("memory_bytes", 0) for standby in page.standbys))),
    # -- weights in host memory ------------------------------------------------------------------------------
    Metric("ghostserve_weights_pool_up", "gauge", "1 while there is a holder of weights in host memory and it answers; without one loads read the disk.",
           _plain(lambda page: page.pool.stats is not None)),
    Metric("ghostserve_weights_pool_bytes", "gauge", "Host memory of weights files, and of the ranks' parameters as they are after loading, of all servers of this user.",
           _pool_kinds("bytes"), ("kind",)),
    Metric("ghostserve_weights_pool_entries", "gauge", "How many of them there are.", _pool_kinds("entries"), ("kind",)),
    Metric("ghostserve_weights_pool_budget_bytes", "gauge", "Host memory that they may use together (--weights-memory).",
           _pool(lambda stats: stats.budget_bytes)),
    Metric("ghostserve_weights_pool_referenced_bytes", "gauge", "Of that, what processes are using or filling now: it is not evicted.",
           _pool(lambda stats: stats.referenced_bytes)),
    Metric("ghostserve_weights_pool_pinned_bytes", "gauge", "Of that, what is pinned.", _pool(lambda stats: stats.pinned_bytes)),
    Metric("ghostserve_weights_pool_hits_total", "counter", "Loads that found their bytes in host memory.",
           _pool_counts("hits"), ("kind",)),
    Metric("ghostserve_weights_pool_misses_total", "counter", "Loads that had to read them, and left them there.",
           _pool_counts("misses"), ("kind",)),
    Metric("ghostserve_weights_pool_evictions_total", "counter", "Entries that gave way to others.", _pool_counts("evictions"), ("kind",)),
    Metric("ghostserve_weights_pool_abandoned_total", "counter", "Entries whose filler died or gave up; the next one that waits starts over.",
           _pool_counts("abandoned"), ("kind",)),
    Metric("ghostserve_weights_pool_refusals_total", "counter", "Loads that went without the pool: larger than its budget, all of it in use, memory short.",
           lambda page: [((why.value,), float(count)) for why, count in page.pool.refusals.items()], ("reason",)),
    Metric("ghostserve_faults_injected_total", "counter", "Injected faults that have struck in a step; 0 in production.",
           _counted("faults_struck_total")),
)  # fmt: skip
