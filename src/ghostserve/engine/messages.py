"""What crosses between the engine core and its ranks over vLLM's message ring. Frozen, and pickled as is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ghostserve.shadow.packed_pieces import PackedPieces


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMessage:
    """Run one step. `scheduler_output` is vLLM's own; `pieces` says what to mirror once it has run.

    `sample_at_once`: sample its tokens, too, and answer with them alone. Otherwise a SampleMessage follows.
    """

    epoch: int
    step: int
    scheduler_output: Any
    pieces: PackedPieces
    sample_at_once: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleMessage:
    """Sample the tokens of a step that has run."""

    epoch: int
    step: int
    grammar_output: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLeft:
    """A rank's answer where it did not finish a step for a reason that is not its own: a peer, or the epoch."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaGeometry:
    """How the arena is cut up; known once every rank's KV layout is."""

    frame_bytes: int
    frames: int
    staging_ring: int
    staging_record_bytes: int
    layout_fingerprint: str
    parity_shards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLayout:
    """What a rank says of its KV memory."""

    rank: int
    pid: int
    fingerprint: str
    frame_bytes: int
    block_sizes: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    kv_bytes: int
    num_blocks: int
    element: str  # what the KV consists of, by torch's name; "" if not of one kind of number


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSnapshot:
    """One request as every worker knew it before the step that failed.

    `new_data` is the NewRequestData it was introduced with; `in_batch` tells whether it occupies a row. It has
    KV of `computed_tokens` as its last step began, of `reached_tokens` now. Model Runner V2 only: the
    `prefill_tokens` it was (re)started with, and whether it was forgotten, being `preempted`.
    """

    new_data: Any
    block_ids: tuple[list[int], ...]
    computed_tokens: int
    reached_tokens: int
    output_token_ids: list[int]
    prefill_tokens: int | None
    in_batch: bool
    preempted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMessage:
    """Roll every rank to the same request state. `requests` are in row order; `random_state` is a
    `RandomState.encode()` record, or None to keep each rank's own (a negative control)."""

    epoch: int
    requests: list[RequestSnapshot]
    random_state: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """Counted by the process that wrote the bytes."""

    blocks_from_mirrors: int
    blocks_from_parity: int
    bytes_rebuilt: int
    refused: tuple[int, ...]  # blocks whose checksum did not hold
    different_blocks: tuple[
        int, ...
    ] = ()  # only with the debug copy: written slots that differ from the lost


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What a rank did about one wrong block: where it differed, or why it could not be put right."""

    ok: bool
    layers: tuple[str, ...] = ()
    slots: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegroupMessage:
    """To survivors: form the groups anew at `init_method`, once the newcomers have come that far."""

    init_method: str
    epoch: int
    newcomers: frozenset[int]
    start_timeout_s: float
    rendezvous_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinMessage:
    """A newcomer's start-up after its groups and weights: what the survivors did when the server started."""

    newcomers: frozenset[int]
    kv_cache_configs: list[Any]
    geometry: ArenaGeometry | None
    warm_up: bool
