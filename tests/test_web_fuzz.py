"""Our routes, called with everything that fits their OpenAPI schema and with much that does not: no answer is a server error.

Whatever is added to the router is called as well. Where a route announces its refusals, answers must also be what it
announces, and what does not fit must be refused. Answers that never end are cut off: this is about how they begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup, ServerError
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.testing.fake_server import build_app

EXAMPLES, CUT_OFF_S = 30, 0.5
KEY = {"Authorization": "Bearer secret"}
ANNOUNCED = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine(token_s=0, outage_s=0)
    yield engine
    engine.close()


def cut_off(app: FastAPI) -> Callable[..., Any]:
    async def bounded(scope: Any, receive: Any, send: Any) -> None:
        with anyio.move_on_after(CUT_OFF_S if scope["type"] == "http" else float("inf")):
            await app(scope, receive, send)

    return bounded


def fuzz(app: FastAPI, after_each: Callable[[], None], *, key: dict[str, str] = KEY) -> dict[str, int]:
    """Call every operation EXAMPLES times with what fits and as often with what does not; how often each succeeded.

    Raises schemathesis' failures.
    """
    schema = schemathesis.openapi.from_asgi("/openapi.json", cut_off(app), headers=KEY)
    succeeded: dict[str, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        modes = [GenerationMode.POSITIVE]
        if operation.body or operation.query or operation.headers:
            modes.append(GenerationMode.NEGATIVE)  # else there is nothing to get wrong
        answered = [one for mode in modes for one in answers(operation, mode, after_each, key)]
        succeeded[operation.label] = sum(status < 300 for status in answered)
    return succeeded


def answers(
    operation: Any, mode: GenerationMode, after_each: Callable[[], None], key: dict[str, str]
) -> list[int]:
    """The status of each answer."""
    statuses: list[int] = []
    more = ANNOUNCED if "401" in operation.definition.raw["responses"] else []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        answer = case.call(headers=key)
        after_each()
        statuses.append(answer.status_code)
        case.validate_response(answer, checks=[not_a_server_error, *more])

    call()
    return statuses


def ours_only(engine: FakeEngine, **rules: Any) -> FastAPI:
    app = build_app(engine, api_keys=("secret",), in_schema=True, body_bytes_max=1 << 20, **rules)
    for route in app.routes:
        if getattr(route, "path", "").startswith("/v1") or getattr(route, "path", "") == "/health":
            route.include_in_schema = False  # type: ignore[attr-defined]
    name_ranks(app.openapi())  # FastAPI keeps the document and answers with it
    return app


def name_ranks(schema: Any) -> None:
    """Those that exist, and one that does not: of all numbers hardly any does."""
    for name, inner in list(schema.items()) if isinstance(schema, dict) else ():
        if name == "rank" and inner.get("type") == "integer":
            schema[name] = {"type": "integer", "minimum": 0, "maximum": 2}
        name_ranks(inner)
    for inner in schema if isinstance(schema, list) else ():
        name_ranks(inner)


def heal(engine: FakeEngine) -> None:
    """So that a kill finds somebody alive again."""
    engine.disarm_faults()
    engine.step()


def test_no_answer_is_a_server_error(engine: FakeEngine) -> None:
    succeeded = fuzz(ours_only(engine), lambda: heal(engine))
    assert len(succeeded) >= 6, succeeded
    assert all(succeeded.values()), f"never got beyond its refusals: {succeeded}"
    assert engine.recoveries, "no kill ever came through"


@pytest.mark.parametrize("mistake", ["faults", "status"])
def test_a_mistake_is_found(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    """The negative control: one that shows with some bodies only, and one that shows each time."""
    if mistake == "faults":
        arm = engine.arm_fault
        monkeypatch.setattr(engine, "arm_fault", lambda fault: 1 // (fault.argument < 100) and arm(fault))
    else:
        monkeypatch.setattr(engine, "counters", lambda: {"steps_total": object()})
    with pytest.raises((Failure, FailureGroup)) as raised:
        fuzz(ours_only(engine), lambda: heal(engine))
    group = raised.value
    failures = group.exceptions if isinstance(group, FailureGroup) else [group]
    assert any(isinstance(failure, ServerError) for failure in failures), failures


def test_a_stranger_only_ever_gets_a_refusal(engine: FakeEngine) -> None:
    statuses = fuzz(ours_only(engine), lambda: None, key={"Authorization": "Bearer wrong"})
    assert {name for name, answered in statuses.items() if answered} <= {"GET /ui", "GET /ui/static/{name}"}
    assert not engine.recoveries


def test_no_server_publishes_the_schema(engine: FakeEngine) -> None:
    paths = build_app(engine).openapi()["paths"]
    assert not [path for path in paths if path.startswith(("/ghostserve", "/ui"))]
