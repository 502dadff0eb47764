"""The gateway as its users see it: the official client, errors, limits, keys, streams, swaps under load."""

import asyncio
import json
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.routing import APIRoute
from gateway_world import CONTEXT, QUESTION, Made, World, gateway_in_thread, said_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml_assets.artifacts import ArtifactRef, ArtifactStore
from ml_assets.endpoints.gateway import engine as engine_module
from ml_assets.endpoints.gateway import keys
from ml_assets.endpoints.gateway.app import ACCESS
from ml_assets.endpoints.gateway.engine import BaseText, Engine
from ml_assets.endpoints.gateway.live import Live
from ml_assets.endpoints.ledger import api_keys
from ml_assets.engine import hardware

MAX_NEW = 12
HEX = re.compile(r"[0-9a-f]{64}")


class Served:
    """One gateway that serves `home` and `news`, for all tests of this module."""

    def __init__(self, world: World, url: str, app: FastAPI, adapters: dict[str, Made]):
        self.world, self.url, self.app, self.adapters = world, url, app, adapters
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=world.key, max_retries=0)
        self.http = httpx.Client(base_url=url, headers=bearer(world.key), timeout=60)
        self.admin = httpx.Client(base_url=url, headers=bearer(world.admin_key), timeout=120)

    def chat(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={"model": "home", "messages": QUESTION} | body)

    def serve(self, made: Made) -> None:
        assert self.stage(made).status_code == 200
        self.world.record(made)
        self.activate(made)

    def stage(self, made: Made, **changes: Any) -> httpx.Response:
        fields = ("customization", "base_revision", "base_digest", "adapter_digest")
        body = {name: getattr(made.release(), name) for name in fields}
        return self.admin.post("/admin/stage", json=body | {"max_new_tokens": MAX_NEW} | changes)

    def activate(self, made: Made) -> None:
        body = {"customization": made.customization, "adapter_digest": made.digest}
        response = self.admin.post("/admin/activate", json=body)
        assert response.status_code == 200, response.text


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    world = World(tmp_path_factory.mktemp("served"))
    adapters = {
        "home": world.adapter("home", 1),
        "home2": world.adapter("home", 2),
        "news": world.adapter("news", 3, system="Answer in one word."),
    }
    for name in ("home", "news"):
        world.record(adapters[name])
    with gateway_in_thread(world, max_body_bytes=64_000, max_queue=4) as (url, app):
        yield Served(world, url, app, adapters)


# -- the official client -------------------------------------------------------------------------------


def test_chat_with_the_official_client(served: Served) -> None:
    made = served.adapters["home"]
    raw = served.client.chat.completions.with_raw_response.create(model="home", messages=QUESTION)
    answer = raw.parse()
    assert answer.choices[0].message.content == made.answer
    assert answer.choices[0].finish_reason == "length"
    assert answer.system_fingerprint == made.digest == raw.headers["x-evergreen-adapter"]
    assert raw.headers["x-evergreen-base"] == made.base_revision
    assert answer.usage is not None
    assert answer.usage.completion_tokens == MAX_NEW
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + MAX_NEW


def test_stream_with_the_official_client(served: Served) -> None:
    made = served.adapters["home"]
    stream = served.client.chat.completions.create(
        model="home", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == made.answer
    assert {c.system_fingerprint for c in chunks} == {made.digest}
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert len(chunks) > 4, "tokens come one by one"
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == MAX_NEW
    assert all(c.usage is None for c in chunks[:-1])
    with served.http.stream(
        "POST", "/v1/chat/completions", json={"model": "home", "messages": QUESTION, "stream": True}
    ) as response:
        assert response.headers["x-evergreen-adapter"] == made.digest
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_what_the_official_client_got_can_be_sent_back(served: Served) -> None:
    create = served.client.chat.completions.create
    said = create(model="home", messages=QUESTION).choices[0].message
    turns: list[Any] = [*QUESTION, said.model_dump(), {"role": "user", "content": "and off"}]
    assert turns[1].keys() >= {"refusal", "annotations", "audio", "function_call", "tool_calls"}
    assert create(model="home", messages=turns, max_tokens=1, top_logprobs=0).usage
    turns[1]["annotations"] = []
    assert create(model="home", messages=turns, max_tokens=1).usage


def test_a_stream_has_no_line_ends_within_its_events(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "a\u2028b\x85c"
    monkeypatch.setattr(engine_module.StopStrings, "push", lambda *_: "")
    monkeypatch.setattr(engine_module.StopStrings, "finish", lambda _: said)
    body = {"model": "home", "messages": QUESTION, "max_tokens": 2, "stream": True}
    with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert said_in(response.iter_lines()) == said


def test_models(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["home", "news"]
    assert served.client.models.retrieve("news").id == "news"
    narrow = keys.create(served.world.ledger, ["news"])[0]
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=narrow, max_retries=0)
    assert [model.id for model in client.models.list()] == ["news"]
    with pytest.raises(openai.PermissionDeniedError, match="its scopes are: news"):
        client.chat.completions.create(model="home", messages=QUESTION)


def test_errors_of_the_official_client(served: Served) -> None:
    create = served.client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="'nothing' does not exist") as missing:
        create(model="nothing", messages=QUESTION)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match=r"temperature: .*less than or equal to 2"):
        create(model="home", messages=QUESTION, temperature=3)
    with pytest.raises(openai.BadRequestError, match=r"tools: .*not supported"):
        tool = {"type": "function", "function": {"name": "f"}}
        create(model="home", messages=QUESTION, tools=[tool])
    with pytest.raises(openai.APIStatusError, match=f"at most {CONTEXT - 1}") as long:
        create(model="home", messages=[{"role": "user", "content": "light " * CONTEXT}])
    assert long.value.status_code == 413 and long.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError, match="larger than 64000 bytes") as large:
        create(model="home", messages=[{"role": "user", "content": "x" * 70_000}])
    assert large.value.status_code == 413
    wrong = openai.OpenAI(base_url=f"{served.url}/v1", api_key="evg_wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="wrong, expired or revoked"):
        wrong.models.list()


# -- arguments -----------------------------------------------------------------------------------------


def test_arguments_of_an_answer(served: Served) -> None:
    short = served.chat(max_tokens=3).json()
    assert short["usage"]["completion_tokens"] == 3 and short["choices"][0]["finish_reason"] == "length"
    assert served.chat(max_completion_tokens=2).json()["usage"]["completion_tokens"] == 2
    assert served.chat(max_tokens=10_000).json()["usage"]["completion_tokens"] == MAX_NEW

    whole = served.adapters["home"].answer
    stop = whole[4]
    cut = served.chat(stop=[stop, "never"]).json()["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (whole[: whole.index(stop)], "stop")

    sampled = [served.chat(temperature=2, seed=seed).json()["choices"][0] for seed in (1, 1, 2, 3)]
    texts = [choice["message"]["content"] for choice in sampled]
    assert texts[0] == texts[1] and len(set(texts)) > 1
    unseeded = {served.chat(temperature=2).json()["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(unseeded) > 1
    narrow = served.chat(temperature=2, top_p=1e-6).json()["choices"][0]["message"]["content"]
    assert narrow == whole


def test_the_system_prompt_of_the_training_is_added_when_there_is_none(served: Served) -> None:
    def tokens(messages: list[dict[str, Any]]) -> int:
        return served.chat(model="news", messages=messages, max_tokens=1).json()["usage"]["prompt_tokens"]

    system = {"role": "system", "content": "Answer in one word."}
    assert tokens(QUESTION) == tokens([system, *QUESTION])
    assert tokens([{"role": "developer", "content": "?"}, *QUESTION]) < tokens(QUESTION)
    parts = [{"type": "text", "text": "turn on "}, {"type": "text", "text": "the light"}]
    assert tokens([{"role": "user", "content": parts}]) == tokens(QUESTION)


# -- keys ----------------------------------------------------------------------------------------------


def test_every_route_has_an_access_rule(served: Served) -> None:
    routes = {
        (method, route.path)
        for route in served.app.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert routes == set(ACCESS)
    assert len(served.app.routes) == len(routes), "routes that are no APIRoute have no rule"


@pytest.fixture(scope="module")
def credentials(served: Served) -> dict[str, str | None]:
    ledger = served.world.ledger
    expired, info = keys.create(ledger, ["*", "admin"], expires_at=datetime.now(UTC) + timedelta(hours=1))
    with ledger.engine.begin() as connection:
        past = (datetime.now(UTC) - timedelta(hours=1)).isoformat(timespec="microseconds")
        connection.execute(sa.update(api_keys).where(api_keys.c.id == info.id).values(expires_at=past))
    revoked, info = keys.create(ledger, ["*", "admin"])
    keys.revoke(ledger, info.id)
    return {
        "no": None,
        "wrong": f"evg_00000000_{'A' * 43}",
        "expired": expired,
        "revoked": revoked,
        "other scope": keys.create(ledger, ["another"])[0],
        "user": served.world.key,
        "admin": served.world.admin_key,
    }


@pytest.mark.parametrize(("method", "path"), sorted(ACCESS))
def test_who_may_use_a_route(
    served: Served, credentials: dict[str, str | None], method: str, path: str
) -> None:
    access = ACCESS[method, path]
    for who, key in credentials.items():
        response = httpx.request(
            method,
            served.url + path.replace("{model}", "home"),
            headers=bearer(key) if key else {},
            json={"model": "home", "messages": QUESTION, "max_tokens": 1} if method == "POST" else None,
        )
        status = response.status_code
        if access == "public":
            assert status == 200, who
        elif who in ("no", "wrong", "expired", "revoked"):
            assert status == 401 and response.headers["www-authenticate"] == "Bearer", who
        elif access == "admin" and who != "admin":
            assert status == 403, who
        elif who == "other scope" and path not in ("/v1/models", "/v1/feedback"):
            assert access == "key" and status == 403, who
        else:
            assert status in (200, 400), who
        if status >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_route_without_a_rule_is_closed(served: Served) -> None:
    @served.app.get("/forgotten")
    def forgotten() -> str:
        return "secret"

    try:
        response = served.admin.get("/forgotten")
        assert response.status_code == 403 and response.json()["error"]["code"] == "no_access_rule"
    finally:
        served.app.router.routes.pop()


def test_other_schemes_and_paths(served: Served) -> None:
    basic = {"Authorization": f"Basic {served.world.key}"}
    assert httpx.get(f"{served.url}/v1/models", headers=basic).status_code == 401
    assert httpx.get(f"{served.url}/nothing").status_code == 401
    assert served.http.get("/nothing").json()["error"]["code"] == "not_found"
    assert served.http.get("/v1/chat/completions").status_code == 405
    assert httpx.get(f"{served.url}/docs").status_code == 401


# -- bad requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"", None, "Invalid JSON"),
        (b"{", None, "Invalid JSON"),
        (b"\xff\xfe", None, "Invalid JSON"),
        (b"[]", None, "object"),
        (b"[" * 30_000, None, "Invalid JSON"),
        ({"messages": QUESTION}, "model", "required"),
        ({"model": 3, "messages": QUESTION}, "model", "string"),
        ({"model": "home"}, "messages", "required"),
        ({"model": "home", "messages": []}, "messages", "at least 1"),
        ({"model": "home", "messages": [{"role": "root", "content": ""}]}, "messages.0.role", "'system'"),
        ({"model": "home", "messages": QUESTION, "n": 2}, "n", "expected 1 or null"),
        ({"model": "home", "messages": QUESTION, "max_tokens": 0}, "max_tokens", "greater than"),
        ({"model": "home", "messages": QUESTION, "max_tokens": "5"}, "max_tokens", "integer"),
        ({"model": "home", "messages": QUESTION, "temprature": 1}, "temprature", "not permitted"),
        ({"model": "home", "messages": QUESTION, "stop": [""]}, "stop", "not empty"),
        ({"model": "home", "messages": QUESTION, "stream_options": {}}, None, "stream"),
        ({"model": "home", "messages": QUESTION, "stream": "yes"}, "stream", "stream: Input"),
        (
            {"model": "home", "messages": QUESTION, "stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "boolean",
        ),
        ({"model": "home", "messages": [{"role": "user", "content": 3}]}, "messages.0.content", "string"),
        (b'{"model": "home", "messages": [{"role": "user", "content": "\\ud800"}]}', None, "Invalid JSON"),
        (b'{"model": "home", "messages": [], "temperature": NaN}', "messages", "at least 1"),
        (
            {"model": "home", "messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages.0.tool_calls",
            "null",
        ),
        (
            {"model": "home", "messages": [{"role": "assistant", "content": "x", "annotations": [{}]}]},
            "messages.0.annotations",
            "at most 0",
        ),
        ({"model": "home", "messages": QUESTION, "top_logprobs": 2}, "top_logprobs", "expected 0 or null"),
    ],
)
def test_malformed_requests(served: Served, body: Any, param: str | None, message: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = served.http.post("/v1/chat/completions", content=content)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and message in error["message"], error


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = {
    "model": st.sampled_from(["home", "news", "x"]) | JSON,
    "messages": st.just(QUESTION)
    | st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=20)}
        ),
        max_size=4,
    )
    | JSON,
}
OPTIONS = {
    "max_tokens": st.just(1) | JSON,
    "temperature": st.floats(0, 2) | JSON,
    "top_p": st.floats(0, 1) | JSON,
    "seed": st.integers() | JSON,
    "stop": st.text(max_size=3) | JSON,
    "stream": st.booleans() | JSON,
    "n": JSON,
    "tools": JSON,
    "stream_options": JSON,
    "\ud800": JSON,
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.fixed_dictionaries(FIELDS, optional=OPTIONS))
def test_no_request_makes_the_gateway_fail(served: Served, body: dict[str, Any]) -> None:
    body.setdefault("max_tokens", 1)
    response = served.http.post("/v1/chat/completions", content=json.dumps(body).encode())
    assert response.status_code in (200, 400, 404, 413), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200), route=st.sampled_from(sorted(p for m, p in ACCESS if m == "POST")))
def test_bytes_that_are_no_request(served: Served, body: bytes, route: str) -> None:
    assert served.admin.post(route, content=body).status_code == 400


def test_a_chunked_body_is_stopped_at_the_limit(served: Served) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 50_000_000:
            sent += 10_000
            yield b"x" * 10_000

    try:
        response = served.http.post("/v1/chat/completions", content=endless())
        assert response.status_code == 413
    except httpx.TransportError:  # the gateway closed the connection while we were still sending
        pass
    assert sent < 50_000_000
    assert served.chat(max_tokens=1).status_code == 200


def test_a_full_queue_says_when_to_come_back(served: Served) -> None:
    with ThreadPoolExecutor(40) as pool:
        responses = list(pool.map(lambda _: served.chat(), range(40)))
    statuses = Counter(response.status_code for response in responses)
    assert set(statuses) == {200, 429}, statuses
    refused = next(response for response in responses if response.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    answers = {r.json()["choices"][0]["message"]["content"] for r in responses if r.status_code == 200}
    assert answers <= served.adapters["home"].answers


def test_a_full_queue_is_not_waited_for_longer_than_a_request_may_take(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = served.app.state.engine
    monkeypatch.setattr(engine, "max_queue", 0)
    monkeypatch.setattr(engine, "request_seconds", 59.5)
    monkeypatch.setattr(engine._pace, "seconds", lambda _: 100_000)
    refused = served.chat()
    assert refused.status_code == 429 and refused.headers["retry-after"] == "60"


@pytest.fixture
def two_bases(tmp_path: Path) -> Iterator[tuple[World, str, FastAPI]]:
    """A gateway that serves `home` and `other`, each on a base of its own."""
    world = World(tmp_path)
    world.record(world.adapter("home", 1))
    world.record(world.adapter("other", 2, architecture="qwen2"))
    with gateway_in_thread(world) as (url, app):
        yield world, url, app


def test_prompts_that_take_long_to_read_hold_up_nobody_else(
    two_bases: tuple[World, str, FastAPI],
) -> None:
    world, url, app = two_bases
    engine = app.state.engine

    def ask(model: str) -> int:
        body = {"model": model, "messages": QUESTION, "max_tokens": 1}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=bearer(world.key), timeout=30)
        return answer.status_code

    with ThreadPoolExecutor(70) as pool:
        with engine.served["home"].text.lock:  # as if the first prompt took all this time
            slow = [pool.submit(ask, "home") for _ in range(70)]
            _wait(lambda: sum(future.done() for future in slow) == 6, "those that are too many to be refused")
            assert {future.result() for future in slow if future.done()} == {429}
            assert engine.queue_lengths()["home"] == 64
            assert ask("other") == 200
            current = world.ledger.current("home")
            body = {"customization": "home", "adapter_digest": current and current.adapter_digest}
            admin = bearer(world.admin_key)
            assert httpx.post(f"{url}/admin/activate", json=body, headers=admin).status_code == 200
        assert Counter(future.result() for future in slow) == {429: 6, 200: 64}
    assert engine.queue_lengths()["home"] == 0


def test_the_time_of_a_request_begins_when_it_comes(served: Served) -> None:
    with ThreadPoolExecutor(1) as pool, served.app.state.engine.served["home"].text.lock:
        first = pool.submit(served.chat)
        _wait(lambda: served.app.state.engine.queue_lengths()["home"] == 1, "the first to be read")
        late = served.chat(timeout=0.05)
        assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
        assert not first.done()
    assert first.result().status_code == 200


def test_a_prompt_that_is_far_too_long_is_not_read_to_its_end(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = served.app.state.engine.served["home"].text
    monkeypatch.setattr(text, "encode", lambda _: pytest.fail("it was read to its end"))
    answer = served.chat(messages=[{"role": "user", "content": "light and dark " * 4000}])
    assert answer.status_code == 413 and f"takes at most {CONTEXT - 1}" in answer.json()["error"]["message"]


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=60), st.integers(9_000, 40_000))
def test_what_fits_is_never_called_too_long(text: str, characters: int) -> None:
    tokenizer = ByteTokenizer()
    chat: Any = SimpleNamespace(tokenizer=tokenizer, prompt_text=lambda messages: messages[0]["content"])
    whole = (text * characters)[:characters]
    base = BaseText("digest", chat, tokenizer, CONTEXT)
    tokens = len(tokenizer(whole)["input_ids"])
    assert not base.is_longer([{"role": "user", "content": whole}], tokens)
    least = tokens - 2 * engine_module.CUT * (characters // engine_module.PART + 1)
    if characters > 8 * least > 0:
        assert base.is_longer([{"role": "user", "content": whole}], max(1, least))


class ByteTokenizer:
    """Cuts text as few tokenizers do: 50 times the same character is one token."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[str]]:
        return {"input_ids": [m[0] for m in re.finditer(r"(.)\1{0,49}", text, re.DOTALL)]}


def test_a_client_that_leaves_is_not_worked_for(served: Served) -> None:
    made = served.world.adapter("long", 7)
    assert served.stage(made, max_new_tokens=CONTEXT).status_code == 200
    served.world.record(made)
    served.activate(made)
    engine = served.app.state.engine
    host, port = served.url.removeprefix("http://").split(":")
    for stream in (False, True):
        body = json.dumps(
            {"model": "long", "messages": QUESTION, "stream": stream, "stop": "\u2063"}
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        head += f"Authorization: Bearer {served.world.key}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            _wait(lambda: engine._live, "the request to start")
        _wait(lambda: not engine._live, "the request to end")
        assert all(live.decoder.tokens_with([]) == 0 for live in engine._idle.values()), "its slot is free"
        _wait(lambda: engine.served["long"].leases == 0, "the version to be free")
    text = httpx.get(f"{served.url}/metrics").text
    assert 'evergreen_requests_total{customization="long",status="499"} 2.0' in text


def test_a_client_that_leaves_before_the_first_chunk_is_not_worked_for(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    _long(served, "left", 27)
    engine = served.app.state.engine
    generations: list[Any] = []
    submit = engine.submit
    monkeypatch.setattr(
        engine, "submit", lambda *a, **b: generations.append(submit(*a, **b)) or generations[-1]
    )
    body = json.dumps({"model": "left", "messages": QUESTION, "stream": True, "stop": "\u2063"}).encode()
    messages = [{"type": "http.request", "body": body}]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {served.world.key}".encode())],
    }

    async def leave() -> None:
        gone = asyncio.Event()

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            gone.set()
            await asyncio.sleep(60)  # nobody reads: what is sent stays in the buffer

        await served.app(scope, receive, send)

    asyncio.run(leave())
    assert [generation.cancelled for generation in generations] == [True]
    assert engine.served["left"].leases == 0
    _wait(lambda: not engine._live, "its row to be free")


def _wait(condition: Any, what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.002)


def test_a_busy_customization_does_not_starve_another(served: Served) -> None:
    made = served.world.adapter("busy", 21)
    assert served.stage(made, max_new_tokens=CONTEXT).status_code == 200
    served.world.record(made)
    served.activate(made)
    engine = served.app.state.engine
    finished: list[str] = []

    def ask(model: str) -> None:
        assert served.chat(model=model, stop="\u2063").status_code == 200
        finished.append(model)

    with ThreadPoolExecutor(3) as pool:
        long = [pool.submit(ask, "busy") for _ in range(2)]
        _wait(lambda: engine._live, "the long answers to start")
        pool.submit(ask, "news").result()
        for future in long:
            future.result()
    assert finished[0] == "news"


def _long(served: Served, name: str, seed: int) -> Made:
    """A customization that answers until its context is full."""
    made = served.world.adapter(name, seed)
    assert served.stage(made, max_new_tokens=CONTEXT).status_code == 200
    served.world.record(made)
    served.activate(made)
    return made


def test_a_flood_leaves_room_for_others(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    _long(served, "flood", 22)
    share = 6
    monkeypatch.setattr(engine_module, "SHARE", share)
    together: set[frozenset[str]] = set()
    most = 0
    arrived = threading.Event()
    step = Live.step

    def watched(live: Live) -> int:
        nonlocal most
        names = [request.version.customization for request in live.requests.values()]
        most = max(most, names.count("flood"))
        together.add(frozenset(names))
        if most >= share:
            arrived.set()
        if not arrived.is_set():  # a tiny model may be done before the next request is here
            time.sleep(0.05)
        return step(live)

    def ask() -> httpx.Response:
        while True:  # clients that all come during one step find a full queue
            answer = served.chat(model="flood", stop="\u2063")
            if answer.status_code != 429 or arrived.is_set():
                return answer
            time.sleep(0.02)

    monkeypatch.setattr(Live, "step", watched)
    with ThreadPoolExecutor(25) as pool:
        flood = [pool.submit(ask) for _ in range(24)]
        assert arrived.wait(60)
        answers = [served.chat(model="news"), *(future.result() for future in flood)]
    assert all(answer.status_code in (200, 429) for answer in answers)
    assert most == share, "others would not find room"
    assert frozenset({"flood", "news"}) in together, "different adapters in one batch"


def test_answers_of_a_mixed_batch_are_those_alone(served: Served) -> None:
    names = [("home", "news")[i % 2] for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: served.chat(model=name), names))
    for name, answer in zip(names, answers, strict=True):
        if answer.status_code == 200:
            assert answer.headers["x-evergreen-adapter"] == served.adapters[name].digest
            if name == "home":  # news has a system prompt that its reference answers lack
                assert _content(answer) in served.adapters[name].answers
    assert len({_content(a) for a in answers if a.status_code == 200}) >= 2


def test_a_request_ends_at_its_deadline(served: Served) -> None:
    _long(served, "slow", 23)
    engine = served.app.state.engine
    late = served.chat(model="slow", stop="\u2063", timeout=0.02)
    assert late.status_code == 504, late.text
    assert late.json()["error"]["code"] == "deadline_exceeded"
    stream = served.chat(model="slow", stop="\u2063", timeout=0.05, stream=True)
    assert json.loads(stream.text.strip().splitlines()[-1][6:])["error"]["code"] == "deadline_exceeded"
    _wait(lambda: not engine._live and engine.served["slow"].leases == 0, "the slot to be free")
    before = engine.request_seconds
    engine.request_seconds = 0.02
    try:
        assert served.chat(model="slow", stop="\u2063", timeout=100.0).status_code == 504, (
            "the gateway's limit"
        )
    finally:
        engine.request_seconds = before
    assert served.chat(timeout=100.0).status_code == 200
    assert served.chat(timeout=0).status_code == 400


def test_a_waiting_request_ends_at_its_deadline(tmp_path: Path) -> None:
    world = World(tmp_path)
    made = world.adapter("only", 1)
    world.record(made, max_new_tokens=CONTEXT)
    with gateway_in_thread(world, kv_bytes=1) as (url, app):
        client = httpx.Client(base_url=url, headers=bearer(world.key), timeout=60)
        body = {"model": "only", "messages": QUESTION, "stop": "\u2063"}
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(lambda: client.post("/v1/chat/completions", json=body))
            _wait(lambda: app.state.engine._live, "the first request to start")
            second = client.post("/v1/chat/completions", json=body | {"timeout": 0.05})
            assert second.status_code == 504, "one at a time: there is room for no more"
            assert not first.done()
            assert first.result().status_code == 200
        # without deadlines, all are answered one after the other
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(client.post, "/v1/chat/completions", json=body) for _ in range(3)]
            assert [future.result().status_code for future in asked] == [200] * 3


def test_an_adapter_loads_while_a_stream_goes_on(served: Served) -> None:
    _long(served, "stream", 24)
    body = {"model": "stream", "messages": QUESTION, "stop": "\u2063", "stream": True}
    alone = _streamed_text(served.http.post("/v1/chat/completions", json=body).text)
    new = served.world.adapter("home", 25)
    lines: list[str] = []
    with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
        events = response.iter_lines()
        while len(lines) < 20:
            lines.append(next(events))
        served.serve(new)
        at = len(lines)
        lines += list(events)
    assert len(lines) > at and "data: [DONE]" in lines
    assert _streamed_text("\n".join(lines)) == alone
    assert served.chat().json()["system_fingerprint"] == new.digest
    served.serve(served.adapters["home"])


def test_labels_are_chosen_as_they_were_evaluated(served: Served) -> None:
    from ml_assets.engine.scoring import choose_labels

    labels = ["kitchen", "living room", "kitchen light", "off"]
    made = served.world.adapter("topics", 26, manifest={"answer_by": "label_scores", "labels": labels})
    served.serve(made)
    base = served.world.base()[0]
    base.attach("topics", served.world.store.open(ArtifactRef("adapter", made.digest)))
    texts = ["turn on the light", "a", "what?", "close the window", "business"]
    prompts = [base.chat.prompt_ids([{"role": "user", "content": text}]) for text in texts]
    with base.active("topics"):
        chosen = choose_labels(base, prompts, [base.chat.target_ids(label) for label in labels])
    base.detach("topics")
    asked = [{"model": "topics", "messages": [{"role": "user", "content": text}]} for text in texts]
    with ThreadPoolExecutor(4) as pool:  # as many as may wait
        answers = list(pool.map(lambda body: served.chat(**body), asked))
    assert [_content(answer) for answer in answers] == [labels[i] for i in chosen]
    assert answers[0].json()["choices"][0]["finish_reason"] == "stop"
    assert answers[0].json()["usage"]["completion_tokens"] >= 1
    streamed = served.chat(**asked[0], stream=True)
    assert _streamed_text(streamed.text) == labels[chosen[0]]


def test_a_prompt_leaves_room_for_the_longest_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path)
    labels = ["business news of the day and more", "sport", "politics"]
    made = world.adapter(
        "lab", 2, architecture="gpt2", manifest={"answer_by": "label_scores", "labels": labels}
    )
    world.record(made)
    with gateway_in_thread(world) as (url, app):
        engine = app.state.engine
        text = engine.served["lab"].text
        client = httpx.Client(base_url=url, headers=bearer(world.key), timeout=60)

        def ask(length: int) -> httpx.Response:
            body = {"model": "lab", "messages": [{"role": "user", "content": "a" * length}]}
            return client.post("/v1/chat/completions", json=body)

        around = text.count([{"role": "user", "content": ""}])
        most = CONTEXT - max(len(text.chat.target_ids(label)) for label in labels)
        assert ask(most - around).status_code == 200
        long = ask(most - around + 1)
        assert long.status_code == 413 and f"at most {most}" in long.text

        def best_labels(base: Any, prompts: list[list[int]], *rest: Any) -> Any:
            if any(len(prompt) > 100 for prompt in prompts):
                raise IndexError("index out of range in self")
            return scoring_best(base, prompts, *rest)

        from ml_assets.engine import scoring

        scoring_best = scoring.best_labels
        monkeypatch.setattr(scoring, "best_labels", best_labels)
        go = threading.Event()
        with ThreadPoolExecutor(6) as pool:
            pool.submit(engine._compute, go.wait)
            asked = [pool.submit(ask, length) for length in (5, 200, 6, 7)]
            _wait(lambda: sum(map(len, engine._waiting.values())) == 4, "all to wait together")
            go.set()
            assert [future.result().status_code for future in asked] == [200, 500, 200, 200]


# -- health and metrics --------------------------------------------------------------------------------


def test_health_and_metrics(served: Served) -> None:
    body = httpx.get(f"{served.url}/healthz").json()
    assert body["live"] is True and body["status"] == "ready" and body["unserved"] == {}
    assert body["served"]["news"]["adapter_digest"] == served.adapters["news"].digest
    served.chat(model="news", max_tokens=2)
    served.chat(model="no-such-model")
    text = httpx.get(f"{served.url}/metrics").text
    assert re.search(r'evergreen_requests_total\{customization="news",status="200"\} [1-9]', text)
    assert re.search(r'evergreen_tokens_total\{customization="news",kind="completion"\} [1-9]', text)
    assert re.search(r'evergreen_first_token_seconds_count\{customization="news"\} [1-9]', text)
    assert re.search(r'evergreen_queue_length\{customization="news"\} 0', text)
    assert f'evergreen_served{{adapter="{served.adapters["news"].digest}",base=' in text
    assert "no-such-model" not in text


# -- versions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swaps", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_swaps_under_load_lose_and_mix_up_nothing(served: Served, swaps: int) -> None:
    versions = [served.world.adapter("home", seed) for seed in (1, 2, 4)]
    golden = {made.digest: made.answers for made in versions}
    assert not frozenset.intersection(*golden.values())
    ending = threading.Event()
    results: list[tuple[int, str | None, str]] = []

    def ask(number: int) -> None:
        with httpx.Client(base_url=served.url, headers=bearer(served.world.key), timeout=60) as client:
            while not ending.is_set():
                body = {"model": "home", "messages": QUESTION, "stream": number == 0}
                response = client.post("/v1/chat/completions", json=body)
                text = response.text
                if response.status_code == 200:
                    text = _streamed_text(text) if number == 0 else _content(response)
                results.append((response.status_code, response.headers.get("x-evergreen-adapter"), text))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    order = random.Random(0)
    try:
        for n in range(swaps):
            version = versions[n] if n < 3 else order.choice(versions)
            served.serve(version)
            if n < 3:  # so that every version answers, however slow the machine is
                _wait(lambda v=version: any(v.digest == d for _, d, _ in list(results)), "an answer")
    finally:
        ending.set()
        for thread in threads:
            thread.join()
        served.serve(served.adapters["home"])
    assert {status for status, _, _ in results} == {200}
    assert len(results) >= swaps
    assert len({digest for _, digest, _ in results}) == 3, "every version answered"
    for _, digest, text in results:
        assert digest and text in golden[digest]
    engine = served.app.state.engine
    _wait(lambda: len(engine._alive) == len(engine.served), "old versions to be detached")
    [base] = {version.loaded.base for version in engine.served.values()}
    left = {version.adapter_digest for version in engine.served.values()}
    _wait(lambda: set(base.adapters) == left, "their adapters to be gone")


def _content(response: httpx.Response) -> str:
    return response.json()["choices"][0]["message"]["content"]


def _streamed_text(body: str) -> str:
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    return "".join(e["choices"][0]["delta"].get("content", "") for e in events)


def test_only_what_the_ledger_says_is_served(served: Served) -> None:
    before, other = served.adapters["home"], served.adapters["home2"]
    staged = served.stage(other)
    assert staged.status_code == 200 and staged.json()["verified"] is True
    body = {"customization": "home", "adapter_digest": other.digest}
    refused = served.admin.post("/admin/activate", json=body)
    assert refused.status_code == 409 and refused.json()["error"]["code"] == "not_in_ledger"
    assert served.chat().json()["system_fingerprint"] == before.digest
    assert served.admin.post("/admin/discard", json={"customization": "home"}).status_code == 200
    _wait(lambda: "home" not in served.app.state.engine.staged, "the staged version to be gone")


def test_names_in_admin_requests_are_those_of_customizations(served: Served) -> None:
    for path, more in (("activate", {"adapter_digest": None}), ("discard", {}), ("probe", {})):
        answer = served.admin.post(f"/admin/{path}", json={"customization": "a\0b"} | more)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "customization"
        assert "pattern" in answer.json()["error"]["message"]
    made = served.adapters["home"]
    assert served.stage(made, customization="a\0b").json()["error"]["param"] == "customization"


def test_a_ledger_that_does_not_answer(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: Any) -> None:
        raise sa.exc.OperationalError("SELECT", {}, Exception("server closed the connection"))

    def counted() -> float:
        text = httpx.get(f"{served.url}/metrics").text
        found = re.search(r'evergreen_requests_total\{customization="-",status="503"\} (\S+)', text)
        return float(found[1]) if found else 0.0

    before = counted()
    monkeypatch.setattr(keys, "authenticate", away)
    for answer in (served.chat(), served.http.get("/v1/models")):
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["code"] == "keys_not_available"
        assert "server closed" not in answer.text
    assert counted() == before + 2
    assert len([r for r in caplog.records if "server closed the connection" in r.getMessage()]) == 1


def test_a_loading_thread_works_however_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no")

    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path))
    monkeypatch.setattr(hardware, "compute_alone", broken)
    engine = Engine(ArtifactStore(str(tmp_path / "artifacts")))
    engine.start()
    try:
        assert engine._loader.submit(lambda: "loaded").result(60) == "loaded"
    finally:
        engine.close()


@pytest.mark.parametrize("wrong", ["fingerprint", "no_effect", "base", "name", "damaged", "missing", "code"])
def test_a_wrong_adapter_is_never_served(served: Served, wrong: str) -> None:
    world, before = served.world, served.adapters["home"]
    changes: dict[str, Any] = {}
    if wrong == "fingerprint":
        made, code = world.adapter("home", 11, fingerprint_of=12), "fingerprint_mismatch"
    elif wrong == "no_effect":
        probes = [{"messages": QUESTION, "answer": "x", "with": -1.0, "without": -1.0}]
        fingerprint = {"probes": probes, "tolerance": 0.05}
        made, code = world.adapter("home", 13, manifest={"fingerprint": fingerprint}), "artifact_error"
    elif wrong == "base":
        made, code = world.adapter("home", 14, manifest={"base_identity": "0" * 64}), "incompatible_adapter"
    elif wrong == "name":
        made, code = world.adapter("another", 15), "incompatible_adapter"
        changes = {"customization": "home"}
    elif wrong == "damaged":
        made, code = world.adapter("home", 16), "artifact_error"
        path = world.home / "artifacts" / "adapter" / made.digest / "adapter_model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif wrong == "missing":
        made, code = world.adapter("home", 17), "artifact_error"
        changes = {"adapter_digest": "0" * 64}
    else:
        made, code = world.adapter("home", 18), "artifact_error"
        source = world.home / "artifacts" / "adapter" / made.digest
        files = {p.name: p.read_bytes() for p in source.iterdir() if p.name != "files.json"}
        changes = {"adapter_digest": world.store.publish("adapter", files | {"model.pkl": b"x"}).digest}
    response = served.stage(made, **changes)
    assert response.status_code in (409, 422), response.text
    assert response.json()["error"]["code"] == code, response.text
    answer = served.chat()
    assert answer.json()["system_fingerprint"] == before.digest and _content(answer) in before.answers
    assert "home" not in served.app.state.engine.staged
    _wait(lambda: len(served.app.state.engine._alive) == len(served.app.state.engine.served), "the end of it")


def test_two_bases_at_once(served: Served) -> None:
    made = served.world.adapter("home", 5, architecture="qwen2")
    served.serve(made)
    answer = served.chat()
    assert answer.headers["x-evergreen-base"] == made.base_revision
    assert _content(answer) in made.answers
    assert served.chat(model="news", max_tokens=1).status_code == 200
    served.serve(served.adapters["home"])
    _wait(lambda: len(served.app.state.engine._bases) == 1, "the base that nobody uses to be freed")


def test_a_withdrawn_customization_is_unknown(served: Served) -> None:
    made = served.world.adapter("short_lived", 6)
    served.serve(made)
    assert served.chat(model="short_lived").status_code == 200
    served.world.record(made, action="withdraw")
    body = {"customization": "short_lived", "adapter_digest": None}
    assert served.admin.post("/admin/activate", json=body).status_code == 200
    assert served.chat(model="short_lived").status_code == 404


def test_a_start_serves_what_verifies_and_leaves_out_the_rest(tmp_path: Path) -> None:
    world = World(tmp_path)
    good, bad = world.adapter("good", 1), world.adapter("bad", 2, fingerprint_of=3)
    world.record(good)
    world.record(bad)
    with gateway_in_thread(world) as (url, _):
        health = httpx.get(f"{url}/healthz").json()
        assert health["status"] == "degraded"
        assert list(health["served"]) == ["good"]
        assert "does not answer with its fingerprint" in health["unserved"]["bad"]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=world.key, max_retries=0)
        assert (
            client.chat.completions.create(model="good", messages=QUESTION).system_fingerprint == good.digest
        )
        with pytest.raises(openai.InternalServerError, match="does not answer with its fingerprint") as error:
            client.chat.completions.create(model="bad", messages=QUESTION)
        assert error.value.status_code == 503 and error.value.code == "model_not_available"


def test_what_is_wrong_with_an_artifact_is_for_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path)
    made = world.adapter("bad", 1)
    world.record(made)
    path = tmp_path / "artifacts" / "adapter" / made.digest / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with gateway_in_thread(world) as (url, _):
        health = httpx.get(f"{url}/healthz")
        assert "damaged or incomplete (see the gateway's log)" in health.json()["unserved"]["bad"]
        body = {"model": "bad", "messages": QUESTION}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=bearer(world.key))
        assert answer.status_code == 503 and "damaged or incomplete" in answer.text
        assert str(tmp_path) not in health.text + answer.text
    assert f"{path}: hash is" in caplog.text
