"""The probes: what Kubernetes, load balancers and people ask a server.

    GET /livez             this process answers                            open
    GET /readyz            it serves now: send it requests                 open
    GET /health            vLLM's meaning: it needs no restart             open; stands in front of vLLM's own
    GET /health_generate   a token comes out, in bounded time              with --api-key, the key

The first three read the control page and this process's own memory: they answer at once, during an outage too. Which state
gives which status is in `health_state`. The fourth goes through the engine: who asks at the same time shares one probe.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse

from ghostserve.clock import monotonic_s, wall_s
from ghostserve.web.draining import OBSERVER_NAME, is_draining
from ghostserve.web.health_state import Facts, Limits, Quiet, Recovery, Verdict, judge
from ghostserve.web.security import AccessPolicy, guard

GENERATE_DEFAULT_S, GENERATE_MAX_S = 20.0, 60.0
PROBE_METHODS = ["GET", "HEAD"]  # some load balancers send HEAD unless told otherwise
_NO_STORE = {"Cache-Control": "no-store"}

Generate = Callable[[Any], Awaitable[None]]
"""Has the engine client that it is handed make one token; raises if none comes. It is cancelled when time is up."""


class Page(Protocol):
    """What the probes need of `arena.control.ControlPage`; every call returns at once."""

    @property
    def last_step_s(self) -> float | None:
        """Monotonic time of the last accepted step."""

    def read_state(self) -> dict[str, Any] | None:
        """The latest whole state document."""


class Health:
    """Reads the facts of one app."""

    def __init__(self, page: Page, app_state: Any, limits: Limits) -> None:
        self._page = page
        self._app_state = app_state
        self._limits = limits
        self._quiet = Quiet()

    @property
    def engine(self) -> Any:
        """vLLM's client; None before the app is complete."""
        return getattr(self._app_state, "engine_client", None)

    def observe(self) -> float:
        """Note whether anything happened since the last look; seconds of quiet."""
        return self._quiet.look(monotonic_s(), running=self._running(), last_step_s=self._page.last_step_s)

    def facts(self) -> Facts:
        """As they are now."""
        now_s, last_step_s = monotonic_s(), self._page.last_step_s
        return Facts(
            document=self._page.read_state(),
            engine_dead=self.engine is not None and bool(self.engine.errored),
            draining=is_draining(self._app_state),
            running=self._running(),
            quiet_s=self.observe(),
            last_token_age_s=None if last_step_s is None else max(0.0, now_s - last_step_s),
            now_s=now_s,
        )

    def look(self) -> tuple[Facts, Verdict]:
        """The facts and what they mean."""
        facts = self.facts()
        return facts, judge(facts, self._limits)

    def _running(self) -> int:
        return 0 if self.engine is None else int(self.engine.get_num_unfinished_requests())


class SharedProbe:
    """One pass through the engine at a time; whoever asks meanwhile waits for the same one."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self._task: asyncio.Task[None] | None = None

    async def run(self, engine: Any, *, timeout_s: float) -> None:
        """Raises TimeoutError, or what the pass raised. It goes on after a timeout, up to GENERATE_MAX_S."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._bounded(engine))
            self._task.add_done_callback(_look_at_error)
        task = self._task
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
        if not done:
            raise TimeoutError
        task.result()

    async def _bounded(self, engine: Any) -> None:
        async with asyncio.timeout(GENERATE_MAX_S):
            await self._generate(engine)


def _look_at_error(task: asyncio.Task[None]) -> None:
    """Nobody may have waited so long; an error that nobody looks at is complained about."""
    if not task.cancelled():
        task.exception()


def body_of(facts: Facts, verdict: Verdict) -> dict[str, Any]:
    """The JSON that every probe answers with."""
    age_s = facts.last_token_age_s
    return {
        "state": verdict.state.value,
        "reason": verdict.reason,
        "running": facts.running,
        "last_token_age_seconds": None if age_s is None else round(age_s, 3),
        "recovery": None if verdict.recovery is None else _recovery_body(verdict.recovery),
    }


def _recovery_body(recovery: Recovery) -> dict[str, Any]:
    expected_s = recovery.expected_s
    end = None
    if expected_s is not None:
        end_s = wall_s() + expected_s - recovery.elapsed_s
        end = datetime.datetime.fromtimestamp(end_s, datetime.UTC).isoformat(timespec="milliseconds")
    return {
        "phase": recovery.phase,
        "elapsed_seconds": round(recovery.elapsed_s, 3),
        "expected_seconds": None if expected_s is None else round(expected_s, 3),
        "expected_end": end,
    }


def add_health_routes(
    app: Any, page: Page, *, limits: Limits, generate: Generate, api_keys: Sequence[str]
) -> None:
    """Put the probes in front of the app's own routes, so that ours answers `/health`."""
    health = Health(page, app.state, limits)
    setattr(app.state, OBSERVER_NAME, health.observe)
    before = len(app.router.routes)
    app.include_router(build_router(health, generate=generate, api_keys=api_keys))
    routes = app.router.routes
    routes[:] = [*routes[before:], *routes[:before]]


def build_router(health: Health, *, generate: Generate, api_keys: Sequence[str]) -> APIRouter:
    """The four probes."""
    router = APIRouter(include_in_schema=False)
    probe = SharedProbe(generate)

    def answer(ok: Callable[[Verdict], bool]) -> JSONResponse:
        facts, verdict = health.look()
        return JSONResponse(body_of(facts, verdict), 200 if ok(verdict) else 503, _NO_STORE)

    @router.api_route("/livez", methods=PROBE_METHODS)
    async def livez() -> JSONResponse:
        return answer(lambda _verdict: True)

    @router.api_route("/readyz", methods=PROBE_METHODS)
    async def readyz() -> JSONResponse:
        return answer(lambda verdict: verdict.ready)

    @router.api_route("/health", methods=PROBE_METHODS)
    async def health_route() -> JSONResponse:
        return answer(lambda verdict: verdict.healthy)

    with_key = [Depends(_key_holders_only(api_keys))] if api_keys else []

    @router.get("/health_generate", dependencies=with_key)
    async def health_generate(
        timeout: Annotated[float, Query(gt=0, le=GENERATE_MAX_S)] = GENERATE_DEFAULT_S,
    ) -> JSONResponse:
        facts, verdict = health.look()
        body, began_s = body_of(facts, verdict), monotonic_s()
        failure = None if verdict.healthy else verdict.reason
        if failure is None and facts.draining:
            failure = verdict.reason
        if failure is None:
            try:
                await probe.run(health.engine, timeout_s=timeout)
            except TimeoutError:
                failure = f"no token came within {timeout:g} s"
            except Exception as error:  # whatever the engine raises, the answer is that it does not generate
                failure = f"no token came: {error}"
        body |= {"reason": failure, "generate_seconds": round(monotonic_s() - began_s, 3)}
        return JSONResponse(body, 200 if failure is None else 503, _NO_STORE)

    return router


def _key_holders_only(api_keys: Sequence[str]) -> Callable[[Request], None]:
    return guard(AccessPolicy(api_keys=tuple(api_keys)))
