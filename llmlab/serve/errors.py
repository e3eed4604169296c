"""What can go wrong with a request, in the API's own form: {"error": {message, type, param, code}}."""

import json
import logging
from typing import Any

from starlette.responses import Response

from llmlab.core.errors import UserError
from llmlab.data.rows import BadRowError
from llmlab.infer.service import Closing, Failed, Overloaded

_log = logging.getLogger(__name__)
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error. `message` says what was given and how to mend it; param: the field it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        """As JSON has it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Json(Response):
    """JSON in UTF-8. What a client sent may come back in it, lone surrogates too."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def api_error(error: BaseException) -> ApiError:
    """What a client is told of an error; one that is nobody's fault but ours is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BadRowError):
        return ApiError(400, str(error), param="messages")
    if isinstance(error, UserError):
        code = "context_length_exceeded" if "positions" in str(error) else None
        return ApiError(400, str(error), code=code)
    if isinstance(error, RecursionError):
        return ApiError(400, "the request is nested too deeply")
    if isinstance(error, Overloaded):
        refused = ApiError(429, str(error), code="overloaded")
        refused.headers["Retry-After"] = str(error.retry_after)
        return refused
    if isinstance(error, Closing):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, Failed):
        return ApiError(500, "the engine has stopped on an error: the server's log says which", code="engine_stopped")
    _log.error("a request has failed", exc_info=error)
    return ApiError(500, "an error of the server's: its log says which")


def response(error: BaseException) -> Json:
    """The answer that says so."""
    told = api_error(error)
    return Json(told.body(), told.status, told.headers)
