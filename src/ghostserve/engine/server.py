"""vLLM's OpenAI server with our engine parts, our keeper, and room for our routes.

The front process: it starts the keeper before the engine, so that the arena outlives the engine core, and it
is the only one that listens. The lines that build and serve the app follow vLLM's own launcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import uvloop
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.exceptions import GracefulHTTPError
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

import ghostserve
from ghostserve.arena.control import ControlPage
from ghostserve.clock import monotonic_s
from ghostserve.codec.matrix import check_size
from ghostserve.config import CONFIG_ENV, GhostConfig
from ghostserve.engine import drain, leftovers, load_format, logs, unix_socket
from ghostserve.engine.interrupts import felt_at_once
from ghostserve.engine.limits import refuse_arguments, refuse_other_servers, refuse_unsupported
from ghostserve.engine.platform import ASYNC_ENV, PLATFORM_ENV
from ghostserve.engine.settings import Settings
from ghostserve.engine.status import why_refused
from ghostserve.errors import EngineLost, GhostserveError, StartError, UnsupportedError, UsageError
from ghostserve.events.file import EventFile
from ghostserve.events.kinds import Event, ServerDraining, ServerServing, ServerStarted
from ghostserve.shadow.keeper_supervisor import KeeperSupervisor

logger = logging.getLogger(__name__)

KEEPER_START_S = 10.0
# For answers that are under way once nothing is waited for, and for the engine core to end.
LAST_WORDS_S = 5.0
RESPONSE_METRICS = "ghostserve.web.response_metrics.ResponseMetrics"  # by name: it is a layer above
RUN_DIRECTORY_CHARS_MAX = 107 - len("/") - 36  # a Unix socket's path, less vLLM's file name (a UUID)

# Called with the app, the control page (None without protection), the parsed arguments and our configuration.
Mount = Callable[[Any, ControlPage | None, Namespace, GhostConfig], None]
# Called before that, with what vLLM is about to build the app from.
Prepare = Callable[[Namespace, GhostConfig], None]
# Called once there is a control page, before the engine starts.
Observe = Callable[[ControlPage, GhostConfig], None]


def parse_arguments(argv: Sequence[str]) -> tuple[Namespace, GhostConfig]:
    """vLLM's serve flags and ours, from the command line and `--config FILE.yaml`. Raises UsageError."""
    parser = FlexibleArgumentParser(prog="ghostserve")
    serve = parser.add_subparsers(dest="subparser").add_parser(
        "serve",
        usage="ghostserve serve MODEL [options]",
        description="Serve a model over the OpenAI API; a worker that dies is replaced in place.",
        epilog="ghostserve's own flags: --help=ghostserve",
    )
    serve = make_arg_parser(serve)
    serve.set_defaults(host="127.0.0.1", load_format=None)
    GhostConfig.add_arguments(serve)
    try:
        arguments = parser.parse_args(["serve", *_spread_config(argv)])
        if arguments.model_tag is not None:
            arguments.model = arguments.model_tag
        config = GhostConfig.from_arguments(arguments)
        validate_parsed_serve_args(arguments)
    except GhostserveError:
        raise
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
    except Exception as error:  # vLLM's parser raises many kinds for a bad file or value
        raise UsageError(f"{type(error).__name__}: {error}" if str(error) else repr(error)) from None
    return arguments, config


def _spread_config(argv: Sequence[str]) -> list[str]:
    """`--config=FILE` as two words: vLLM's parser passes over the one."""
    words: list[str] = []
    for word in argv:
        words += ["--config", word.removeprefix("--config=")] if word.startswith("--config=") else [word]
    return words


def serve(argv: Sequence[str], mount: Mount, prepare: Prepare, observe: Observe) -> int:
    """Serve until told to stop. Returns the exit code; raises UsageError, StartError or EngineLost."""
    arguments, config = parse_arguments(argv)
    configure_logging_from_args(arguments)
    logs.join_vllm()
    refuse_other_servers(arguments)
    prepare(arguments, config)
    arguments.load_format = load_format.choose(arguments, config)
    if config.protection == "none":
        os.environ[PLATFORM_ENV] = "0"
        os.environ[load_format.LOADER_ENV] = str(int(arguments.load_format == load_format.LOAD_FORMAT))
        os.environ[CONFIG_ENV] = config.to_json()
        return _run(arguments, config, mount, page=None)
    refuse_arguments(arguments)
    _refuse_parity(arguments, config)
    if config.event_log is not None:  # at once, not when the engine is up
        EventFile(
            Path(config.event_log), max_bytes=config.event_log_max_bytes, files=config.event_log_files
        ).close()
    _demand_our_platform()
    Settings(config=config).memory_budget_bytes()
    _use_our_parts(arguments, config)
    directory = leftovers.make_run_directory()
    try:
        os.environ[leftovers.RUN_DIRECTORY_ENV] = str(directory)
        if len(str(directory)) <= RUN_DIRECTORY_CHARS_MAX:
            os.environ.setdefault("VLLM_RPC_BASE_PATH", str(directory))
        with KeeperSupervisor() as keeper:
            keeper.control.events.tell(_started(arguments))
            observe(keeper.control, config)
            keeper.wait_ready(timeout_s=KEEPER_START_S)
            os.environ.update(keeper.environment())
            try:
                return _run(arguments, config, mount, page=keeper.control)
            finally:
                leftovers.end_processes(keeper.control.read_state())
    finally:
        leftovers.remove_run_directory(directory)


def _started(arguments: Namespace) -> ServerStarted:
    names = arguments.served_model_name or arguments.model
    model, ranks = names if isinstance(names, str) else names[0], int(arguments.tensor_parallel_size)
    return ServerStarted(pid=os.getpid(), version=ghostserve.__version__, model=model, ranks=ranks)


def _refuse_parity(arguments: Namespace, config: GhostConfig) -> None:
    """UsageError if there is no code for so many ranks and parity shards."""
    try:
        check_size(arguments.tensor_parallel_size, config.parity_shards)
    except UsageError as error:
        raise UsageError(f"--parity-shards {config.parity_shards}: {error}") from None


def _use_our_parts(arguments: Namespace, config: GhostConfig) -> None:
    """Name our executor, worker and scheduler to vLLM, and what goes with them."""
    worker = "GhostCpuWorker" if current_platform.is_cpu() else "GhostGpuWorker"
    arguments.distributed_executor_backend = "ghostserve.engine.executor.GhostExecutor"
    arguments.worker_cls = f"ghostserve.engine.worker.{worker}"
    arguments.scheduler_cls = "ghostserve.engine.scheduler.make_scheduler"
    if arguments.enable_per_request_metrics:
        arguments.middleware = [*arguments.middleware, RESPONSE_METRICS]
    os.environ[ASYNC_ENV] = "1" if arguments.async_scheduling else "0"
    os.environ[CONFIG_ENV] = config.to_json()
    if arguments.enforce_eager:
        # One helper is compiled even in eager mode: 1.5 s in every replacement, and a compiler needed.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if current_platform.is_cpu() and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = _share_cpus(arguments.tensor_parallel_size)


def _demand_our_platform() -> None:
    """Stock collectives wait for ever for a peer that has died."""
    if not type(current_platform).__module__.startswith("ghostserve."):
        raise UnsupportedError(
            "vLLM did not load ghostserve's platform plugin, which exists for CPU and CUDA: name ghostserve_cpu in "
            "VLLM_PLUGINS too, or unset it, or use --protection none"
        )


def _share_cpus(ranks: int) -> str:
    """CPUs per rank as vLLM writes them, `0,1|2,3`: its own choice needs a NUMA node per rank."""
    cpus = sorted(os.sched_getaffinity(0))
    share = max(1, len(cpus) // ranks)
    parts = [[cpus[(rank * share + index) % len(cpus)] for index in range(share)] for rank in range(ranks)]
    return "|".join(",".join(map(str, part)) for part in parts)


def _run(arguments: Namespace, config: GhostConfig, mount: Mount, *, page: ControlPage | None) -> int:
    """Serve until the end; the exit status.

    Raises UsageError for what only the engine core could find wrong, StartError and EngineLost.
    """
    server = _Server(arguments, config, mount, page)
    try:
        uvloop.run(server.run())
    except (GhostserveError, KeyboardInterrupt):
        raise
    except Exception as error:
        if server.serving:
            raise
        if page is not None and (refused := why_refused(page)) is not None:
            raise UsageError(refused) from error
        cause = load_format.flaw(arguments) or f"{error}; the log above has the cause"
        raise StartError(f"the engine did not start: {cause}") from error
    if server.interrupted:
        return 130
    if server.engine_lost:
        raise EngineLost("the engine could not be repaired; the log above has the cause")
    return 0


class _Engine(AsyncLLM):
    """vLLM's client; tells an engine that was lost from one that was shut down."""

    lost = False
    _stopped = False

    def shutdown(self, timeout: float | None = None) -> None:
        if not self._stopped:
            self._stopped = True
            self.lost = hasattr(self, "engine_core") and bool(self.errored)
        super().shutdown(timeout)

    async def end_requests(self, reason: str) -> None:
        """Every request that is open ends with this error, as 503; the engine core forgets them."""
        processor = self.output_processor
        processor.propagate_error(GracefulHTTPError(reason, HTTPStatus.SERVICE_UNAVAILABLE))
        await self.abort(list(processor.request_states), internal=True)


class _Server:
    """One run of the server; remembers how it ended."""

    def __init__(
        self, arguments: Namespace, config: GhostConfig, mount: Mount, page: ControlPage | None
    ) -> None:
        self._arguments = arguments
        self._config = config
        self._mount = mount
        self._page = page
        self._began_s = monotonic_s()
        self._drain: drain.Drain | None = None
        self.serving = False
        self.engine_lost = False
        self.interrupted = False

    async def run(self) -> None:
        """Bind, start the engine, serve."""
        with unix_socket.owned(self._arguments.uds):
            await self._run()

    async def _run(self) -> None:
        arguments = self._arguments
        try:
            address, sock = setup_server(arguments, reuse_port=False)
        except OSError as error:
            place = arguments.uds or f"{arguments.host}:{arguments.port}"
            raise StartError(f"cannot listen on {place}: {error.strerror or error}") from None
        except (OverflowError, KeyError) as error:
            raise UsageError(str(error)) from None
        try:
            if arguments.tool_parser_plugin and len(arguments.tool_parser_plugin) > 3:
                ToolParserManager.import_tool_parser(arguments.tool_parser_plugin)
            if arguments.reasoning_parser_plugin and len(arguments.reasoning_parser_plugin) > 3:
                ReasoningParserManager.import_reasoning_parser(arguments.reasoning_parser_plugin)
            async with self._engine_client() as engine:
                await (await self._serve_app(engine, address, sock))
        finally:
            sock.close()

    @contextlib.asynccontextmanager
    async def _engine_client(self) -> AsyncIterator[_Engine]:
        engine_args = AsyncEngineArgs.from_cli_args(self._arguments)
        try:
            vllm_config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        except (ValueError, OSError) as error:
            raise UsageError(str(error)) from None
        if self._page is not None:
            refuse_unsupported(vllm_config)
        with felt_at_once():
            engine = _Engine.from_vllm_config(
                vllm_config=vllm_config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                enable_log_requests=engine_args.enable_log_requests,
                aggregate_engine_logging=engine_args.aggregate_engine_logging,
                disable_log_stats=engine_args.disable_log_stats,
            )
        try:
            await engine.reset_mm_cache()
            yield engine
        finally:
            engine.shutdown(timeout=self._engine_ends_within_s(vllm_config.shutdown_timeout))
            self.engine_lost = engine.lost

    def _engine_ends_within_s(self, shutdown_timeout_s: float) -> float:
        """What its requests were given is over once it is told to end; with 0, as vLLM has it, it is killed."""
        if self._drain is None:
            return shutdown_timeout_s
        return 0.0 if self._drain.hurried else min(shutdown_timeout_s, LAST_WORDS_S)

    def _make_drain(self, app: Any, engine: _Engine) -> drain.Drain:
        def stop() -> None:
            app.state.server.should_exit = True
            app.state.server.force_exit = self._drain is not None and self._drain.hurried

        return drain.Drain(
            timeout_s=engine.vllm_config.shutdown_timeout,
            end_open=engine.end_requests,
            engine_lost=lambda: bool(engine.errored),
            stop=stop,
        )

    async def _serve_app(self, engine: _Engine, address: str, sock: Any) -> Any:
        arguments = self._arguments
        extra: dict[str, Any] = {}
        if (log_config := get_uvicorn_log_config(arguments)) is not None:
            extra["log_config"] = log_config
        tasks = await engine.get_supported_tasks()
        app = build_app(arguments, tasks, engine.model_config)
        if self._page is not None:
            self._drain = self._make_drain(app, engine)
            setattr(app.state, drain.STATE_NAME, self._drain)
        self._mount(app, self._page, arguments, self._config)
        await init_app_state(engine, app.state, arguments, tasks)
        logger.info("Starting ghostserve on %s", address)
        self.serving = True
        self._tell(ServerServing(start_s=monotonic_s() - self._began_s))
        interrupts = asyncio.get_running_loop().create_task(self._take_signals(app))
        try:
            return await serve_http(
                app,
                sock=sock,
                enable_ssl_refresh=arguments.enable_ssl_refresh,
                host=arguments.host,
                port=arguments.port,
                log_level=arguments.uvicorn_log_level,
                access_log=not arguments.disable_uvicorn_access_log,
                timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
                # An engine that is told to end in the middle of a recovery answers nobody: not waited for until the clients go.
                timeout_graceful_shutdown=LAST_WORDS_S,
                ssl_keyfile=arguments.ssl_keyfile,
                ssl_certfile=arguments.ssl_certfile,
                ssl_ca_certs=arguments.ssl_ca_certs,
                ssl_cert_reqs=arguments.ssl_cert_reqs,
                ssl_ciphers=arguments.ssl_ciphers,
                h11_max_incomplete_event_size=arguments.h11_max_incomplete_event_size,
                h11_max_header_count=arguments.h11_max_header_count,
                **extra,
            )
        finally:
            interrupts.cancel()

    def _tell(self, event: Event) -> None:
        if self._page is not None:
            self._page.events.tell(event)

    async def _take_signals(self, app: Any) -> None:
        """Once vLLM has installed its handlers: SIGTERM drains; Ctrl-C ends as SIGTERM does, but is remembered."""
        while not getattr(getattr(app.state, "server", None), "started", False):
            await asyncio.sleep(0.05)

        def interrupt() -> None:
            self.interrupted = True
            os.kill(os.getpid(), signal.SIGTERM)

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, interrupt)
        if self._drain is not None:
            loop.add_signal_handler(signal.SIGTERM, self._begin_drain, self._drain)

    def _begin_drain(self, drain: drain.Drain) -> None:
        if not drain.begun:
            self._tell(ServerDraining(timeout_s=drain.timeout_s))
        drain.tell()
