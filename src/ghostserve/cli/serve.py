"""`ghostserve serve MODEL`: vLLM's OpenAI server with our parts and routes."""

from __future__ import annotations

import logging
import os
import secrets
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from ghostserve.arena.control import ControlPage
from ghostserve.cli.restart_cost import SecondServer, obstacle
from ghostserve.cli.serve_events import KeptEvents
from ghostserve.cli.serve_model import fetch_model
from ghostserve.config import GhostConfig
from ghostserve.errors import GhostserveError
from ghostserve.web.access import MIDDLEWARES, Access, set_access
from ghostserve.web.keys import admin_key, api_keys
from ghostserve.web.restart import RestartCost
from ghostserve.web.weights_pool import PoolWatch

logger = logging.getLogger(__name__)

INTERRUPTED = 130  # as `cli.main` exits then


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop; returns the exit code."""
    from ghostserve.engine.platform import PLATFORM_ENV

    environment = dict(os.environ)  # as it was given to us, before vLLM and we add to it
    # vLLM settles on its platform while it is imported.
    os.environ[PLATFORM_ENV] = "1"
    from ghostserve.engine.server import serve

    kept: list[KeptEvents] = []
    watches: list[PoolWatch] = []
    code, reason = GhostserveError.exit_code, ""

    def keep_events(page: ControlPage, config: GhostConfig) -> None:
        kept.append(KeptEvents(page, config))

    def mount_all(app: Any, page: ControlPage | None, arguments: Namespace, config: GhostConfig) -> None:
        key = next(iter(api_keys(arguments.api_key, None, os.environ)), None)
        second = SecondServer(argv, environment, api_key=key, obstacle=obstacle(arguments))
        if page is not None:
            watches.append(PoolWatch())
        pool = next(iter(watches), None)
        mount(app, page, arguments, config, kept=next(iter(kept), None), pool=pool, restart=second)

    try:
        code = serve(argv, mount_all, prepare, keep_events)
    except GhostserveError as error:
        code, reason = error.exit_code, str(error)
        raise
    except KeyboardInterrupt:
        code, reason = INTERRUPTED, "it was interrupted while it started"
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        for watch in watches:
            watch.close()
        for events in kept:
            events.close(code, reason)
    return code


def prepare(arguments: Namespace, config: GhostConfig) -> None:
    """Before vLLM builds its app: the model, the keys that its routes accept, and our middlewares, inside those that the user names.

    Raises UsageError for a key that cannot be used. Without protection vLLM is as it is, but for keys from a file.
    """
    fetch_model(arguments, config)
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
    kept: KeptEvents | None = None,
    pool: PoolWatch | None = None,
    restart: RestartCost | None = None,
) -> None:
    """Add our routes and rules to vLLM's app. Without protection vLLM is as it is. Raises UsageError.

    `kept`: the events of this server so far; without them they are kept from here on, to the end of the process. `pool`: who
    looks at the pool of weights; its owner closes it.
    """
    if page is None:
        return
    from ghostserve.web.draining import is_draining
    from ghostserve.web.health import add_health_routes
    from ghostserve.web.health_state import Limits
    from ghostserve.web.metrics import expose
    from ghostserve.web.routes import build_router
    from ghostserve.web.weights_tiers import describe

    kept = kept or KeptEvents(page, config)
    if getattr(arguments, "otlp_traces_endpoint", None):
        kept.trace()
    pool = pool or PoolWatch()
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
            draining=lambda: is_draining(app.state),
            weights=lambda: describe(pool.reading),
        )
    )
    expose(app, page, lambda: pool.reading)


async def _generate(engine: Any) -> None:
    from ghostserve.engine.one_token import generate_one_token  # vLLM's, and so not before it is needed

    await generate_one_token(engine)
