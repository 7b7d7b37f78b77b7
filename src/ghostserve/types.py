"""The nouns that every part shares. Knows no process, no bytes and no vLLM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Self, TypeVar

T = TypeVar("T")

STEPS_IN_FLIGHT_MAX = 3
"""Steps that may be sent and not accepted yet, at most: what is kept of past steps must reach so far back."""


class Phase(Enum):
    """One phase of a recovery; the same names in code, metrics and the page."""

    DETECT = "detect"  # from the loss to its being noticed
    FENCE = "fence"  # the lost are SIGKILLed, the epoch is raised
    LEAVE = "leave"  # survivors leave the broken collective
    SPAWN = "spawn"  # a process takes the rank
    REGROUP = "regroup"  # process groups are formed anew
    WEIGHTS = "weights"  # the newcomer has its weights
    STATE = "state"  # request state and RNG are as before the step
    KV = "kv"  # the lost KV is back
    RETRY = "retry"  # the interrupted step has run again


class RecoveryPath(Enum):
    """How the lost KV came back."""

    REBUILD = "rebuild"  # from mirrors, or survivors and parity
    RECOMPUTE = "recompute"  # at least one request was recomputed from its tokens
    RESTART = "restart"  # the engine was restarted


class RecoveryOutcome(Enum):
    """How a recovery ended."""

    RECOVERED = "recovered"
    STEP_FAILED = "step_failed"  # the group is whole; the requests of the interrupted step got an error
    GIVEN_UP = "given_up"  # the server ends with exit status 4


class FailureKind(Enum):
    """What went wrong, as far as it can be told from outside."""

    CRASH = "crash"  # a rank's process ended
    OOM = "oom"  # a rank's process ended as the kernel killed one for its memory
    HANG = "hang"  # a rank made no progress, or gave no answer, within its deadline
    SLOW = "slow"  # a rank began to hold the others up; replaced only with --evict-slow
    RAISED = "raised"  # a step raised, all ranks alive
    CORRUPTION = "corruption"  # bytes differed from their checksum: KV, a mirror or a parity
    KEEPER = "keeper"  # the keeper's process ended
    STANDBY = "standby"  # a standby ended, or did not start


class RankState(Enum):
    """What others may expect of a rank."""

    STARTING = "starting"  # loading; takes no step
    ALIVE = "alive"  # takes part in steps
    LOST = "lost"  # given up; whatever it still says is ignored


class ServerState(Enum):
    """What a client may expect of the server."""

    STARTING = "starting"
    SERVING = "serving"
    RECOVERING = "recovering"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision(Generic[T]):
    """A choice with its reason, so that the reason can be logged where the choice is used."""

    choice: T
    reason: str


class Closing(ABC):
    """What is closed at the end of a `with` block."""

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
