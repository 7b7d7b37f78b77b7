"""`ghostserve chaos`: a server under mixed load, faults of all kinds, and every answer compared with the one without.

Exit status 1 on any violation: a token lost, repeated or changed, a request that failed, something left behind, or a
server that computes anew what it could restore.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ghostserve.arena.fault_kinds import FaultKind
from ghostserve.arena.memory_group import MemoryGroup
from ghostserve.cli.arguments import Parser, new_parser
from ghostserve.cli.signals import signals_like_ctrl_c
from ghostserve.clock import monotonic_s
from ghostserve.errors import UnsupportedError, UsageError
from ghostserve.testing.chaos_load import MODELS_DIR, make_requests
from ghostserve.testing.chaos_processes import OwnNames, left_behind
from ghostserve.testing.chaos_report import as_document, as_text
from ghostserve.testing.chaos_run import Chaos, Settings
from ghostserve.testing.fault_plan import FaultPlan
from ghostserve.testing.fault_runner import demand_possible
from ghostserve.testing.private_pool import private_pool, private_pool_env
from ghostserve.testing.server import ServerProcess, ghostserve_command

EXIT_VIOLATION = 1
START_TIMEOUT_S = 600.0
MODEL_NAME = "chaos"
TINY_FLAGS = (
    "--tensor-parallel-size", "2",
    "--dtype", "float32",
    "--enforce-eager",
    "--max-model-len", "4096",
    "--max-num-seqs", "16",
    "--max-num-batched-tokens", "256",
    "--block-size", "32",
    "--kv-cache-memory-bytes", str(48 << 20),
)  # fmt: skip
OWN_FLAGS = ("--enable-fault-injection", "--losses-max", "100000")  # more than a server should stand
CONTROLS = ("force_recompute", "skip_restore")
DEFAULT_FAULTS = 20


def _parser() -> Parser:
    parser = new_parser(
        "chaos",
        "Load a server, have faults of all kinds strike it at random, and compare every answer with the one that it "
        "gives without faults. Without MODEL the shipped one is served by two workers.",
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="strike for so long")
    parser.add_argument(
        "--faults",
        type=int,
        metavar="N",
        help=f"strike until N faults have counted (default: {DEFAULT_FAULTS})",
    )
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="the faults of this plan (JSON or YAML) instead"
    )
    parser.add_argument(
        "--seed", type=int, metavar="S", help="of requests and faults (default: drawn, and told)"
    )
    parser.add_argument("--kinds", metavar="KIND,...", help=f"only these kinds: {', '.join(FaultKind)}")
    parser.add_argument("--streams", type=int, default=6, metavar="C", help="requests at a time (default: 6)")
    parser.add_argument("--requests", type=int, default=24, metavar="R", help="different ones (default: 24)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the server's log here")
    parser.add_argument(
        "--control",
        choices=CONTROLS,
        help="negative control: break the server in this way; the run must fail",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line at the end")
    parser.add_argument(
        "serve",
        nargs=argparse.REMAINDER,
        metavar="MODEL ...",
        help="a model and flags as for 'ghostserve serve'",
    )
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked; raises UsageError."""
    options = _parser().parse_args(argv)
    for name, least in (("faults", 1), ("streams", 1), ("requests", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}: must be at least {least}")
    if options.minutes is not None and options.minutes <= 0:
        raise UsageError(f"--minutes {options.minutes}: must be above 0")
    if options.plan is not None and (options.faults is not None or options.kinds is not None):
        raise UsageError("--plan says which faults strike: leave --faults and --kinds out")
    if options.kinds is not None:
        kinds_of(options.kinds, standbys=True)  # a wrong one is told before a server is started
    if options.serve and options.serve[0].startswith("-"):
        raise UsageError(f"{options.serve[0]}: flags for the server follow its MODEL")
    if options.plan is not None:
        options.plan = FaultPlan.from_file(options.plan)
        demand_possible(options.plan)
    if options.minutes is None and options.faults is None and options.plan is None:
        options.faults = DEFAULT_FAULTS
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 31)
    return options


def kinds_of(text: str | None, *, standbys: bool) -> tuple[FaultKind, ...]:
    """The kinds to draw from: those named, or all that can be brought about here. Raises UsageError."""
    if text is not None:
        names = [name.strip() for name in text.split(",")]
        unknown = [name for name in names if name not in tuple(FaultKind)]
        if unknown:
            raise UsageError(f"there is no kind {unknown[0]!r}; known are {', '.join(FaultKind)}")
        return tuple(map(FaultKind, names))
    missing = set() if standbys else {FaultKind.STANDBY_DEAD}
    try:
        MemoryGroup.demand()
    except UnsupportedError:
        missing.add(FaultKind.OOM)
    return tuple(kind for kind in FaultKind if kind not in missing)


def main(argv: Sequence[str]) -> int:
    """Run the verb; raises GhostserveError. Exit 0 only without a violation."""
    options = parse(argv)
    out = sys.stderr if options.json else sys.stdout

    def say(text: str) -> None:
        print(text, file=out, flush=True)

    began_s = monotonic_s()
    with ExitStack() as stack:
        stack.enter_context(signals_like_ctrl_c())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ghostserve-chaos-")))
        stack.enter_context(private_pool(directory))
        own = directory / "server"
        own.mkdir()
        server = ServerProcess(
            [*_command(options.serve), *OWN_FLAGS, "--served-model-name", MODEL_NAME],
            log_dir=directory,
            log_file=options.log,
            env={
                "TMPDIR": str(own),
                "TORCHINDUCTOR_CACHE_DIR": str(directory / "cache"),
                **private_pool_env(directory),
            },
        )
        stack.callback(server.kill_tree)
        say(f"seed {options.seed}: starting a server")
        server.start()
        server.wait_ready(timeout_s=START_TIMEOUT_S)
        standbys = bool(server.status().get("standbys"))
        prompts = [
            item["prompt"] for item in json.loads((MODELS_DIR / "prompts.json").read_text(encoding="utf-8"))
        ]
        if options.control is not None:
            server.set_switch(options.control, True)
        chaos = Chaos(
            server=server,
            model=MODEL_NAME,
            settings=Settings(
                requests=make_requests(options.requests, rng=random.Random(options.seed), prompts=prompts),
                streams=options.streams,
                seed=options.seed,
                kinds=kinds_of(options.kinds, standbys=standbys),
                faults_wanted=options.faults,
                seconds=None if options.minutes is None else 60 * options.minutes,
                plan=options.plan,
            ),
            say=say,
        )
        chaos.run()
        chaos.tally.left_behind = _end(server, own, chaos.names)
    document = as_document(chaos.tally, seed=options.seed, wall_s=monotonic_s() - began_s)
    say(as_text(document))
    if options.json:
        print(json.dumps(document, separators=(",", ":")), flush=True)
    return 0 if document["ok"] else EXIT_VIOLATION


def _end(server: ServerProcess, own: Path, names: OwnNames) -> list[str]:
    """Have the server end by itself, and see what stays."""
    if server.poll() is None:
        server.terminate()
    return left_behind(server, own, names)


def _command(serve: Sequence[str]) -> list[str]:
    model, *flags = serve or (str(MODELS_DIR / "tiny-llama"), *TINY_FLAGS)
    return ghostserve_command(model, *flags)
