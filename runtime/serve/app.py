"""The HTTP paths of the server. Knows nothing about sockets or the scheduler.

Every error is sent in OpenAI's form; FastAPI's status 422 becomes 400.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from runtime.serve.errors import ApiError, JsonResponse
from runtime.serve.metrics import CONTENT_TYPE
from runtime.serve.openai import schemas
from runtime.serve.openai.calls import Call
from runtime.serve.openai.schemas import (
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    Model,
    ModelList,
    State,
)
from runtime.serve.openai.shapes import AnswerId, ChatShape, CompletionShape
from runtime.serve.openai.streaming import Reply
from runtime.serve.page import page_response
from runtime.serve.service import Engine, Service

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be served as it is"},
    "5XX": {"model": ErrorBody, "description": "The server cannot serve it, or not now"},
}
SSE = {"text/event-stream": {"schema": {"type": "string"}}}


def make_app(service: Service) -> FastAPI:
    """Build the application of one service, which starts loading when the server starts."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> Any:
        service.begin_to_load()
        yield

    app = FastAPI(
        title="mistralc", version="1", docs_url=None, redoc_url=None, lifespan=lifespan
    )  # FastAPI's documentation pages load scripts from other hosts
    _add_state(app, service)
    _add_api(app, service)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(Exception, _on_defect)
    return app


def _add_state(app: FastAPI, service: Service) -> None:
    protected = _key_in_schema(service)

    def state(status: schemas.Status, *, good: bool) -> Response:
        return JsonResponse({"status": status}, 200 if good else 503)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return page_response()

    @app.get("/health", response_model=State, responses={503: {"model": State}})
    async def health() -> Response:
        """200 while the process can serve requests; 503 once its backend has failed."""
        failed = service.state == "failed"
        return state("failed" if failed else "ok", good=not failed)

    @app.get("/ready", response_model=State, responses={503: {"model": State}})
    async def ready() -> Response:
        """200 while new requests are accepted; 503 while loading, draining or failed."""
        return state(service.state, good=service.state == "ready")

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=protected, responses=ERRORS)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _add_api(app: FastAPI, service: Service) -> None:
    protected = _key_in_schema(service)
    model = Model(id=service.settings.model, created=service.created)

    @app.get("/v1/models", dependencies=protected, responses=ERRORS)
    async def models() -> ModelList:
        """List the one model of this server."""
        return ModelList(data=[model])

    @app.get("/v1/models/{name:path}", dependencies=protected, responses=ERRORS)
    async def one_model(name: str) -> Model:
        """Describe the model of this name."""
        _check_model(name, model.id)
        return model

    async def reply(
        name: str, translate: Callable[[Engine], Call], shape: Any, prefix: str
    ) -> Response:
        _check_model(name, model.id)
        engine = service.ready()
        call = await asyncio.to_thread(translate, engine)
        answer = AnswerId(prefix=prefix, model=model.id, system_fingerprint=engine.fingerprint)
        return Reply(
            service.start(call),
            call,
            shape(engine.tokenizer, answer, logprobs=call.logprobs is not None),
            engine.tokenizer,
            service.settings.limits.timeout_s,
        )

    @app.post("/v1/completions", dependencies=protected, response_model=schemas.Completion,
              responses=ERRORS | {200: {"content": SSE}})  # fmt: skip
    async def completions(body: CompletionRequest) -> Response:
        """Continue text."""
        return await reply(
            body.model, lambda e: e.translator.completion(body), CompletionShape, "cmpl"
        )

    @app.post("/v1/chat/completions", dependencies=protected,
              response_model=schemas.ChatCompletion,
              responses=ERRORS | {200: {"content": SSE}})  # fmt: skip
    async def chat_completions(body: ChatRequest) -> Response:
        """Answer the last message of a chat."""
        return await reply(body.model, lambda e: e.translator.chat(body), ChatShape, "chatcmpl")


def _key_in_schema(service: Service) -> list[Any]:
    """Put the API key into the OpenAPI schema, if one is needed. `Gate` checks it."""
    return [Security(HTTPBearer(auto_error=False))] if service.settings.api_keys else []


def _check_model(requested: str, served: str) -> None:
    if requested != served:
        raise ApiError(
            404, f"There is no model {requested!r} here; this server has {served!r}.",
            param="model", code="model_not_found",
        )  # fmt: skip


async def _on_http_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return error.response()
    if not isinstance(error, HTTPException):
        raise error
    reason = str(error.detail).rstrip(".")
    answer = ApiError(error.status_code, f"{request.method} {request.url.path}: {reason}.")
    response = answer.response()
    response.headers.update(error.headers or {})
    return response


async def _on_invalid(_request: Request, error: Exception) -> Response:
    """Report the first error in a body."""
    if not isinstance(error, RequestValidationError):
        raise error
    errors = error.errors()
    first = errors[0]
    where: Sequence[Any] = first["loc"][1:]  # after "body"
    param = str(where[0]) if where else None
    if first["type"] == "json_invalid":
        answer = ApiError(400, f"The body is not JSON: {first['ctx']['error']}.")
    elif first["type"] == "extra_forbidden":
        answer = ApiError(
            400, f"{'.'.join(map(str, where))} is not supported here, and ignoring it could change "
            "the answer. Leave it out.", param=param, code="unsupported_parameter",
        )  # fmt: skip
    elif param is None:
        answer = ApiError(
            400, "The body is not a JSON object; send one, with the header Content-Type: "
            "application/json.",
        )  # fmt: skip
    else:
        same = [other for other in errors if list(other["loc"][1:2]) == [where[0]]]
        reasons = dict.fromkeys(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in same[:4])
        answer = ApiError(400, f"{'; or '.join(reasons)}.", param=param)
    return answer.response()


async def _on_defect(_request: Request, _error: Exception) -> Response:
    return ApiError(500, "The server failed on this request; see its log.").response()
