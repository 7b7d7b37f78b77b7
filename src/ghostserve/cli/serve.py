"""`ghostserve serve MODEL`: vLLM's OpenAI server with our parts and routes."""

from __future__ import annotations

import logging
import os
import secrets
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from ghostserve.arena.control import ControlPage
from ghostserve.config import GhostConfig
from ghostserve.web.access import MIDDLEWARES, Access, set_access
from ghostserve.web.keys import admin_key, api_keys

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop; returns the exit code."""
    from ghostserve.engine.platform import PLATFORM_ENV

    # vLLM settles on its platform while it is imported.
    os.environ[PLATFORM_ENV] = "1"
    from ghostserve.engine.server import serve

    return serve(argv, mount, prepare)


def prepare(arguments: Namespace, config: GhostConfig) -> None:
    """Before vLLM builds its app: the keys that its routes accept, and our middlewares, inside those that the user names.

    Raises UsageError for a key that cannot be used. Without protection vLLM is as it is, but for keys from a file.
    """
    arguments.admin_api_key = (
        None  # known to our configuration; vLLM keeps these arguments, and may show them
    )
    if config.api_key_file:
        arguments.api_key = api_keys(arguments.api_key, config.api_key_file, os.environ)
    if config.protection == "none":
        return
    keys = api_keys(arguments.api_key, None, os.environ)
    admin = admin_key(config.admin_api_key, config.admin_api_key_file, os.environ)
    if keys and config.enable_fault_injection and not admin:
        logger.warning("every holder of an API key may have workers killed: give --admin-api-key, too")
    arguments.middleware = [*MIDDLEWARES, *(arguments.middleware or ())]


def mount(app: Any, page: ControlPage | None, arguments: Namespace, config: GhostConfig) -> None:
    """Add our routes and rules to vLLM's app. Without protection vLLM is as it is. Raises UsageError."""
    if page is None:
        return
    from ghostserve.web.routes import build_router

    keys = api_keys(arguments.api_key, None, os.environ)
    separate = config.prefix_cache_salt_per_key and len(set(keys)) > 1
    set_access(
        app,
        Access(
            api_keys=tuple(keys),
            body_bytes_max=config.max_body_size,
            salt_secret=secrets.token_bytes(32) if separate else None,
        ),
    )
    app.include_router(
        build_router(
            page,
            api_keys=keys,
            admin_key=admin_key(config.admin_api_key, config.admin_api_key_file, os.environ),
            fault_injection=config.enable_fault_injection,
            bound_host=arguments.host,
        )
    )
