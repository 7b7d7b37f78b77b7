"""`ghostserve demo`: a real server, a real SIGKILL in the middle of an answer, and a check that nobody
could tell.

    start the server ─▶ the answer, unfailed ─▶ the same request, one worker killed at token K ─▶ compare ─▶
    stop
                         (the reference)         (another cache salt, so that neither run feeds on the other)

Everything that is shown was measured in this run. The server is stopped in any case; its log is kept only
with `--log-file`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ghostserve.cli.arguments import new_parser
from ghostserve.cli.demo_report import DemoRun, build_report, failures, headline
from ghostserve.cli.demo_run import MODEL_NAME, MODELS_DIR, raise_if_lost, run
from ghostserve.cli.demo_scratch import scratch_directory
from ghostserve.cli.demo_view import View
from ghostserve.cli.signals import signals_like_ctrl_c
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import UsageError
from ghostserve.testing.private_pool import private_pool, private_pool_env
from ghostserve.testing.server import ServerProcess, ghostserve_command

KV_CACHE_BYTES = 64 << 20
START_TIMEOUT_S = 300.0
EXIT_CHECK_FAILED = 1
LOG_PREFIX = re.compile(r"^(\([^)]*\) )?([A-Z]+ [\d-]+ [\d:]+ (\[[^\]]*\] )?)?")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked against each other; raises UsageError."""
    parser = new_parser(
        "demo", "Kill a worker in the middle of an answer and check that the answer goes on, token for token."
    )
    add = parser.add_argument
    add("--tensor-parallel-size", type=int, default=2, choices=(1, 2, 4), help="workers (default: 2)")
    add("--rank", type=int, help="the worker to kill (default: the last)")
    add("--max-tokens", type=int, default=600, help="length of the answer in tokens (default: 600)")
    add("--at-token", type=int, metavar="K", help="kill when K tokens have arrived (default: two thirds)")
    add("--no-restore", action="store_true", help="negative control: do not restore the lost KV; must exit 1")
    add("--stay", action="store_true", help="leave the server and its page up until Ctrl-C")
    add(
        "--json",
        action="store_true",
        help="print one JSON object on one line; all else goes to standard error",
    )
    add("--log-file", type=Path, metavar="F", help="write the server's log there (default: thrown away)")
    add("--port", type=int, help="the server's port (default: a free one)")
    options = parser.parse_args(argv)
    ranks = options.tensor_parallel_size
    options.rank = ranks - 1 if options.rank is None else options.rank
    if not 0 <= options.rank < ranks:
        raise UsageError(f"--rank {options.rank} does not exist; ranks are 0 to {ranks - 1}")
    if not 2 <= options.max_tokens <= 3800:
        raise UsageError(f"--max-tokens {options.max_tokens} is outside 2 to 3800")
    options.at_token = options.max_tokens * 2 // 3 if options.at_token is None else options.at_token
    if not 1 <= options.at_token < options.max_tokens:
        raise UsageError(f"--at-token {options.at_token} is outside 1 to {options.max_tokens - 1}")
    if options.port is not None and not 1 <= options.port <= 65535:
        raise UsageError(f"--port {options.port} is outside 1 to 65535")
    return options


def demo_server(options: argparse.Namespace, log_dir: Path) -> ServerProcess:
    """The server that the demo runs on, not started yet. Raises UsageError if its log cannot be written."""
    flags = {
        "--served-model-name": MODEL_NAME,
        "--tensor-parallel-size": str(options.tensor_parallel_size),
        "--dtype": "float32",
        "--block-size": "32",
        "--max-model-len": "4096",
        "--max-num-seqs": "8",
        "--kv-cache-memory-bytes": str(KV_CACHE_BYTES),
    }
    command = ghostserve_command(
        MODELS_DIR / MODEL_NAME, "--enforce-eager", "--enable-fault-injection", "--ui"
    )
    for flag, value in flags.items():
        command += [flag, value]
    if options.log_file is not None:
        _prepare_log(options.log_file)
    return ServerProcess(
        command,
        log_dir=log_dir,
        log_file=options.log_file,
        port=options.port,
        env=private_pool_env(log_dir),
    )


def _prepare_log(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise UsageError(f"--log-file {path} cannot be written: {error.strerror}") from None


def _shorten(log_line: str) -> str:
    """A log line without who wrote it, when and where, cut to fit a terminal."""
    return LOG_PREFIX.sub("", log_line).strip()[:90]


def start(server: ServerProcess, view: View, *, ranks: int) -> None:
    """Start the server and wait for it; raises StartError."""
    view.step(f"starting a server with {ranks} workers on {MODEL_NAME}")
    server.start()
    began_s = monotonic_s()
    server.wait_ready(
        timeout_s=START_TIMEOUT_S,
        on_progress=lambda seconds, log: view.detail(f"  … {seconds:.0f} s  {_shorten(log)}"),
    )
    state = server.status()
    workers = ", ".join(f"rank {rank['rank']} is pid {rank['pid']}" for rank in state["ranks"])
    view.line(f"ready after {monotonic_s() - began_s:.0f} s: {workers}")


def judge(found: DemoRun, view: View, *, as_json: bool) -> int:
    """Print the result; the exit code."""
    report = build_report(found)
    view.outcome(report, found.state, headline=headline(report))
    reasons = failures(report, found)
    for reason in reasons:
        view.bad(f"check failed: {reason}")
    if as_json:
        print(json.dumps(report, separators=(",", ":")), flush=True)
    return EXIT_CHECK_FAILED if reasons else 0


def stay(server: ServerProcess, view: View) -> None:
    """Leave the server up until Ctrl-C; raises EngineLost if it ends before."""
    view.step(f"the server stays up: {server.base_url}/ui (Ctrl-C ends it)")
    try:
        while server.poll() is None:
            sleep_s(0.5)
    except KeyboardInterrupt:
        return
    with view.filling_silence(lambda: "the server ended; waiting for its exit status"):
        raise_if_lost(server)


def stop(server: ServerProcess, view: View) -> None:
    """Stop the server, come what may: whoever reads the view may be gone by now."""
    try:
        with suppress(OSError):
            view.detail("stopping the server")
        with view.filling_silence(lambda: "still stopping the server"):
            server.stop()
    finally:
        server.kill_tree()  # does nothing more unless the stop was interrupted


def main(argv: Sequence[str]) -> int:
    """Run the verb; raises GhostserveError. Exit 0 only if every check held."""
    options = parse(argv)
    out = sys.stderr if options.json else sys.stdout
    view = View(out, show_text=not options.json, colour=out.isatty())
    with signals_like_ctrl_c(), scratch_directory() as log_dir, private_pool(log_dir):
        server = demo_server(options, log_dir)
        try:
            start(server, view, ranks=options.tensor_parallel_size)
            found = run(
                server,
                view,
                rank=options.rank,
                at_token=options.at_token,
                max_tokens=options.max_tokens,
                restore=not options.no_restore,
            )
            code = judge(found, view, as_json=options.json)
            if options.stay:
                stay(server, view)
            return code
        finally:
            stop(server, view)
