"""`ghostserve doctor [MODEL] [serve's flags]`: what stands in the way of a server here, and what to do about it.

Starts no engine and imports neither vLLM nor torch; takes seconds. Exit status: 0 nothing fails (there may be warnings),
1 something fails, 2 usage.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ghostserve.cli.arguments import Parser, new_parser
from ghostserve.cli.doctor_checks import Check, Finding, Status, Subject, ok, run_checks
from ghostserve.cli.doctor_devices import check_devices
from ghostserve.cli.doctor_flags import spread
from ghostserve.cli.doctor_machine import (
    check_disk,
    check_memory,
    check_open_files,
    check_port,
    check_shared_memory,
    check_standby,
)
from ghostserve.cli.doctor_model import check_model, check_parity
from ghostserve.cli.doctor_software import (
    check_kernel,
    check_native,
    check_pins,
    check_platform,
    check_plugin,
)
from ghostserve.config import GhostConfig, parse_bytes
from ghostserve.errors import UsageError

EXIT_FAILED = 1
SIGNS = {Status.OK: "ok  ", Status.WARN: "WARN", Status.FAIL: "FAIL"}
CHECKS: tuple[tuple[str, Check], ...] = (
    ("platform", check_platform),
    ("pins", check_pins),
    ("plugin", check_plugin),
    ("native library", check_native),
    ("kernel", check_kernel),
    ("devices", check_devices),
    ("model", check_model),
    ("protection", check_parity),
    ("memory", check_memory),
    ("standbys", check_standby),
    ("shared memory", check_shared_memory),
    ("open files", check_open_files),
    ("port", check_port),
    ("disk", check_disk),
)


def _parser() -> Parser:
    parser = new_parser(
        "doctor",
        "Look at this machine and at what is installed, for a server with these flags. Takes every flag of "
        "'ghostserve serve'; those that no check needs are named and left alone. Exit status 0 unless something fails.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as for serve; it comes first")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument("--model", dest="model_flag", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1, metavar="N")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--uds", metavar="PATH")
    parser.add_argument("--kv-cache-memory-bytes", metavar="BYTES")
    parser.add_argument("--config", metavar="FILE", help="read first, as serve does")
    GhostConfig.add_arguments(parser)
    return parser


def parse(argv: Sequence[str]) -> tuple[Subject, list[str], bool]:
    """What is asked about, the words that nobody here looks at, and whether the report is to be JSON. Raises UsageError."""
    model, words = spread(argv)
    options, others = _parser().parse_known_args(words)
    if options.model is not None:  # argparse took the value of a flag that it does not know for it
        others.append(options.model)
    if options.tensor_parallel_size < 1:
        raise UsageError(f"--tensor-parallel-size {options.tensor_parallel_size}: must be at least 1")
    kv = options.kv_cache_memory_bytes
    subject = Subject(
        model=model or options.model_flag,
        ranks=options.tensor_parallel_size,
        host=options.host,
        port=options.port,
        uds=options.uds,
        kv_cache_bytes=None if kv is None else parse_bytes(kv),
        config=GhostConfig.from_arguments(options),
    )
    return subject, [word for word in others if word.startswith("-")], options.json


def render(findings: Sequence[Finding]) -> str:
    """The table for people: each finding, and below it what to do."""
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    for finding in findings:
        lines.append(f"{SIGNS[finding.status]}  {finding.name:<{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':>{width + 6}}  → {finding.remedy}")
    return "\n".join([*lines, "", _summary(findings)])


def _count(findings: Sequence[Finding], status: Status) -> int:
    return sum(finding.status is status for finding in findings)


def _summary(findings: Sequence[Finding]) -> str:
    warnings, failures = _count(findings, Status.WARN), _count(findings, Status.FAIL)
    if failures:
        return f"{failures} of {len(findings)} fail, {warnings} warn: a server would not start here, or not last."
    return f"Nothing fails, {warnings} of {len(findings)} warn." if warnings else "All is well."


def main(argv: Sequence[str]) -> int:
    """Run the verb; raises UsageError."""
    subject, others, as_json = parse(argv)
    findings = run_checks(CHECKS, subject)
    if others:
        findings.append(ok("flags", f"not looked at: {' '.join(others)}"))
    failures = _count(findings, Status.FAIL)
    if as_json:
        document = {
            "ok": not failures,
            "failures": failures,
            "warnings": _count(findings, Status.WARN),
            "findings": [finding.as_dict() for finding in findings],
        }
        print(json.dumps(document, separators=(",", ":")))
    else:
        print(render(findings))
    return EXIT_FAILED if failures else 0
