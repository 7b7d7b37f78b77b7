"""The names on the control page. Their order is their place there: append, and raise `control.VERSION`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum, auto


class Counter(IntEnum):
    """A u64 on the control page. `..._total` only grows; the others are what is true now."""

    STEPS_TOTAL = 0
    RECOVERIES_TOTAL = auto()
    FAILURES_TOTAL = auto()
    BLOCKS_SEALED = auto()
    BLOCKS_CODED = auto()
    BLOCKS_MIRRORED = auto()
    BLOCKS_UNPROTECTED = auto()
    FRAMES_TOTAL = auto()
    FRAMES_USED = auto()
    FRAME_BYTES = auto()
    PARITY_BYTES = auto()
    MIRROR_BYTES = auto()
    PROTECTED_TOKENS = auto()
    KV_BYTES_PROTECTED = auto()
    ENCODE_BACKLOG = auto()
    ENCODE_BYTES_TOTAL = auto()
    KEEPER_RESTARTS = auto()
    KV_BLOCKS_FROM_PARITY_TOTAL = auto()
    KV_BLOCKS_FROM_MIRRORS_TOTAL = auto()
    KV_BYTES_REBUILT_TOTAL = auto()
    TOKENS_RECOMPUTED_TOTAL = auto()
    REQUESTS_RECOMPUTED_TOTAL = auto()
    REQUESTS_FAILED_TOTAL = auto()
    SHADOW_ERRORS_TOTAL = auto()
    CHECKSUM_REFUSALS_TOTAL = auto()
    BLOCKS_COMPARED_TOTAL = auto()  # restored blocks compared with the debug copy of what was lost
    BLOCKS_DIFFERENT_TOTAL = auto()
    REQUESTS_OPEN = auto()  # known to the scheduler: waiting or running
    FAULTS_STRUCK_TOTAL = auto()  # injected faults that were armed and have struck
    SCRUBBED_BYTES_TOTAL = auto()  # read by the scrub and compared with a checksum: KV, mirrors, parity
    SCRUBBED_BLOCKS_TOTAL = auto()  # each time a block's KV, mirrors or parity were compared
    SCRUB_KV_MISMATCHES_TOTAL = auto()  # live KV of one block on one rank
    SCRUB_MIRROR_MISMATCHES_TOTAL = auto()  # frames
    SCRUB_PARITY_MISMATCHES_TOTAL = auto()  # frames
    SCRUB_REPAIRED_TOTAL = auto()  # of those: made right again, with their checksum as the proof
    SCRUB_REFUSED_TOTAL = auto()  # of those: given up; what was in the block is recomputed or protected anew
    KV_NAN_TOTAL = auto()  # elements of KV that were coded
    KV_INF_TOTAL = auto()
    EVENTS_LOST_TOTAL = auto()  # overwritten in shared memory before the front process took them in
    EVENT_LOG_ERRORS_TOTAL = auto()  # times that --event-log could not be written; tried again each second
    SHADOW_LAG_TOKENS = auto()  # written by steps that are not accepted yet
    UNPROTECTED_TOKENS = auto()  # in live KV, and nowhere else
    REQUESTS_RESUMED_TOTAL = auto()  # ran when a recovery began, and went on after it
    HOST_USED_BYTES = auto()  # memory behind the arena, of what the budget bounds


class Switch(IntEnum):
    """A run-time switch, off at start; for tests, negative controls and the demo."""

    SKIP_RESTORE = 0  # a newcomer's KV stays empty: the negative control
    DEBUG_COPY = auto()  # every rank keeps a copy of its KV in the debug segment, to compare with
    FORCE_RECOMPUTE = auto()  # a loss is answered by rung 3 even where it could be rebuilt
    SKIP_RNG_RESTORE = auto()  # a newcomer's random-number states stay as they are
    SKIP_CHECKSUM = auto()  # what is restored is not checked
    STOCK_GENERATORS = auto()  # seeded requests in a prompt chunk meet the sampler as in stock vLLM
    SKIP_SCRUB = auto()  # nothing is scrubbed


class Mark(IntEnum):
    """A moment in the start of a worker process."""

    PROCESS_STARTED = 0
    IMPORTS_DONE = auto()
    GROUPS_READY = auto()
    WEIGHTS_LOADED = auto()
    KV_READY = auto()


class StampStatus(IntEnum):
    """How far a rank is with the step that its stamp names."""

    NONE = 0  # it never stamped
    BEGUN = auto()  # it took the step; nothing that the step stages may be used yet
    STAGED = auto()  # the model returned and the step's mirrors are in the arena; not sampled yet
    DONE = auto()  # it finished the step: its share of the acceptance
    FAILED = auto()  # the step raised there; it refuses further steps until it was re-formed
    PEER_LEFT = auto()  # the step failed there because a peer had left the collective; else as FAILED


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """A rank's last word about a step; `at_s` is monotonic time."""

    epoch: int
    step: int
    status: StampStatus
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a rank is, as its collectives and its worker note it. Sums are over the life of its process."""

    met: int  # rounds of collectives begun since the groups were formed; equal on ranks that are equally far
    waited_s: float  # spent in collectives, waiting for peers
    waiting: bool  # it waits for a peer now
    in_steps_s: float  # spent in steps, `waited_s` included
    steps: int


class FaultPoint(StrEnum):
    """Where a fault can strike."""

    BEFORE_MODEL = "before_model"
    AFTER_MODEL = "after_model"  # the forward has run, nothing of it is mirrored
    BEFORE_SAMPLE = "before_sample"
    AFTER_SAMPLE = "after_sample"
    STAGED = "staged"  # what the step wrote is mirrored; a step that wrote nothing does not come by
    BEFORE_REPLY = "before_reply"
    KEEPER_ENCODING = "keeper_encoding"  # in the keeper, with half of the parity written; rank 0
    # During a recovery, by its phases: in a survivor, a newcomer, or both.
    LEAVE = "leave"  # a survivor, told to leave the broken groups
    SPAWN = "spawn"  # a newcomer that has just taken the rank
    REGROUP = "regroup"  # either, about to form the groups anew
    WEIGHTS = "weights"  # a newcomer, about to load its weights
    STATE = "state"  # either, about to roll its requests back
    EXPORT = "export"  # a survivor, about to share live KV
    ADOPT = "adopt"  # a newcomer, about to take KV over
    RETRY = "retry"  # either, about to run the first step of the new epoch
    PLANNING = "planning"  # in the engine core, about to plan what a step mirrors; rank 0
    SCHEDULED = "scheduled"  # in the engine core, with a step chosen and not sent yet; rank 0


class FaultAction(StrEnum):
    """What strikes there."""

    KILL = "kill"  # SIGKILL to itself
    RAISE = "raise"  # an exception
    HANG = "hang"  # SIGSTOP to itself: no thread of it runs any more
    CORRUPT_PARITY = (
        "corrupt_parity"  # of all parity shards but the last (or of the only one), after the checksum
    )
    CORRUPT_MIRROR = "corrupt_mirror"  # a byte of a mirror is flipped once its checksum is taken
    CORRUPT_KV = "corrupt_kv"  # the sign bits of a block that the step wrote to are flipped in this rank's KV
    SEGFAULT = "segfault"  # a read of address 0
    SPIN = "spin"  # the interpreter's lock is held and never given back
    BLOCKED = "blocked"  # this rank enters a collective that no other enters
    SLOW = "slow"  # the step takes `argument` times as long
    OOM = "oom"  # the kernel kills it for using more than its memory cgroup has
    FAIL_STAGING = "fail_staging"  # the arena refuses what the step would mirror on this rank
    TAKE_FRAMES = "take_frames"  # no frame of the pool is free while the step is planned
    PAUSE = "pause"  # no step follows this one until POST /resume, so that what comes then cannot be late


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An armed fault: at `point` of `rank`, after it was passed `skip` times, at `count` passings in a row."""

    point: FaultPoint
    rank: int
    action: FaultAction
    skip: int = 0
    argument: int = (
        0  # SLOW: how many times slower; CORRUPT_KV: 1: and it ends by SIGKILL, before anybody reads it
    )
    count: int = 1  # 0: each time, until it is disarmed
