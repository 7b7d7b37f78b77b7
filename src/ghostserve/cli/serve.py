"""`ghostserve serve MODEL`: vLLM's OpenAI server with our parts and routes."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from ghostserve.arena.control import ControlPage
from ghostserve.cli.restart_cost import SecondServer, obstacle
from ghostserve.config import GhostConfig
from ghostserve.web.restart import RestartCost
from ghostserve.web.security import demand_sendable_key


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop; returns the exit code."""
    from ghostserve.engine.platform import PLATFORM_ENV

    environment = dict(os.environ)  # as it was given to us, before vLLM and we add to it
    # vLLM settles on its platform while it is imported.
    os.environ[PLATFORM_ENV] = "1"
    from ghostserve.engine.server import serve

    def mount_all(app: Any, page: ControlPage | None, arguments: Namespace, config: GhostConfig) -> None:
        key = next(iter(api_keys_of(arguments, os.environ)), None)
        second = SecondServer(argv, environment, api_key=key, obstacle=obstacle(arguments))
        mount(app, page, arguments, config, restart=second)

    return serve(argv, mount_all)


def mount(
    app: Any,
    page: ControlPage | None,
    arguments: Namespace,
    config: GhostConfig,
    *,
    restart: RestartCost | None = None,
) -> None:
    """Add our routes to vLLM's app. Without protection there is nothing to show. Raises UsageError."""
    if page is None:
        return
    from ghostserve.web.routes import build_router

    app.include_router(
        build_router(
            page,
            api_keys=api_keys_of(arguments, os.environ),
            fault_injection=config.enable_fault_injection,
            bound_host=arguments.host,
            ui=config.ui,
            restart=restart,
        )
    )


def api_keys_of(arguments: Namespace, environment: Mapping[str, str]) -> list[str]:
    """The keys that vLLM's own routes accept; an empty one counts as none, as it does for vLLM.

    Raises UsageError for a key that no client could send.
    """
    given = arguments.api_key or [environment.get("VLLM_API_KEY")]
    keys = [key for key in ([given] if isinstance(given, str) else given) if key]
    for key in keys:
        demand_sendable_key(key)
    return keys
