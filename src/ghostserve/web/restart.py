"""`POST /ghostserve/measure-restart`: what it costs to start this server anew, measured by starting a second one.

Knows how it is asked for and shown; who starts servers is in `cli/restart_cost.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import APIRouter, HTTPException, params

from ghostserve.web.injection import NotNow


class RestartCost(Protocol):
    """Measures in the background. Every call returns at once; any thread may make it."""

    def start(self) -> None:
        """Begin; raises NotNow if it is under way, or the machine has no room for it."""

    def describe(self) -> dict[str, Any]:
        """`{"state": "none" | "running" | "done" | "failed", "elapsed_s", "seconds", "reason"}`; the last result stays."""


def add_restart(
    router: APIRouter, cost: RestartCost | None, *, dependencies: Sequence[params.Depends]
) -> None:
    """The route. `cost` None: this server cannot start another one of itself."""

    @router.post("/ghostserve/measure-restart", dependencies=dependencies, status_code=202)
    def measure() -> dict[str, Any]:
        if cost is None:
            raise HTTPException(409, "this server cannot start another one of itself")
        try:
            cost.start()
        except NotNow as error:
            raise HTTPException(409, str(error)) from None
        return cost.describe()
