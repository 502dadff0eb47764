"""A server that speaks OpenAI's protocol, answers from the examples in the prompt, and fails on demand."""

import asyncio
import contextlib
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from ml_assets.spec import BaseFamily, HostedBase

KEY = "sk-secret-0123456789"
KEY_NAME = "TEST_PROVIDER_KEY"


class Copycat:
    """It answers as the last example did that shares most words with the question, or `unsure` without.
    A token is a word; a message costs 3 more.

    Attributes make it fail: `failures` are used up, one a request: a status, `garbage`, `slow`, `cut` (the
    connection breaks after the first piece), `error` (in the stream), `endless`. `refuses` are fields that
    it answers with 400. `listing` is what /models says of its model, None for no such route. `asked` holds
    the bodies of all chat requests, `open` counts answers being given.
    """

    def __init__(self, key: str | None = KEY):
        self.key = key
        self.failures: list[Any] = []
        self.refuses: set[str] = set()
        self.listing: dict[str, Any] | None = {"id": "copycat-2024-05-01", "owned_by": "tests"}
        self.retry_after: str | None = None
        self.asked: list[dict[str, Any]] = []
        self.open = 0
        self.piece_seconds = 0.0
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def source(self, **changes: Any) -> HostedBase:
        fields: dict[str, Any] = {
            "kind": "hosted",
            "url": self.url,
            "model": "copycat-2024-05-01",
            "revision": "2024-05-01",
            "key": KEY_NAME if self.key else None,
            "per_1000_prompt_tokens": 0.5,
            "per_1000_answer_tokens": 2.0,
            "context_length": 2000,
            "seconds": 5.0,
            "attempts": 3,
        }
        return HostedBase(**(fields | changes))

    def family(self, **changes: Any) -> BaseFamily:
        return BaseFamily(name="copycat", source=self.source(**changes))

    @property
    def chats(self) -> int:
        return len(self.asked)

    # -- the server ------------------------------------------------------------------------------------

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def authorize(request: Request, following: Any) -> Response:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if self.key and given != self.key:
                message = f"Incorrect API key provided: {given}"
                return JSONResponse({"error": {"message": message, "code": "invalid_api_key"}}, 401)
            return await following(request)

        @app.get("/v1/models")
        async def models() -> Response:
            if self.listing is None:
                return JSONResponse({"detail": "Not Found"}, 404)
            return JSONResponse({"object": "list", "data": [self.listing | {"created": int(time.time())}]})

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            body = await request.json()
            self.asked.append(body)
            for name in self.refuses & body.keys():
                hint = "; use max_completion_tokens instead" if name == "max_tokens" else ""
                message = f"Unsupported parameter: '{name}'{hint}"
                return JSONResponse({"error": {"message": message}}, 400)
            failure = self.failures.pop(0) if self.failures else None
            if isinstance(failure, int):
                headers = {"Retry-After": self.retry_after} if self.retry_after else {}
                echoed = request.headers.get("authorization", "")
                message = f"failed on demand, asked with {echoed}"
                return JSONResponse({"error": {"message": message}}, failure, headers=headers)
            if failure == "garbage":
                return PlainTextResponse("<html>502 Bad Gateway</html>")
            if failure == "slow":
                await asyncio.sleep(30)
            answer = answer_of(body["messages"])
            most = body.get("max_tokens") or body.get("max_completion_tokens")
            words = answer.split()
            finish = "length" if len(words) > most else "stop"
            pieces = [word if i == 0 else f" {word}" for i, word in enumerate(words[:most])]
            usage = {
                "prompt_tokens": tokens_of(body["messages"]),
                "completion_tokens": len(pieces),
                "total_tokens": tokens_of(body["messages"]) + len(pieces),
            }
            if not body.get("stream"):
                message = {"role": "assistant", "content": "".join(pieces)}
                choice = {"index": 0, "message": message, "finish_reason": finish}
                found: dict[str, Any] = {"choices": [choice], "usage": usage}
                if isinstance(failure, dict):
                    found |= failure
                return JSONResponse(found)
            chunks = self._chunks(pieces, finish, usage, body, failure)
            return StreamingResponse(chunks, media_type="text/event-stream")

        return app

    async def _chunks(
        self, pieces: list[str], finish: str, usage: dict[str, int], body: dict[str, Any], failure: Any
    ) -> AsyncIterator[str]:
        def event(found: dict[str, Any]) -> str:
            return f"data: {json.dumps({'object': 'chat.completion.chunk'} | found)}\n\n"

        def delta(content: dict[str, Any], ended: str | None = None) -> dict[str, Any]:
            return {"choices": [{"index": 0, "delta": content, "finish_reason": ended}]}

        self.open += 1
        try:
            yield event(delta({"role": "assistant", "content": ""}))
            for i, piece in enumerate(pieces):
                yield event(delta({"content": piece}))
                await asyncio.sleep(self.piece_seconds)
                if failure == "cut":
                    raise ConnectionError("cut on demand")
                if failure == "error":
                    yield event({"error": {"message": "overloaded"}})
                    return
                if failure == "half" and i == 0:
                    yield 'data: {"choices": [{"del\n\n'
                    return
                while failure == "endless":
                    yield event(delta({"content": " more"}))
                    await asyncio.sleep(0.02)
            yield event(delta({}, finish))
            if (body.get("stream_options") or {}).get("include_usage"):
                yield event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        finally:
            self.open -= 1


def answer_of(messages: Sequence[Mapping[str, str]]) -> str:
    question = words_of(messages[-1]["content"])
    best, answer = 0, "unsure"
    for asked, answered in itertools.pairwise(messages):
        if asked["role"] == "user" and answered["role"] == "assistant":
            common = len(question & words_of(asked["content"]))
            if common >= max(best, 1):
                best, answer = common, answered["content"]
    return answer


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def tokens_of(messages: Sequence[Mapping[str, str]]) -> int:
    return sum(3 + len(message["content"].split()) for message in messages)


@contextlib.contextmanager
def copycat(**options: Any) -> Iterator[Copycat]:
    """A running one."""
    provider = Copycat(**options)
    config = uvicorn.Config(
        provider.app(), port=provider.port, log_config=None, timeout_graceful_shutdown=1, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive()
        time.sleep(0.01)
    try:
        yield provider
    finally:
        server.should_exit = True
        thread.join(30)
