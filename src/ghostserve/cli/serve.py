"""`ghostserve serve MODEL`: vLLM's OpenAI server with our parts and routes."""

from __future__ import annotations

import logging
import os
import secrets
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from ghostserve.arena.control import ControlPage
from ghostserve.cli.restart_cost import SecondServer, obstacle
from ghostserve.config import GhostConfig
from ghostserve.errors import GhostserveError
from ghostserve.web.access import MIDDLEWARES, Access, set_access
from ghostserve.web.keys import admin_key, api_keys
from ghostserve.web.restart import RestartCost

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop; returns the exit code."""
    from ghostserve.engine.platform import PLATFORM_ENV

    environment = dict(os.environ)  # as it was given to us, before vLLM and we add to it
    # vLLM settles on its platform while it is imported.
    os.environ[PLATFORM_ENV] = "1"
    from ghostserve.engine.server import serve

    at_end: list[Callable[[int], None]] = []
    code = GhostserveError.exit_code

    def mount_all(app: Any, page: ControlPage | None, arguments: Namespace, config: GhostConfig) -> None:
        key = next(iter(api_keys(arguments.api_key, None, os.environ)), None)
        second = SecondServer(argv, environment, api_key=key, obstacle=obstacle(arguments))
        mount(app, page, arguments, config, at_end=at_end, restart=second)

    try:
        code = serve(argv, mount_all, prepare)
    except GhostserveError as error:
        code = error.exit_code
        raise
    finally:
        for end in at_end:
            end(code)
    return code


def prepare(arguments: Namespace, config: GhostConfig) -> None:
    """Before vLLM builds its app: the keys that its routes accept, and our middlewares, inside those that the user names.

    Raises UsageError for a key that cannot be used. Without protection vLLM is as it is, but for keys from a file.
    """
    # Known to our configuration; vLLM keeps these arguments, and may show them.
    arguments.admin_api_key = None
    if config.api_key_file:
        arguments.api_key = api_keys(arguments.api_key, config.api_key_file, os.environ)
    if config.protection == "none":
        return
    keys = api_keys(arguments.api_key, None, os.environ)
    admin = admin_key(config.admin_api_key, config.admin_api_key_file, os.environ)
    if keys and config.enable_fault_injection and not admin:
        logger.warning("every holder of an API key may have workers killed: give --admin-api-key, too")
    arguments.middleware = [*MIDDLEWARES, *(arguments.middleware or ())]


def mount(
    app: Any,
    page: ControlPage | None,
    arguments: Namespace,
    config: GhostConfig,
    *,
    at_end: list[Callable[[int], None]] | None = None,
    restart: RestartCost | None = None,
) -> None:
    """Add our routes and rules to vLLM's app. Without protection vLLM is as it is. Raises UsageError.

    What runs beside the app is ended by what is put into `at_end`, called with the exit status; without it, with the process.
    """
    if page is None:
        return
    from ghostserve.cli.serve_events import KeptEvents
    from ghostserve.web.health import add_health_routes
    from ghostserve.web.health_state import Limits
    from ghostserve.web.metrics import expose
    from ghostserve.web.routes import build_router
    from ghostserve.web.weights_pool import PoolWatch

    kept = KeptEvents(page, config, traced=bool(getattr(arguments, "otlp_traces_endpoint", None)))
    pool = PoolWatch()
    if at_end is not None:
        at_end += [kept.close, lambda status: pool.close()]
    app.state.ghostserve_events = kept.log
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
    limits = Limits(
        stall_timeout_s=config.stall_timeout, ready_while_recovering_s=config.ready_while_recovering
    )
    add_health_routes(app, page, limits=limits, generate=_generate, api_keys=keys)
    app.include_router(
        build_router(
            page,
            api_keys=keys,
            admin_key=admin_key(config.admin_api_key, config.admin_api_key_file, os.environ),
            fault_injection=config.enable_fault_injection,
            bound_host=arguments.host,
            events=kept.log,
            tell=page.events.tell,
            ui=config.ui,
            restart=restart,
        )
    )
    expose(app, page, lambda: pool.reading)


async def _generate(engine: Any) -> None:
    from ghostserve.engine.one_token import generate_one_token  # vLLM's, and so not before it is needed

    await generate_one_token(engine)
