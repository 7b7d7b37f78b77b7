"""A stand-in for the whole server, without vLLM: our real routes, and as much of the OpenAI API as we use.

For tests of the page, the command line and the demo, which must not wait half a minute for a model.

    python -m ghostserve.testing.fake_server --port 8000        for a look at /ui
"""

from __future__ import annotations

import argparse
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from ghostserve.clock import monotonic_s
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.web.routes import build_router


class FakeRestart:
    """Measures nothing: `seconds` after it was asked it says that it took so long."""

    def __init__(self, seconds: float = 2.5) -> None:
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
    ui: bool = True,
    event_log: bool = False,
) -> FastAPI:
    """The app: our routes over `engine`, and as much of the OpenAI API as the page and the demo use."""
    app = FastAPI()
    router = build_router(
        engine, api_keys=api_keys, fault_injection=fault_injection, ui=ui, restart=FakeRestart()
    )
    app.include_router(router)
    if event_log:
        engine.events.add_route(app.router)

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

    return app


def main() -> None:
    """Serve until interrupted. Flags of the real server are accepted and ignored."""
    parser = argparse.ArgumentParser(description="A stand-in server without vLLM, for a look at /ui.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    parser.add_argument("--api-key", action="append", default=[])
    parser.add_argument("--token-s", type=float, default=0.012)
    parser.add_argument("--outage-s", type=float, default=1.2)
    parser.add_argument("--exit-code-at-loss", type=int)
    parser.add_argument("--standbys", type=int, default=0)
    parser.add_argument("--no-fault-injection", action="store_true")
    parser.add_argument("--event-log", action="store_true", help="with /ghostserve/events")
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
            fault_injection=not options.no_fault_injection,
            event_log=options.event_log,
        )
        config = uvicorn.Config(app, host=options.host, port=options.port, log_level="warning")
        app.state.server = uvicorn.Server(config)
        app.state.server.run()
    finally:
        engine.close()


if __name__ == "__main__":
    main()
