"""The live page at `/ui`: its files as they are shipped, under a policy that lets nothing else run.

The page is a document, a style sheet and ES modules; there is no build step, and nothing comes from elsewhere. It holds no
data, so it is open: a browser that opens an address cannot send a key along; the page asks for the key and sends it with all that it
fetches. Addresses in it are relative, so that it works behind a path prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, HTTPException, Response, params
from fastapi.responses import HTMLResponse

from ghostserve.web.schema import documented

STATIC = Path(__file__).parent / "static"
PROMPTS_FILE = Path(__file__).parents[1] / "models" / "prompts.json"
DOCUMENT = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES = sorted(path.name for path in STATIC.iterdir() if path.suffix in _TYPES)
_NAME = params.Path(json_schema_extra={"enum": FILES})  # for the schema; what is not there is a 404
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_NO_STORE = {"Cache-Control": "no-store"}
_HEADERS = _NO_STORE | {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def add_ui(router: APIRouter, *, enabled: bool, dependencies: Sequence[params.Depends]) -> None:
    """The page's routes; `dependencies` guard what holds data. Where it is off, `/ui` says how to turn it on."""
    if not enabled:

        @router.get("/ui")
        def off() -> Response:
            raise HTTPException(404, "the page is off; start the server with --ui")

        return

    files = {name: (STATIC / name).read_bytes() for name in FILES}

    @router.get("/ui", response_class=HTMLResponse)
    async def ui() -> Response:
        return _file(files, DOCUMENT)

    @router.get("/ui/static/{name}", response_class=Response)
    async def static(name: Annotated[str, _NAME]) -> Response:
        return _file(files, name)

    @router.get("/ui/prompts.json", dependencies=dependencies, **documented())
    def prompts() -> Response:
        return Response(PROMPTS_FILE.read_bytes(), media_type="application/json", headers=_NO_STORE)


def _file(files: dict[str, bytes], name: str) -> Response:
    if name not in files:
        raise HTTPException(404, f"the page has no file {name!r}")
    return Response(files[name], media_type=_TYPES[Path(name).suffix], headers=_HEADERS)
