"""`ghostserve serve MODEL`: vLLM's OpenAI server with our parts and routes."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ghostserve.arena.control import ControlPage
from ghostserve.config import GhostConfig
from ghostserve.errors import GhostserveError
from ghostserve.web.draining import MIDDLEWARE
from ghostserve.web.security import demand_sendable_key


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop; returns the exit code."""
    from ghostserve.engine.platform import PLATFORM_ENV

    # vLLM settles on its platform while it is imported.
    os.environ[PLATFORM_ENV] = "1"
    from ghostserve.engine.server import serve

    at_end: list[Callable[[int], None]] = []
    code = GhostserveError.exit_code
    try:
        code = serve(argv, partial(mount, at_end=at_end), middleware=(MIDDLEWARE,))
    except GhostserveError as error:
        code = error.exit_code
        raise
    finally:
        for end in at_end:
            end(code)
    return code


def mount(
    app: Any,
    page: ControlPage | None,
    arguments: Namespace,
    config: GhostConfig,
    *,
    at_end: list[Callable[[int], None]] | None = None,
) -> None:
    """Add our routes to vLLM's app. Without protection there is nothing to show. Raises UsageError.

    What runs beside the app is ended by what is put into `at_end`, called with the exit status; without it, with the process.
    """
    if page is None:
        return
    from ghostserve.cli.serve_events import KeptEvents
    from ghostserve.web.health import add_health_routes
    from ghostserve.web.health_state import Limits
    from ghostserve.web.metrics import expose
    from ghostserve.web.routes import build_router

    kept = KeptEvents(page, config, traced=bool(getattr(arguments, "otlp_traces_endpoint", None)))
    if at_end is not None:
        at_end.append(kept.close)
    app.state.ghostserve_events = kept.log
    keys = api_keys_of(arguments, os.environ)
    limits = Limits(
        stall_timeout_s=config.stall_timeout, ready_while_recovering_s=config.ready_while_recovering
    )
    add_health_routes(app, page, limits=limits, generate=_generate, api_keys=keys)
    app.include_router(
        build_router(
            page,
            api_keys=keys,
            fault_injection=config.enable_fault_injection,
            bound_host=arguments.host,
            events=kept.log,
            tell=page.events.tell,
        )
    )
    expose(app, page)


async def _generate(engine: Any) -> None:
    from ghostserve.engine.one_token import generate_one_token  # vLLM's, and so not before it is needed

    await generate_one_token(engine)


def api_keys_of(arguments: Namespace, environment: Mapping[str, str]) -> list[str]:
    """The keys that vLLM's own routes accept; an empty one counts as none, as it does for vLLM.

    Raises UsageError for a key that no client could send.
    """
    given = arguments.api_key or [environment.get("VLLM_API_KEY")]
    keys = [key for key in ([given] if isinstance(given, str) else given) if key]
    for key in keys:
        demand_sendable_key(key)
    return keys
