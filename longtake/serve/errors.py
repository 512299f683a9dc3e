"""What a client is told when something cannot be done: code, what was got, rule, fix; no path and no traceback."""

from __future__ import annotations

import logging
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from longtake.errors import ConfigError, DataError, LongtakeError, OutputError

logger = logging.getLogger(__name__)

# Codes of errors that the framework raises, by status
_CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "bad_request",
    413: "too_large",
    415: "unusable",
    422: "bad_request",
    429: "too_many",
    503: "full",
}


class ApiError(HTTPException):
    """An error that a client is told of."""

    def __init__(self, status: int, code: str, message: str, fix: str) -> None:
        super().__init__(status, message)
        self.code, self.message, self.fix = code, message, fix

    def body(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": self.message, "fix": self.fix}}


def not_found() -> ApiError:
    """For sessions that are not there, and for secrets that are not theirs: nobody learns which of the two it is."""
    return ApiError(404, "not_found", "there is no such session with this secret", "create one, or open a saved one")


def told(error: BaseException) -> ApiError:
    """What a client is told of an error of ours, of a full memory, or of a bug."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return ApiError(507, "out_of_memory", "the memory is full", "end another session, or rewind less")
    if isinstance(error, ConfigError):
        message, _, fix = str(error).rpartition("; ")
        return ApiError(409, "conflict", message or fix, fix if message else "change the request")
    if isinstance(error, OutputError):
        return ApiError(507, "failed", "the server cannot write to its disk", "try again later; its log says more")
    if isinstance(error, DataError):
        return ApiError(422, "unusable", "the picture cannot be taken", "give a whole PNG, JPEG or WebP file")
    if isinstance(error, LongtakeError):
        return ApiError(422, "unusable", "what is stored cannot be used", "use another save, or open a new session")
    return ApiError(500, "failed", "the server failed to do this", "try again; its log says more")


def tell_errors(app: FastAPI) -> None:
    """Has an application answer each error as `{error: {code, message, fix}}`."""

    @app.exception_handler(HTTPException)
    async def _of_http(request: Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, ApiError):
            code = _CODES.get(error.status_code, "failed")
            error = ApiError(error.status_code, code, str(error.detail), "see /openapi.json")
        return JSONResponse(error.body(), error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def _of_values(request: Request, error: RequestValidationError) -> JSONResponse:
        wrong = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()][:5]
        said = ApiError(422, "bad_request", "; ".join(wrong), "send the values that /openapi.json describes")
        return JSONResponse(said.body(), 422)

    @app.exception_handler(LongtakeError)
    async def _of_ours(request: Request, error: LongtakeError) -> JSONResponse:
        said = told(error)
        return JSONResponse(said.body(), said.status_code)

    @app.exception_handler(Exception)
    async def _of_bugs(request: Request, error: Exception) -> JSONResponse:
        said = told(error)
        return JSONResponse(said.body(), said.status_code)
