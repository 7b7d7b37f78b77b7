"""`ghostserve serve MODEL`: vLLM's OpenAI server with our parts and routes."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from ghostserve.arena.control import ControlPage
from ghostserve.config import GhostConfig
from ghostserve.web.draining import MIDDLEWARE
from ghostserve.web.security import demand_sendable_key


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop; returns the exit code."""
    from ghostserve.engine.platform import PLATFORM_ENV

    # vLLM settles on its platform while it is imported.
    os.environ[PLATFORM_ENV] = "1"
    from ghostserve.engine.server import serve

    return serve(argv, mount, middleware=(MIDDLEWARE,))


def mount(app: Any, page: ControlPage | None, arguments: Namespace, config: GhostConfig) -> None:
    """Add our routes to vLLM's app. Without protection there is nothing to show. Raises UsageError."""
    if page is None:
        return
    from ghostserve.web.health import add_health_routes
    from ghostserve.web.health_state import Limits
    from ghostserve.web.routes import build_router

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
        )
    )


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
