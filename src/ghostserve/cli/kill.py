"""`ghostserve kill`: have a running server suffer a fault. It must run with `--enable-fault-injection`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ghostserve.arena.fault_kinds import KINDS, NAMES, FaultKind, Victim, kind_of
from ghostserve.cli.arguments import add_admin_key_options, add_server_options, admin_of, new_parser
from ghostserve.errors import UsageError

_SUBJECTS = {
    Victim.RANK: "the worker",
    Victim.KEEPER: "the keeper",
    Victim.ENGINE: "the engine",
    Victim.STANDBY: "a standby",
    Victim.CLIENT: "a client",
}
_BY_SERVER = [
    str(name) for name in NAMES if (kind := kind_of(name)) and KINDS[kind].victim is not Victim.CLIENT
]


def main(argv: Sequence[str]) -> int:
    """Run the verb; raises GhostserveError. Returns once the fault is inflicted, not once it is repaired."""
    options = _parser().parse_args(argv)
    if options.disarm:
        admin_of(options).disarm_faults()
        print('{"armed":null}' if options.json else "no fault is armed any more")
        return 0
    kind = kind_of(options.how)
    assert kind is not None
    if options.rank is None and KINDS[kind].victim is Victim.RANK:
        raise UsageError(f"--how {options.how} needs a worker: name it with --rank")
    admin = admin_of(options)
    answer = admin.inflict(kind.value, rank=options.rank, steps=options.steps, factor=options.factor)
    print(json.dumps(answer, separators=(",", ":")) if options.json else sentence(answer))
    return 0


def sentence(answer: Mapping[str, Any]) -> str:
    """What was done, for people."""
    kind = FaultKind(answer["how"])
    rank, pid = answer["rank"], answer["pid"]
    process = "" if pid is None else f" (process {pid})"
    if kind is FaultKind.CRASH:
        return f"rank {rank} was killed: SIGKILL to process {pid}"
    subject = _SUBJECTS[KINDS[kind].victim] if rank is None else f"rank {rank}"
    return f"{subject}{process} {KINDS[kind].what}: {answer['strikes']}"


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "kill",
        "Have a server suffer a fault, by default the death of a worker. The server must run with "
        "--enable-fault-injection.",
    )
    kinds = {
        FaultKind(kind).value: f"{_SUBJECTS[facts.victim]} {facts.what}" for kind, facts in KINDS.items()
    }
    parser.add_argument("--rank", type=int, help="the worker's rank, counted from 0")
    parser.add_argument(
        "--how",
        choices=_BY_SERVER,
        default=FaultKind.CRASH.value,
        help="; ".join(f"{name}: {what}" for name, what in kinds.items() if name in _BY_SERVER)
        + "; corrupt: as corrupt_kv (default: crash)",
        metavar="KIND",
    )
    parser.add_argument(
        "--for",
        dest="steps",
        type=int,
        metavar="STEPS",
        help="slow, memory_exhausted: for so many steps; 0: until --disarm (default: 20)",
    )
    parser.add_argument("--factor", type=int, metavar="K", help="slow: so many times slower (default: 5)")
    parser.add_argument(
        "--disarm", action="store_true", help="inflict nothing, but forget every fault that has not struck"
    )
    add_server_options(parser)
    add_admin_key_options(parser)
    return parser
