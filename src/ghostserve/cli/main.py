"""The command `ghostserve`: finds the verb, runs it, and turns what it raises into an exit code.

    0 ok · 1 a check failed · 2 usage or unsupported · 3 the start failed · 4 the engine is lost · 130
    interrupted

A verb is a module with `main(argv) -> int`, imported only when it is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ghostserve
from ghostserve.cli.platform_check import demand_supported_platform, read_platform
from ghostserve.errors import GhostserveError, UnsupportedError, UsageError

EXIT_INTERRUPTED = 130
VERBS = {
    "serve": "serve a model over the OpenAI API; takes every flag of vLLM's own server",
    "status": "show a running server's workers, shadow and recoveries",
    "kill": "have a running server suffer a fault, by default the death of a worker",
    "events": "show what has happened on a server, and with --follow what happens next",
    "story": "tell everything that happened to one request or one rank",
    "doctor": "look for what stands in the way of a server here, with a remedy for each finding",
    "models": "list, fetch, check, warm, pin and remove models, on the disk and in memory",
    "demo": "kill a worker in the middle of an answer and check that the answer goes on unchanged",
    "bench": "measure what the codec, or loading weights, reaches on this machine",
    "chaos": "load a server, have faults of all kinds strike it, and compare every answer",
    "simulate": "try thousands of schedules of losses and faults on a simulated cluster",
}
NEEDS_PLATFORM = frozenset({"serve", "demo", "chaos"})
"""The verbs that start a server here; the others only ask one, which may be elsewhere."""
HELP = frozenset({"-h", "--help"})
ONLY_TELLS = HELP | {"help", "-V", "--version", "status", "events", "story"}
"""What is done once it has said what it knows, whether or not anyone read it to the end."""
EXIT_UNHEARD = 1


def version_line() -> str:
    """Our version, vLLM's and torch's."""
    facts = read_platform()
    return (
        f"ghostserve {ghostserve.__version__} (vllm {facts.vllm or 'not installed'}, "
        f"torch {facts.torch or 'not installed'})"
    )


def help_text() -> str:
    """What `ghostserve --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    return (
        "usage: ghostserve [--help] [--version] VERB [OPTION ...]\n\n"
        "LLM serving that survives the death of a worker: open streams go on, token for token.\n\n"
        f"verbs:\n{verbs}\n\n"
        "'ghostserve VERB --help' shows the options of a verb.\n\n"
        "exit status: 0 ok, 1 a check failed, 2 usage or unsupported, 3 the start failed,\n"
        "4 the engine is lost, 130 interrupted"
    )


def run_verb(argv: Sequence[str]) -> int:
    """Run what the command line names; raises GhostserveError, or SystemExit from a verb's `--help`."""
    if not argv:
        raise UsageError(f"name a verb: {', '.join(VERBS)} (try 'ghostserve --help')")
    verb, *rest = argv
    if verb in HELP or verb == "help":
        print(help_text())
        return 0
    if verb in ("-V", "--version"):
        print(version_line())
        return 0
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "try 'ghostserve --help'"
        raise UsageError(f"there is no verb {verb!r}; {hint}")
    if verb in NEEDS_PLATFORM and not HELP & set(rest):
        demand_supported_platform()
    with _missing_packages_as_ours():
        module = importlib.import_module(f"ghostserve.cli.{verb}")
        code: int = module.main(rest)
    return code


@contextmanager
def _missing_packages_as_ours() -> Iterator[None]:
    """Turn the ImportError of somebody else's package into UnsupportedError; one of ours is a bug."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "ghostserve":
            raise
        raise UnsupportedError(f"a package is missing or broken ({error}): run 'make install'") from error


def _exit_code(argv: Sequence[str]) -> int:
    try:
        return run_verb(argv)
    except GhostserveError as error:
        print(f"ghostserve: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("ghostserve: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as request:
        if isinstance(request.code, str):
            print(f"ghostserve: error: {request.code}", file=sys.stderr)
            return GhostserveError.exit_code
        return request.code or 0


def code_unheard(argv: Sequence[str]) -> int:
    """The exit code where the reader went away, as `head` does: 0 only if telling was all there was to do.

    A demo that was cut short has checked nothing and must not pass for a success.
    """
    told = bool(argv) and (
        argv[0] in ONLY_TELLS or bool(HELP & set(argv)) or list(argv[:2]) == ["models", "ls"]
    )
    return 0 if told else EXIT_UNHEARD


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors go to standard error as one line each."""
    words = sys.argv[1:] if argv is None else argv
    code = 0
    try:
        code = _exit_code(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # Or the interpreter would fail in the same way when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or code_unheard(words)
    return code


if __name__ == "__main__":
    sys.exit(main())
