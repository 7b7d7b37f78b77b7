"""What the verbs share: a parser whose errors are ours, and the options that name a server."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import NoReturn

from ghostserve.errors import UsageError
from ghostserve.web.admin import AdminClient, Tls
from ghostserve.web.keys import ADMIN_KEY_VARIABLE, read_keys

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "GHOSTSERVE_URL"
KEY_VARIABLES = ("GHOSTSERVE_API_KEY", "VLLM_API_KEY")
CA_VARIABLE = "SSL_CERT_FILE"


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
    """The server's address, the key for it, TLS as with curl, and `--json`."""
    parser.add_argument("--url", help=f"the server's address (default: ${URL_VARIABLE}, or {DEFAULT_URL})")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "--api-key", help=f"the server's key (default: ${KEY_VARIABLES[0]} or ${KEY_VARIABLES[1]})"
    )
    keys.add_argument("--api-key-file", metavar="FILE", help="a file whose first line is the key")
    parser.add_argument(
        "--cacert",
        metavar="FILE",
        help=f"with https: the certificates to trust, instead of the known authorities (default: ${CA_VARIABLE})",
    )
    parser.add_argument(
        "--cert", metavar="FILE", help="with https: our certificate, where the server wants one"
    )
    parser.add_argument("--key", metavar="FILE", help="the private key of --cert, if it is not in that file")
    parser.add_argument("--json", action="store_true", help=as_json)


def add_admin_key_options(parser: argparse.ArgumentParser) -> None:
    """The key for fault injection, for servers that have one."""
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "--admin-api-key",
        metavar="KEY",
        help=f"the server's admin key, where it has one (default: ${ADMIN_KEY_VARIABLE})",
    )
    keys.add_argument("--admin-api-key-file", metavar="FILE", help="a file whose first line is the admin key")


def admin_of(options: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> AdminClient:
    """The client for the server that the options name; a flag wins over the environment. Raises UsageError."""
    keys = (environment.get(name) for name in KEY_VARIABLES)
    admin_key = None
    if hasattr(options, "admin_api_key"):
        admin_key = _key(options.admin_api_key, options.admin_api_key_file) or environment.get(
            ADMIN_KEY_VARIABLE
        )
    if options.key and not options.cert:
        raise UsageError(f"--key {options.key}: give the certificate it belongs to with --cert")
    return AdminClient(
        options.url or environment.get(URL_VARIABLE) or DEFAULT_URL,
        api_key=_key(options.api_key, options.api_key_file) or next((key for key in keys if key), None),
        admin_key=admin_key or None,
        tls=Tls(cacert=options.cacert or environment.get(CA_VARIABLE), cert=options.cert, key=options.key),
    )


def _key(given: str | None, file: str | None) -> str | None:
    return read_keys(file)[0] if file else given
