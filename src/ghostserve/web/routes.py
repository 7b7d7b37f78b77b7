"""Our routes: status, kill, faults, switches, and the live page. Reads and writes the control page only.

Nothing here waits for the engine, so every route answers during an outage. The state document is written by
the engine core and passed on as it is; the only things added are the page's counters, whether the server drains and
whether faults may be injected.

    GET  /ghostserve/status    the state document                  key, or loopback
    GET  /ghostserve/events    what has happened (events_route.py) the same
    POST /ghostserve/kill      {"rank": R, "how": KIND, ...}       admin key, else the same; --enable-fault-injection
    POST /ghostserve/faults    {"point", "rank", "action", ...}    the same; DELETE disarms all
    POST /ghostserve/switches  {NAME: true | false, ...}           the same
    POST /ghostserve/measure-restart                               the same (`restart.py`)
    GET  /ghostserve/live      the state document as it changes    key, or loopback (`live.py`)
    GET  /ui, /ui/...          the page, with --ui                 open, as it holds no data (`ui.py`)

Errors are HTTPExceptions whose detail is one sentence: 401 and 403 who may not, 409 not now, 413 too long, 422 bad
request, 503 too early; 500, without saying more, is a mistake of ours (`web.failures`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from fastapi import APIRouter, Depends, HTTPException, Request, Response, params

from ghostserve.arena.names import Fault, Progress, Stamp, Switch
from ghostserve.errors import BudgetExceeded, UsageError
from ghostserve.events.kinds import Event, FaultInjected
from ghostserve.events.log import EventLog
from ghostserve.web.bodies import TooLong, parse_fault, parse_kill, parse_switches, read_object
from ghostserve.web.events_route import add_events
from ghostserve.web.failures import OneSentenceRoute
from ghostserve.web.injection import NotNow, inflict
from ghostserve.web.live import add_live
from ghostserve.web.restart import RestartCost, add_restart
from ghostserve.web.schema import FAULT, KILL, SWITCHES, documented
from ghostserve.web.security import AccessPolicy, guard
from ghostserve.web.ui import add_ui

_NO_STORE = {"Cache-Control": "no-store"}


class Page(Protocol):
    """What the routes need of `arena.control.ControlPage`. Every call returns at once; any thread may make
    it.
    """

    def read_state(self) -> dict[str, Any] | None:
        """The latest whole state document; None before the engine core has written the first."""

    def counters(self) -> Mapping[str, int]:
        """The live counters by name."""

    def arm_fault(self, fault: Fault) -> int:
        """Have a rank suffer it; raises BudgetExceeded if full."""

    def disarm_faults(self) -> None:
        """Forget all armed faults."""

    def armed_faults(self) -> list[Fault]:
        """The faults that have not struck yet."""

    def get_switch(self, switch: Switch) -> bool:
        """Whether a run-time switch is on."""

    def set_switch(self, switch: Switch, on: bool) -> None:
        """Turn a run-time switch on or off."""

    def read_stamp(self, rank: int) -> Stamp:
        """The rank's last stamp."""

    def progress(self, rank: int) -> Progress:
        """How far the rank is, as it says itself."""


@contextmanager
def _our_errors_as_http() -> Iterator[None]:
    try:
        yield
    except TooLong as error:
        raise HTTPException(413, str(error)) from None
    except UsageError as error:
        raise HTTPException(422, str(error)) from None
    except (BudgetExceeded, NotNow) as error:
        raise HTTPException(409, str(error)) from None


def _state_of(page: Page) -> dict[str, Any]:
    state = page.read_state()
    if state is None:
        raise HTTPException(503, "the server is still starting; try again in a moment")
    return state


def _injections(page: Page) -> dict[str, Any]:
    """What is armed and switched on right now, for the status."""
    return {
        "switches": {switch.name.lower(): page.get_switch(switch) for switch in Switch},
        "armed_faults": [_fault_as_dict(fault) for fault in page.armed_faults()],
    }


def _fault_as_dict(fault: Fault) -> dict[str, Any]:
    return {
        "point": fault.point.value,
        "rank": fault.rank,
        "action": fault.action.value,
        "skip": fault.skip,
        "argument": fault.argument,
        "count": fault.count,
    }


def build_router(
    page: Page,
    *,
    api_keys: Sequence[str],
    fault_injection: bool,
    bound_host: str | None = None,
    admin_key: str | None = None,
    in_schema: bool = False,
    events: EventLog | None = None,
    tell: Callable[[Event], object] = lambda event: None,
    ui: bool = False,
    restart: RestartCost | None = None,
    draining: Callable[[], bool] = lambda: False,
    weights: Callable[[], dict[str, Any]] | None = None,
) -> APIRouter:
    """The router to mount on the server's app. Injected faults are told to `tell`.

    `api_keys` are the keys that the OpenAI routes accept too; with none, the routes answer on loopback only.
    With `admin_key`, fault injection wants that one, which then opens our other routes as well.
    `bound_host` is the value of `--host`, accepted in the Host header beside the loopback names.
    `in_schema` has the app's OpenAPI document name our routes, for tests. `ui`: with the page. `restart` measures what
    a restart costs, where that is possible. `draining`: whether the server was told to end, which the engine does not know.
    `weights` says what of them is in memory, without waiting.
    """
    keys = (*api_keys, *([admin_key] if admin_key and api_keys else []))
    strangers_out = Depends(guard(AccessPolicy(api_keys=keys, bound_host=bound_host)))
    injectors = AccessPolicy(api_keys=tuple(api_keys), bound_host=bound_host)
    if admin_key:
        injectors = AccessPolicy(api_keys=(admin_key,), bound_host=bound_host, key_name="admin key")
    router = APIRouter(include_in_schema=in_schema, route_class=OneSentenceRoute)
    document = _document_of(
        page, fault_injection=fault_injection, restart=restart, draining=draining, weights=weights
    )
    _add_status(router, document, dependencies=[strangers_out])
    add_live(router, page, document, dependencies=[strangers_out])
    if events is not None:
        add_events(router, events, dependencies=[strangers_out])

    def demand_fault_injection() -> None:
        if not fault_injection:
            raise HTTPException(403, "fault injection is off; start the server with --enable-fault-injection")

    # In this order: a stranger is not told whether faults could be injected.
    injection = [Depends(guard(injectors)), Depends(demand_fault_injection)]
    _add_injection(router, page, tell, dependencies=injection)
    add_restart(router, restart, dependencies=injection)
    add_ui(router, enabled=ui, dependencies=[strangers_out])
    return router


def _document_of(
    page: Page,
    *,
    fault_injection: bool,
    restart: RestartCost | None,
    draining: Callable[[], bool],
    weights: Callable[[], dict[str, Any]] | None,
) -> Callable[[], dict[str, Any]]:
    """What `/ghostserve/status` answers; raises 503 while there is nothing to tell."""

    def document() -> dict[str, Any]:
        state = _state_of(page)
        return {
            **state,
            "draining": draining(),
            "counters": dict(page.counters()),
            **({"weights": weights()} if weights is not None else {}),
            "fault_injection": fault_injection,
            **(_injections(page) if fault_injection else {}),
            **({"restart": restart.describe()} if fault_injection and restart is not None else {}),
        }

    return document


def _add_status(
    router: APIRouter, document: Callable[[], dict[str, Any]], *, dependencies: Sequence[params.Depends]
) -> None:
    @router.get("/ghostserve/status", dependencies=dependencies, **documented())
    async def status(response: Response) -> dict[str, Any]:
        response.headers.update(_NO_STORE)
        return document()


def _add_injection(
    router: APIRouter, page: Page, tell: Callable[[Event], object], *, dependencies: Sequence[params.Depends]
) -> None:
    @router.post("/ghostserve/kill", dependencies=dependencies, **documented(KILL))
    async def kill(request: Request) -> dict[str, Any]:
        state = _state_of(page)
        with _our_errors_as_http():
            order = parse_kill(await read_object(request), ranks_total=len(state["ranks"]))
            done = inflict(page, state, order)
        tell(FaultInjected(how=done["how"], rank=done["rank"], pid=done["pid"], strikes=done["strikes"]))
        return done

    @router.post("/ghostserve/faults", dependencies=dependencies, **documented(FAULT))
    async def arm_fault(request: Request) -> dict[str, Any]:
        ranks_total = len(_state_of(page)["ranks"])
        with _our_errors_as_http():
            fault = parse_fault(await read_object(request), ranks_total=ranks_total)
            page.arm_fault(fault)
        tell(FaultInjected(how=fault.action.value, rank=fault.rank, strikes=f"at {fault.point.value}"))
        return {"armed": _fault_as_dict(fault)}

    @router.delete("/ghostserve/faults", dependencies=dependencies, **documented())
    async def disarm_faults() -> dict[str, Any]:
        page.disarm_faults()
        return {"armed": None}

    @router.post("/ghostserve/switches", dependencies=dependencies, **documented(SWITCHES))
    async def set_switches(request: Request) -> dict[str, Any]:
        with _our_errors_as_http():
            switches = parse_switches(await read_object(request))
        for switch, on in switches.items():
            page.set_switch(switch, on)
        return {"switches": {switch.name.lower(): on for switch, on in switches.items()}}
