"""What becomes of a step that raised with all ranks alive (REVIEW F13); pure."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from ghostserve.types import Decision


class AfterRaise(Enum):
    """What becomes of a step that raised."""

    RETRY = "retry"
    FENCE = "fence"  # replace the one rank that raised each time, and retry
    FAIL = "fail"


def after_raise(raises: Sequence[frozenset[int]], *, retries: int, may_fence: bool) -> Decision[AfterRaise]:
    """`raises`: who raised, for each try of this step, the last one included."""
    if len(raises) <= retries:
        return Decision(choice=AfterRaise.RETRY, reason=f"raised {len(raises)} of {retries + 1} times")
    alone = len(raises) > 1 and len(raises[0]) == 1 and len(set(raises)) == 1
    if alone and may_fence:
        reason = f"rank {next(iter(raises[0]))} alone raised {len(raises)} times"
        return Decision(choice=AfterRaise.FENCE, reason=reason)
    return Decision(choice=AfterRaise.FAIL, reason=f"raised {len(raises)} times")
