"""The gateway's HTTP side: OpenAI's chat completions for every customization, health, metrics, and the admin
routes that a release uses."""

import asyncio
import contextlib
import json
import logging
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import jinja2
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ml_assets.artifacts import ArtifactStore
from ml_assets.endpoints.gateway import keys
from ml_assets.endpoints.gateway.engine import Asked, Engine, Generation, Piece, Version
from ml_assets.endpoints.gateway.errors import ApiError
from ml_assets.endpoints.gateway.hosted import HostedEngine
from ml_assets.endpoints.gateway.metrics import Metrics
from ml_assets.endpoints.gateway.schemas import (
    ActivateRequest,
    ChatRequest,
    CustomizationRequest,
    FeedbackRequest,
    StageRequest,
)
from ml_assets.endpoints.gateway.vllm import VllmEngine
from ml_assets.endpoints.ledger import Ledger, Release
from ml_assets.settings import EngineName
from ml_assets.traffic.records import TrafficRecord
from ml_assets.traffic.writer import (
    Busy,
    Policy,
    RedactionUnavailable,
    TrafficWriter,
    Unavailable,
    UnknownRequest,
)

Access = Literal["public", "key", "admin"]

ACCESS: dict[tuple[str, str], Access] = {
    ("GET", "/healthz"): "public",
    ("GET", "/healthz/ready"): "public",
    ("GET", "/metrics"): "public",
    ("GET", "/v1/models"): "key",
    ("GET", "/v1/models/{model}"): "key",
    ("POST", "/v1/chat/completions"): "key",
    ("POST", "/v1/feedback"): "key",
    ("POST", "/admin/stage"): "admin",
    ("POST", "/admin/activate"): "admin",
    ("POST", "/admin/discard"): "admin",
    ("POST", "/admin/probe"): "admin",
}
"""Who may use a route. A route that is not here is closed to everyone."""

MAX_BODY_BYTES = 1 << 20
BODY_SECONDS = 30.0
"""Time that a client may take to send its request."""
ADAPTER_HEADER = "x-evergreen-adapter"
BASE_HEADER = "x-evergreen-base"
DETAIL_IN_LOG = {
    "artifact_error": "its artifact is damaged or incomplete (see the gateway's log)",
    "cannot_load": "it can't be loaded (see the gateway's log)",
    "vllm_refused": "a vLLM server refuses it (see the gateway's log)",
}
"""What everybody is told instead of errors that name paths and servers."""
LEDGER_LOG_SECONDS = 60.0
"""Between two lines in the log about a ledger that does not answer."""
RESTORE_SECONDS = 5.0
"""Between two attempts to serve what has no vLLM server, or whose provider is away."""

log = logging.getLogger("evergreen.gateway")
B = TypeVar("B", bound=BaseModel)


def create_app(
    ledger: Ledger,
    store: ArtifactStore,
    *,
    max_queue: int = 64,
    max_body_bytes: int = MAX_BODY_BYTES,
    engine_name: EngineName = "in_process",
    vllm: VllmEngine | None = None,
    traffic: TrafficWriter | None = None,
    **limits: Any,
) -> FastAPI:
    """The gateway as an ASGI application. It begins to serve what the ledger says when it starts.

    `max_queue` is the number of requests of one customization that may wait, `engine_name` what answers for
    endpoints that name no engine, `vllm` the servers behind the engine of that name, `traffic` what stores
    requests (None: nothing is stored, and there is no feedback), `limits` are the engine's other ones;
    `app.state.engine` and `app.state.metrics` are for tests.
    """
    hosted = HostedEngine()
    engine = Engine(store, max_queue=max_queue, vllm=vllm, hosted=hosted, default=engine_name, **limits)
    metrics = Metrics()
    restored = asyncio.Event()

    if traffic is not None:
        traffic.counted = lambda name, outcome, n: metrics.traffic.labels(name, outcome).inc(n)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        hosted.start()
        if vllm is not None:
            vllm.start()
        newest = await run_in_threadpool(ledger.newest_all)
        released = {name: release for name, release in newest.items() if release.action != "withdraw"}
        if traffic is not None:
            for name, release in newest.items():
                traffic.set_policy(name, Policy.of(release.traffic_policy))
            traffic.start()
        engine.unserved.update(dict.fromkeys(released, "it is loading"))
        restoring = asyncio.create_task(_restore(engine, ledger, released, restored))
        try:
            yield
        finally:
            restoring.cancel()
            if vllm is not None:
                await vllm.close()
            await hosted.close()
            await run_in_threadpool(engine.close)
            if traffic is not None:
                await run_in_threadpool(traffic.close)

    app = FastAPI(
        title="Evergreen gateway", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.engine, app.state.metrics = engine, metrics
    guard = {"routes": app.router.routes, "ledger": ledger, "metrics": metrics}
    app.add_middleware(Guard, **guard, max_body_bytes=max_body_bytes)
    _answer_errors_like_openai(app)

    # -- health ----------------------------------------------------------------------------------------

    def health() -> dict[str, Any]:
        answering, unserved = engine.answering()
        status = "loading" if not restored.is_set() else "degraded" if unserved else "ready"
        served = {name: version.describe() for name, version in sorted(answering.items())}
        return {"live": True, "status": status, "served": served, "unserved": unserved}

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Live: 200 whenever the process answers. `status`: loading, ready, or degraded (something that the
        ledger names is not served: see `unserved`)."""
        return health()

    @app.get("/healthz/ready")
    async def ready() -> JSONResponse:
        """200 once everything was loaded, or has failed to, after a start; 503 before."""
        return JSONResponse(health(), status_code=200 if restored.is_set() else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        metrics.waiting.clear()
        for name, length in engine.queue_lengths().items():
            metrics.waiting.labels(name).set(length)
        metrics.served.clear()
        metrics.replicas.clear()
        for name, version in list(engine.served.items()):
            metrics.served.labels(name, version.adapter_digest, version.base_revision).set(1)
            if vllm is not None and version.engine == "vllm":
                metrics.replicas.labels(name).set(vllm.ready_replicas(version))
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # -- OpenAI ----------------------------------------------------------------------------------------

    def model(version: Version) -> dict[str, Any]:
        return {"id": version.customization, "object": "model", "created": 0, "owned_by": "evergreen"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The customizations that are served and that this key may use."""
        served = [version for name, version in sorted(engine.served.items()) if _key(request).may_use(name)]
        return {"object": "list", "data": [model(version) for version in served]}

    @app.get("/v1/models/{model}")
    async def retrieve(request: Request) -> JSONResponse:
        name = request.path_params["model"]
        _check_scope(_key(request), name)
        with engine.lease(name) as version:
            return JSONResponse(model(version), headers=_identity(version))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        call = _Call(engine, metrics, traffic, _key(request))
        try:
            return await call.answer(request)
        except ApiError as error:
            call.end(error.status)
            raise
        except BaseException as error:
            call.end(499 if isinstance(error, asyncio.CancelledError) else 500)
            raise

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> dict[str, Any]:
        """Take what a user says about an answer; committed when this answers 200."""
        said = await _parse(FeedbackRequest, request)
        if traffic is None:
            raise ApiError(404, "no_traffic_log", "This gateway stores no requests")
        rating = None if said.rating is None else 1 if said.rating == "up" else -1
        try:
            future = traffic.give_feedback(said.id, _key(request).id, rating, said.right_answer)
            stored = await asyncio.wrap_future(future)
        except UnknownRequest:
            message = f"There is no stored answer with id {said.id!r} to a request of this key"
            raise ApiError(404, "request_not_found", message, param="id") from None
        except Busy as error:
            raise ApiError(429, "queue_full", f"{error}", headers={"Retry-After": "1"}) from None
        except (Unavailable, RedactionUnavailable) as error:
            log.error("feedback is not stored: %s", error)
            message = "Feedback can't be stored now; nothing was stored"
            raise ApiError(503, "feedback_not_available", message, headers={"Retry-After": "5"}) from None
        labels = stored.customization, said.rating or "none", "yes" if said.right_answer else "no"
        metrics.feedback.labels(*labels).inc()
        return {"object": "feedback", "id": said.id, "rating": said.rating, "at": stored.at}

    # -- admin -----------------------------------------------------------------------------------------

    def measured(version: Version) -> dict[str, Any]:
        return version.describe() | {"measured": version.measured, "verified": version.verified}

    @app.post("/admin/stage")
    async def stage(request: Request) -> dict[str, Any]:
        """Load a version beside what serves, and return what its fingerprint probes gave."""
        asked = await _parse(StageRequest, request)
        return measured(await engine.stage(Version(**asked.model_dump())))

    @app.post("/admin/activate")
    async def activate(request: Request) -> dict[str, Any]:
        """Serve what the ledger says now: the staged version, or nothing after a withdrawal."""
        asked = await _parse(ActivateRequest, request)
        current = await run_in_threadpool(ledger.current, asked.customization)
        says = current.adapter_digest if current else None
        if says != asked.adapter_digest:
            message = f"{asked.customization}: the ledger says {says and says[:12]}, "
            message += f"the request {asked.adapter_digest and asked.adapter_digest[:12]}"
            raise ApiError(409, "not_in_ledger", message)
        version = engine.activate(asked.customization, asked.adapter_digest, current.id if current else 0)
        if traffic is not None and current is not None:
            traffic.set_policy(asked.customization, Policy.of(current.traffic_policy))
        log.info("%s: now served by adapter %s", asked.customization, says)
        return {"customization": asked.customization, "serving": version and version.describe()}

    @app.post("/admin/discard")
    async def discard(request: Request) -> dict[str, Any]:
        """Forget the staged version."""
        asked = await _parse(CustomizationRequest, request)
        engine.discard(asked.customization)
        return {"customization": asked.customization}

    @app.post("/admin/probe")
    async def probe(request: Request) -> dict[str, Any]:
        """Measure the fingerprint of what serves now."""
        asked = await _parse(CustomizationRequest, request)
        return measured(await engine.probe(asked.customization))

    return app


async def _restore(
    engine: Engine, ledger: Ledger, released: dict[str, Release], restored: asyncio.Event
) -> None:
    """Serve again what was served: whatever does not verify is left out, loudly, and the rest serves. What
    has no vLLM server yet, or whose provider is away, is tried again until it has one."""
    waiting = [name for name, release in released.items() if not await _serve_again(engine, release)]
    restored.set()
    while waiting:
        await asyncio.sleep(RESTORE_SECONDS)
        try:
            released = await run_in_threadpool(ledger.current_all)
        except SQLAlchemyError as error:
            log.warning("the ledger can't be read; trying again: %s", error)
            continue
        waiting = [
            name for name in waiting if name in released and not await _serve_again(engine, released[name])
        ]


async def _serve_again(engine: Engine, release: Release) -> bool:
    """Whether that is settled: it serves, or can't. Otherwise its servers are away."""
    name = release.customization
    version = Version(
        customization=name,
        base_revision=release.base_revision,
        base_digest=release.base_digest,
        adapter_digest=release.adapter_digest,
        max_new_tokens=release.max_new_tokens,
        max_prompt_tokens=release.max_prompt_tokens,
        engine=release.engine,
    )
    try:
        await engine.stage(version, give_way=True)
        engine.activate(name, release.adapter_digest, release.id)
        log.info("%s: served by adapter %s again", name, release.adapter_digest)
    except ApiError as error:
        if name in engine.served or error.code == "overtaken":
            return True  # a release came in between
        told = DETAIL_IN_LOG.get(error.code, error.message)
        if engine.unserved.get(name) != told:
            log.error("%s is NOT SERVED: %s", name, error.message)
        engine.unserved[name] = told
        return error.code not in ("no_replica", "provider_unavailable")
    return True


# -- one chat completion -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    """What all chunks of one answer have in common."""

    id: str
    created: int
    model: str
    adapter: str

    def body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.adapter,
            "choices": choices,
        }


class _Call:
    """A chat completion from request to metrics and traffic; holds its version until `end`, which may come
    twice."""

    def __init__(self, engine: Engine, metrics: Metrics, traffic: TrafficWriter | None, key: keys.KeyInfo):
        self._engine = engine
        self._metrics = metrics
        self._traffic = traffic
        self._key = key
        self._start = time.monotonic()
        self._at = datetime.now(UTC)
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._version: Version | None = None
        self._asked: ChatRequest | None = None
        self._generation: Generation | None = None
        self._prompt_tokens = 0
        self._tokens = 0
        self._texts: list[str] = []
        self._finish_reason: str | None = None
        self._first_token_seconds: float | None = None
        self._mean_logprob: float | None = None
        self._ended = False

    async def answer(self, request: Request) -> Response:
        asked = self._asked = await _parse(ChatRequest, request)
        _check_scope(_key(request), asked.model)
        version = self._version = self._engine.acquire(asked.model)
        generation = await self._submit(version, asked)
        header = _Header(self._id, int(time.time()), version.customization, version.adapter_digest)
        if asked.stream:
            include_usage = asked.stream_options is not None and asked.stream_options.include_usage
            chunks = self._chunks(generation, header, include_usage)
            return _Stream(chunks, self.end, media_type="text/event-stream", headers=_identity(version))
        pieces = await _unless_disconnected(request, self._collect(generation))
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(piece.text for piece in pieces)},
            "logprobs": None,
            "finish_reason": pieces[-1].finish_reason,
        }
        body = header.body("chat.completion", [choice]) | {"usage": self._usage()}
        self.end(200)
        return JSONResponse(body, headers=_identity(version))

    def end(self, status: int) -> None:
        """Stop the generation, release the version, count the request and hand over its record."""
        if self._ended:
            return
        self._ended = True
        name = self._version.customization if self._version else "-"
        if self._generation:  # it may not have begun, and its row must be gone before its adapter is
            self._engine.cancel(self._generation)
        if self._version:
            self._engine.release(self._version)
        self._metrics.requests.labels(name, status).inc()
        self._metrics.seconds.labels(name).observe(time.monotonic() - self._start)
        self._metrics.tokens.labels(name, "prompt").inc(self._prompt_tokens)
        self._metrics.tokens.labels(name, "completion").inc(self._tokens)
        self._record(status)

    def _record(self, status: int) -> None:
        """What the model took on is traffic, however it ended; what was refused before is not, nor are the
        probes of releases and health checks, which come with an admin key."""
        if self._traffic is None or self._version is None or self._asked is None or not self._prompt_tokens:
            return
        if self._key.is_admin:
            return
        if self._key.unlogged:
            self._traffic.put_unlogged(self._version.customization)
            return
        first = self._first_token_seconds
        record = TrafficRecord(
            id=self._id,
            at=self._at.isoformat(timespec="microseconds"),
            customization=self._version.customization,
            key_id=self._key.id,
            adapter_digest=self._version.adapter_digest,
            base_revision=self._version.base_revision,
            messages=[message.plain() for message in self._asked.messages],
            answer="".join(self._texts),
            status=status,
            finish_reason=self._finish_reason,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._tokens,
            latency_ms=1000 * (time.monotonic() - self._start),
            first_token_ms=None if first is None else 1000 * first,
            mean_logprob=self._mean_logprob,
            metadata=self._asked.metadata or {},
        )
        self._traffic.put(record)

    async def _submit(self, version: Version, asked: ChatRequest) -> Generation:
        deadline = self._engine.deadline(self._start, asked.timeout)
        with self._engine.arriving(version):
            put = await self._put(version, asked, deadline)
            wanted = [asked.max_tokens, asked.max_completion_tokens]
            limits = [version.max_new_tokens, max(1, version.text.context_length - put.tokens)]
            generation = self._generation = self._engine.submit(
                version,
                put.prompt,
                min(n for n in [*wanted, *limits] if n is not None),
                temperature=asked.temperature or 0.0,
                top_p=1.0 if asked.top_p is None else asked.top_p,
                seed=asked.seed,
                stops=asked.stops(),
                deadline=deadline,
                messages=put.messages,
            )
        self._prompt_tokens = put.tokens
        return generation

    async def _put(self, version: Version, asked: ChatRequest, deadline: float) -> Asked:
        """What the model gets to read, once it is this request's turn."""
        turn = version.text.turn
        try:
            async with asyncio.timeout_at(deadline):
                await turn.acquire()
        except TimeoutError:
            raise Generation.too_late() from None
        try:
            return await run_in_threadpool(version.ask, [message.plain() for message in asked.messages])
        except jinja2.TemplateError as error:
            message = f"messages: the chat template of {version.base_revision} refuses them: {error}"
            raise ApiError(400, "invalid_messages", message, param="messages") from error
        finally:
            turn.release()

    async def _count(self, generation: Generation) -> AsyncIterator[Piece]:
        async for piece in generation:
            if self._first_token_seconds is None:
                seconds = self._first_token_seconds = time.monotonic() - self._start
                self._metrics.first_token_seconds.labels(generation.version.customization).observe(seconds)
            self._tokens = piece.tokens
            if piece.prompt_tokens is not None:
                self._prompt_tokens = piece.prompt_tokens
            self._texts.append(piece.text)
            self._finish_reason, self._mean_logprob = piece.finish_reason, piece.mean_logprob
            yield piece

    async def _collect(self, generation: Generation) -> list[Piece]:
        return [piece async for piece in self._count(generation)]

    async def _chunks(
        self, generation: Generation, header: _Header, include_usage: bool
    ) -> AsyncIterator[bytes]:
        def event(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
            body = header.body("chat.completion.chunk", choices)
            return _event(body | {"usage": usage} if include_usage else body)

        def delta(content: dict[str, Any], finish_reason: str | None = None) -> list[dict[str, Any]]:
            return [{"index": 0, "delta": content, "logprobs": None, "finish_reason": finish_reason}]

        status = 499  # unless the end is reached
        try:
            yield event(delta({"role": "assistant", "content": ""}))
            async for piece in self._count(generation):
                if piece.text:
                    yield event(delta({"content": piece.text}))
                if piece.finish_reason:
                    yield event(delta({}, piece.finish_reason))
            if include_usage:
                yield event([], self._usage())
            status = 200
            self.end(status)  # before the client sees the end: it may send feedback at once
            yield b"data: [DONE]\n\n"
        except ApiError as error:  # the status line is sent: the error is the last event
            status = error.status
            yield _event(error.body())
        finally:
            self.end(status)

    def _usage(self) -> dict[str, int]:
        total = self._prompt_tokens + self._tokens
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": total,
        }


class _Stream(StreamingResponse):
    """Calls `end` also when the client is gone before the first chunk, when the generator never runs."""

    def __init__(self, chunks: AsyncIterator[bytes], end: Callable[[int], None], **options: Any):
        super().__init__(chunks, **options)
        self._chunks = chunks
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._chunks.aclose()  # type: ignore[attr-defined]
            self._end(499)


def _event(body: dict[str, Any]) -> bytes:
    # ASCII: many clients also end a line at U+2028 and others, which JSON may hold as they are
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _identity(version: Version) -> dict[str, str]:
    return {ADAPTER_HEADER: version.adapter_digest, BASE_HEADER: version.base_revision}


async def _unless_disconnected(request: Request, work: Awaitable[list[Piece]]) -> list[Piece]:
    """The result of `work`, which is cancelled when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "client_disconnected", "the client went away")
    finally:
        working.cancel()
        waiting.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


# -- requests ----------------------------------------------------------------------------------------------


def _key(request: Request) -> keys.KeyInfo:
    return request.scope["evergreen.key"]


def _check_scope(key: keys.KeyInfo, model: str) -> None:
    if not key.may_use(model):
        scopes = ", ".join(key.scopes)
        message = f"This API key may not use model {model!r}; its scopes are: {scopes}"
        raise ApiError(403, "permission_denied", message, param="model")


async def _parse(model: type[B], request: Request) -> B:
    """The request's JSON body. Raises ApiError 400 that names the field and what was expected."""
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        # in a union such as `content`, the names of its branches are no fields
        where = [part for part in problem["loc"] if not re.match(r"list\[|function-|str$", str(part))]
        param = ".".join(map(str, where)) or None
        code = "invalid_json" if problem["type"] == "json_invalid" else "invalid_request"
        text = f"{param}: {problem['msg']}" if param else problem["msg"]
        raise ApiError(400, code, text, param=param) from None


def _answer_errors_like_openai(app: FastAPI) -> None:
    async def api_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, code, message, headers=error.headers).response()

    async def unexpected(_request: Request, _error: Exception) -> Response:
        return ApiError(500, "internal_error", "the gateway failed on this request; see its log").response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)


class Guard:
    """Checks the key, then reads the body up to its limit, before any other code sees the request."""

    def __init__(
        self,
        inner: ASGIApp,
        *,
        routes: list[BaseRoute],
        ledger: Ledger,
        metrics: Metrics,
        max_body_bytes: int,
    ):
        self._inner = inner
        self._routes = routes
        self._ledger = ledger
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._logged_at = -math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        try:
            await self._authorize(scope)
            replay = await self._read_body(scope, receive)
        except ApiError as error:
            self._metrics.requests.labels("-", error.status).inc()
            await error.response()(scope, receive, send)
            return
        if replay is not None:
            await self._inner(scope, replay, send)

    async def _authorize(self, scope: Scope) -> None:
        access = self._access(scope)
        if access == "public":
            return
        headers = {name: value for name, value in scope["headers"] if name == b"authorization"}
        scheme, _, text = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if not text:
            message = "No API key: send it as 'Authorization: Bearer <key>'"
            raise ApiError(401, "missing_api_key", message, headers={"WWW-Authenticate": "Bearer"})
        key = None
        if scheme.lower() == "bearer":
            key = await self._known(text.strip())
        if key is None:
            message = "The API key is wrong, expired or revoked"
            raise ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
        if access == "admin" and not key.is_admin:
            raise ApiError(403, "permission_denied", "This route needs an API key with the scope 'admin'")
        scope["evergreen.key"] = key

    async def _known(self, key: str) -> keys.KeyInfo | None:
        try:
            return await run_in_threadpool(keys.authenticate, self._ledger, key)
        except SQLAlchemyError as error:
            if time.monotonic() - self._logged_at >= LEDGER_LOG_SECONDS:
                self._logged_at = time.monotonic()
                log.error("API keys can't be checked, the ledger does not answer: %s", error)
            message = "API keys can't be checked now; try again in 5 s"
            raise ApiError(503, "keys_not_available", message, headers={"Retry-After": "5"}) from None

    def _access(self, scope: Scope) -> Access:
        """The rule of the route that this request goes to. Unknown paths and methods need a key, too, before
        they get their 404 or 405; a route without a rule is for nobody."""
        for route in self._routes:
            if route.matches(scope)[0] == Match.FULL:
                rule = ACCESS.get((scope["method"], getattr(route, "path", "")))
                if rule is None:
                    raise ApiError(403, "no_access_rule", "This route has no access rule")
                return rule
        return "key"

    async def _read_body(self, scope: Scope, receive: Receive) -> Receive | None:
        """A `receive` that gives the body that was read; None when the client is gone. Raises ApiError."""
        too_large = ApiError(
            413,
            "request_too_large",
            f"The request body is larger than {self._max_body_bytes} bytes",
            headers={"Connection": "close"},
        )
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._max_body_bytes:
                raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._max_body_bytes:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            message = f"The request body did not arrive within {BODY_SECONDS:g} s"
            raise ApiError(408, "request_timeout", message, headers={"Connection": "close"}) from None

        given = False

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": bytes(body), "more_body": False}
            return await receive()

        return replay


def app_from_settings() -> FastAPI:
    """The gateway of this deployment; writes the admin key file when there is none."""
    from ml_assets.settings import Settings

    settings = Settings.from_env()
    ledger = Ledger(settings.ledger_url)
    traffic = TrafficWriter(settings.traffic_url)
    keys.ensure_admin_key(ledger, settings.home / keys.ADMIN_KEY_FILE)
    return create_app(
        ledger,
        ArtifactStore(settings.artifacts_url, Path(settings.artifact_cache)),
        request_seconds=settings.request_seconds,
        kv_bytes=settings.kv_cache_bytes,
        prefix_bytes=settings.prefix_cache_bytes,
        engine_name=settings.engine,
        vllm=VllmEngine(settings.vllm_urls, settings.vllm_api_key) if settings.vllm_urls else None,
        traffic=traffic,
    )
