"""The routes, below ``/v1/kvblend``: there vLLM's API key is asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as AnyHTTPException

from kvblend_rag.errors import ConfigError, KVBlendError, StoreFull, StoreUnreachable
from kvblend_rag.serving.jobs import QueueFull
from kvblend_rag.serving.schemas import (
    Deleted,
    DeleteRequest,
    ErrorAnswer,
    Info,
    IngestRequest,
    Job,
    Members,
    Membership,
    Prefetched,
    PrefetchRequest,
    Stats,
)
from kvblend_rag.serving.service import Service

logger = logging.getLogger(__name__)

T = TypeVar("T")

PREFIX = "/v1/kvblend"

_STATUS: tuple[tuple[type[KVBlendError], int], ...] = (
    (ConfigError, 400),
    (QueueFull, 429),
    (StoreFull, 507),
    (StoreUnreachable, 503),
)


class _OneSentence(APIRoute):
    """Answers whatever goes wrong with one sentence, in the form of OpenAI's API."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return _problem(400, "BadRequest", _first(error))
            except KVBlendError as error:
                code = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
                return _problem(code, type(error).__name__, str(error))
            except AnyHTTPException as error:  # also of what is no JSON at all
                return _problem(
                    error.status_code,
                    {404: "NotFound", 503: "Unavailable"}.get(error.status_code, "BadRequest"),
                    f"{error.detail.rstrip('.')}.",
                )
            except Exception as error:
                logger.exception("kvblend: %s %s failed.", request.method, request.url.path)
                kind = type(error).__name__
                return _problem(500, "InternalError", f"Something unexpected went wrong ({kind}); the log tells more.")

        return handled


router = APIRouter(
    prefix=PREFIX,
    tags=["kvblend"],
    route_class=_OneSentence,
    responses={code: {"model": ErrorAnswer} for code in (400, 404, 429, 500, 503, 507)},
)

JobId = Annotated[str, Path(max_length=256)]


@router.post("/documents", status_code=202)
async def ingest(given: IngestRequest, request: Request) -> Job:
    """Compute and store the KV of documents, in the background; ask the job for its progress."""
    return await _service(request).ingest(given)


@router.post("/documents/delete")
async def delete(given: DeleteRequest, request: Request) -> Deleted:
    """Forget documents, by id or by group."""
    return await _service(request).delete(given)


@router.post("/documents/members")
async def members(given: Membership, request: Request) -> Members:
    """What documents hold, which stand in groups, and which chunks are not stored."""
    return await _service(request).membership(given)


@router.get("/jobs/{job_id}")
async def job(job_id: JobId, request: Request) -> Job:
    """An ingest job as it stands."""
    return _found(_service(request).jobs.get(job_id), f"There is no ingest job {job_id!r} on this server.")


@router.delete("/jobs/{job_id}")
async def cancel(job_id: JobId, request: Request) -> Job:
    """Stop an ingest job; what it has stored stays."""
    return _found(_service(request).jobs.cancel(job_id), f"There is no ingest job {job_id!r} on this server.")


@router.post("/prefetch")
async def prefetch(given: PrefetchRequest, request: Request) -> Prefetched:
    """Bring chunks into the fastest tier before a prompt asks for them."""
    return await _service(request).prefetch(given)


@router.get("/stats")
async def stats(request: Request, tenant: Annotated[str, Query(max_length=1024)] = "") -> Stats:
    """What the store holds."""
    return await _service(request).stats(tenant)


@router.get("/info")
async def info(request: Request) -> Info:
    """What the server runs, and how it blends."""
    return await _service(request).info()


@router.get("/reports/{request_id}")
async def report(request_id: Annotated[str, Path(max_length=256)], request: Request) -> dict[str, Any]:
    """What became of one of the last requests: the fields of ``BlendReport``; by the ``id`` of its answer."""
    found = await _service(request).report(request_id)
    return _found(found, f"There is no report of a request {request_id!r}: the last 4,096 are kept.")


def _service(request: Request) -> Service:
    service = getattr(request.app.state, "kvblend", None)
    if isinstance(service, Service):
        return service
    reason = service or "the engine is not there yet"
    raise HTTPException(503, f"This server does not blend: {reason}.")


def _found(answer: T | None, otherwise: str) -> T:
    if answer is None:
        raise HTTPException(404, otherwise)
    return answer


def _problem(code: int, kind: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, code)


def _first(error: RequestValidationError) -> str:
    """The first thing that is wrong, without what was sent."""
    problems = error.errors()
    if not problems:
        return "The request is not valid."
    where = ".".join(str(part) for part in problems[0]["loc"] if part != "body")
    what = str(problems[0]["msg"]).removeprefix("Value error, ").splitlines()[0]
    more = f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
    return f"{where}: {what}{more}." if where else f"{what}{more}."


__all__ = ["PREFIX", "router"]
