"""`ghostserve serve MODEL`: vLLM's OpenAI server with our parts and routes."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from ghostserve.arena.control import ControlPage
from ghostserve.config import GhostConfig


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop; returns the exit code."""
    from ghostserve.engine.platform import PLATFORM_ENV

    # vLLM settles on its platform while it is imported.
    os.environ[PLATFORM_ENV] = "1"
    from ghostserve.engine.server import serve

    return serve(argv, mount)


def mount(app: Any, page: ControlPage | None, arguments: Namespace, config: GhostConfig) -> None:
    """Add our routes to vLLM's app. Without protection there is nothing to show."""
    if page is None:
        return
    from ghostserve.web.routes import build_router

    keys = arguments.api_key or [key for key in (os.environ.get("VLLM_API_KEY"),) if key]
    keys = [keys] if isinstance(keys, str) else list(keys)
    app.include_router(
        build_router(
            page, api_keys=keys, fault_injection=config.enable_fault_injection, bound_host=arguments.host
        )
    )
