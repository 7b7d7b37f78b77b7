"""When to tell that KV is unprotected, and that it no longer is. Pure.

Blocks lose their copy for want of memory many times per second, and get it back within steps. What an operator wants to know is
since when there are any at all, so an episode is told once: it ends when there were none for CALM_S, and the next one
begins PAUSE_S after it at the earliest.
"""

from __future__ import annotations

from ghostserve.events.kinds import Event, KvProtected, KvUnprotected

SETTLE_S = 1.0  # a single step that could not be mirrored is caught up on sooner
CALM_S = 10.0
PAUSE_S = 60.0


class Shortage:
    """Asked a few times per second."""

    def __init__(self) -> None:
        self._told = False
        self._since_s: float | None = None  # for how long it has been otherwise than told
        self._not_before_s = 0.0

    def look(self, now_s: float, *, unprotected_blocks: int, memory_is_full: bool) -> Event | None:
        """What is to be told now."""
        if bool(unprotected_blocks) == self._told:
            self._since_s = None
            return None
        if self._since_s is None:
            self._since_s = now_s
        lasted_s = now_s - self._since_s
        if self._told:
            if lasted_s < CALM_S:
                return None
            self._told, self._since_s, self._not_before_s = False, None, now_s + PAUSE_S
            return KvProtected()
        if lasted_s < SETTLE_S or now_s < self._not_before_s:
            return None
        self._told, self._since_s = True, None
        reason = (
            "--host-memory is full" if memory_is_full else "they lost their copy, and steps catch up on them"
        )
        return KvUnprotected(blocks=unprotected_blocks, reason=reason)
