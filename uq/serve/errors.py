"""Errors as OpenAI's clients read them: an HTTP status and a JSON body."""

from __future__ import annotations

from http import HTTPStatus

from starlette.responses import JSONResponse

from uq.errors import UqError

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(UqError):
    """A request that gets no answer.

    Attributes:
        param: the field of the body that is wrong; `code`: for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, object]:
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status)
        return {
            "error": {
                "message": str(self),
                "type": kind or "invalid_request_error",
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {
            HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": "Bearer"},
            HTTPStatus.SERVICE_UNAVAILABLE: {"Retry-After": "1"},
        }.get(HTTPStatus(self.status))
        return JSONResponse(self.body, self.status, headers)
