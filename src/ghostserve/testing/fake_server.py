"""A stand-in for the whole server, without vLLM: our real routes, and as much of the OpenAI API as we use.

For tests of the page, the command line and the demo, which must not wait half a minute for a model.

    python -m ghostserve.testing.fake_server --port 8000        for a look at /ui
"""

from __future__ import annotations

import argparse
import pkgutil
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, make_asgi_app

from ghostserve.clock import monotonic_s
from ghostserve.testing.fake_drain import run_until_told
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.web.access import MIDDLEWARES, Access, set_access
from ghostserve.web.health import add_health_routes
from ghostserve.web.health_state import Limits
from ghostserve.web.metrics import PageCollector
from ghostserve.web.routes import build_router

STALL_S, READY_S = 300.0, 10.0  # as by default


class FakeRestart:
    """Measures nothing: `seconds` after it was asked it says that it took so long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began_s: float | None = None

    def start(self) -> None:
        self._began_s = monotonic_s()

    def describe(self) -> dict[str, Any]:
        if self._began_s is None:
            return {"state": "none", "elapsed_s": 0.0, "seconds": None, "reason": "not measured"}
        elapsed_s = monotonic_s() - self._began_s
        if elapsed_s < self._seconds:
            return {"state": "running", "elapsed_s": elapsed_s, "seconds": None, "reason": ""}
        return {"state": "done", "elapsed_s": 0.0, "seconds": self._seconds, "reason": ""}


def build_app(
    engine: FakeEngine,
    *,
    api_keys: tuple[str, ...] = (),
    fault_injection: bool = True,
    admin_key: str | None = None,
    body_bytes_max: int = 0,
    salt_secret: bytes | None = None,
    in_schema: bool = False,
    ui: bool = True,
    event_log: bool = True,
    restart_s: float = 2.5,
) -> FastAPI:
    """The app: our routes and middlewares over `engine`, and as much of the OpenAI API as the page and the demo use."""
    app = FastAPI()
    app.state.engine_client = engine
    for name in MIDDLEWARES:
        app.add_middleware(pkgutil.resolve_name(name))
    set_access(app, Access(api_keys=api_keys, body_bytes_max=body_bytes_max, salt_secret=salt_secret))
    registry = CollectorRegistry()
    registry.register(PageCollector(engine))
    app.mount("/metrics", make_asgi_app(registry=registry))
    app.include_router(
        build_router(
            engine,
            api_keys=api_keys,
            fault_injection=fault_injection,
            admin_key=admin_key,
            in_schema=in_schema,
            events=engine.log if event_log else None,
            tell=engine.events.tell,
            ui=ui,
            restart=FakeRestart(restart_s),
        )
    )

    @app.get("/health")
    def health() -> dict[str, str]:
        return {}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": "tiny-llama"}]}

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> StreamingResponse | JSONResponse:
        body = await request.json()
        if body["max_tokens"] > 4096:
            return JSONResponse({"error": {"message": "max_tokens is too large"}}, status_code=400)
        events = engine.stream(str(body["prompt"]), body["max_tokens"])
        return StreamingResponse(events, media_type="text/event-stream")

    limits = Limits(stall_timeout_s=STALL_S, ready_while_recovering_s=READY_S)
    add_health_routes(app, engine, limits=limits, generate=engine.generate_one_token, api_keys=api_keys)
    return app


def main() -> None:
    """Serve until interrupted. Flags of the real server are accepted and ignored."""
    parser = argparse.ArgumentParser(description="A stand-in server without vLLM, for a look at /ui.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    parser.add_argument("--api-key", action="append", default=[])
    parser.add_argument("--admin-api-key")
    parser.add_argument("--ssl-certfile")
    parser.add_argument("--ssl-keyfile")
    parser.add_argument("--token-s", type=float, default=0.012)
    parser.add_argument("--outage-s", type=float, default=1.2)
    parser.add_argument("--exit-code-at-loss", type=int)
    parser.add_argument("--shutdown-timeout", type=float, default=0.0)
    parser.add_argument("--standbys", type=int, default=0)
    parser.add_argument("--no-fault-injection", action="store_true")
    parser.add_argument("--no-event-log", action="store_true", help="without /ghostserve/events")
    options, _ignored = parser.parse_known_args()
    engine = FakeEngine(
        ranks=options.tensor_parallel_size,
        token_s=options.token_s,
        outage_s=options.outage_s,
        exit_code_at_loss=options.exit_code_at_loss,
        standbys=options.standbys,
    )
    try:
        app = build_app(
            engine,
            api_keys=tuple(options.api_key),
            admin_key=options.admin_api_key,
            fault_injection=not options.no_fault_injection,
            event_log=not options.no_event_log,
        )
        config = uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            log_level="warning",
            timeout_graceful_shutdown=2,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
        )
        run_until_told(config, app, engine, shutdown_timeout_s=options.shutdown_timeout)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
