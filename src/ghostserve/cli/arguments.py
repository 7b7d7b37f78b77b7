"""What the verbs share: a parser whose errors are ours, and the options that name a server."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import NoReturn

from ghostserve.errors import UsageError
from ghostserve.web.admin import AdminClient

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "GHOSTSERVE_URL"
KEY_VARIABLES = ("GHOSTSERVE_API_KEY", "VLLM_API_KEY")


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of ending the process, so that `main` prints every error alike."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (try '{self.prog} --help')")


def new_parser(verb: str, description: str) -> Parser:
    """The parser of one verb."""
    return Parser(prog=f"ghostserve {verb}", description=description, allow_abbrev=False)


def add_server_options(
    parser: argparse.ArgumentParser, *, as_json: str = "print one JSON object on one line"
) -> None:
    """`--url`, `--api-key` and `--json`."""
    parser.add_argument("--url", help=f"the server's address (default: ${URL_VARIABLE}, or {DEFAULT_URL})")
    parser.add_argument(
        "--api-key", help=f"the server's key (default: ${KEY_VARIABLES[0]} or ${KEY_VARIABLES[1]})"
    )
    parser.add_argument("--json", action="store_true", help=as_json)


def admin_of(options: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> AdminClient:
    """The client for the server that the options name; a flag wins over the environment."""
    keys = (environment.get(name) for name in KEY_VARIABLES)
    return AdminClient(
        options.url or environment.get(URL_VARIABLE) or DEFAULT_URL,
        api_key=options.api_key or next((key for key in keys if key), None),
    )
