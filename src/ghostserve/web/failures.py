"""What a client is told when one of our routes fails by a mistake of ours: one sentence. The trace goes to the log.

An exception's own text may name files, addresses, or what another client sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as AnyHTTPException

logger = logging.getLogger(__name__)

FAILED = "the server failed to answer this request; its log says why"


class OneSentenceRoute(APIRoute):
    """A route whose unexpected exceptions become a 500 with FAILED."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler that FastAPI makes, with a floor under it."""
        answer = super().get_route_handler()

        async def answer_or_say_so(request: Request) -> Response:
            try:
                return await answer(request)
            except (AnyHTTPException, RequestValidationError):
                raise
            except Exception:
                logger.exception("%s %s failed", request.method, self.path)
                raise HTTPException(500, FAILED) from None

        return answer_or_say_so
