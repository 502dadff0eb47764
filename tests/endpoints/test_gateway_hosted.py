"""A hosted base at the gateway: the official client in front, a provider that may fail behind."""

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from gateway_world import World, gateway_in_thread, said_in
from hosted_servers import KEY, KEY_NAME, Copycat, answer_of, copycat, tokens_of

from ml_assets.base_models.build import build_base
from ml_assets.base_models.register import current_revision
from ml_assets.endpoints.gateway import hosted as hosted_module
from ml_assets.endpoints.gateway.client import GatewayClient, GatewayError
from ml_assets.endpoints.ledger import Release
from ml_assets.endpoints.release import read_fingerprint, serve_again, verify_served
from ml_assets.engine.examples import Examples, Nearest, files_of, put_before
from ml_assets.settings import Settings

EXAMPLES = [
    ("turn on the light", "on it goes now"),
    ("what is the time", "late"),
    ("close the window", "shut"),
]
QUESTION: list[Any] = [{"role": "user", "content": "turn the light on"}]
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [SYSTEM, *put_before(QUESTION, EXAMPLES)]


class Site:
    """A gateway in front of a provider, that serves `home` on it."""

    def __init__(self, world: World, url: str, app: FastAPI, provider: Copycat, released: Release):
        self.world, self.url, self.app, self.provider = world, url, app, provider
        self.released = released
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=world.key, max_retries=0)
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {world.key}"}, timeout=60)
        self.admin = GatewayClient(url, world.admin_key)

    def chat(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={"model": "home", "messages": QUESTION} | body)


def publish(
    world: World,
    provider: Copycat,
    examples: Examples,
    *,
    customization: str = "home",
    labels: list[str] | None = None,
    counted: Callable[[list[Any]], int] = tokens_of,
    question: list[Any] = QUESTION,
    **source: Any,
) -> Release:
    """An adapter for the provider's model in the store, as a release would name it."""
    family = provider.family(**source)
    revision = current_revision(family, Path("."), Settings.from_env())
    base = build_base(revision, [family], Path("."), Settings.from_env(), world.store)
    asked = [SYSTEM, *question]
    shown = examples.before(asked, tokens_of, 2000)
    probe = {"messages": asked, "answer": "on", "with": counted(shown), "without": counted(asked)}
    manifest = {
        "customization": customization,
        "base_revision": revision,
        "base_identity": base.manifest["identity"],
        "kind": "prompt",
        "prompt": {"system": SYSTEM["content"], "user": "{text}", "target": "{answer}"},
        "examples": [] if examples.nearest else [list(pair) for pair in examples.pairs],
        "retrieval": {"count": examples.count} if examples.nearest else None,
        "answer_tokens": examples.answer_tokens,
        "answer_by": "label_scores" if labels else "generation",
        "labels": labels or [],
        "fingerprint": {"probes": [probe], "tolerance": 0.5},
    }
    files = {"manifest.json": json.dumps(manifest).encode(), **files_of(examples)}
    ref = world.store.publish("adapter", files)
    return Release(
        customization=customization,
        base_revision=revision,
        base_digest=base.ref.digest,
        adapter_digest=ref.digest,
        report_digest="c" * 64,
        mlflow_version="1",
        run_id="run",
        actor="test",
        reason="test",
        max_new_tokens=12,
    )


def record(world: World, release: Release) -> None:
    with world.ledger.release_transaction(release.customization, release.run_id) as tx:
        tx.record(release)


@pytest.fixture(scope="module")
def module_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_NAME, KEY)
        patch.setenv("EVERGREEN_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr("ml_assets.engine.hosted.FIRST_WAIT", 0.01)
        world = World(tmp_path_factory.mktemp("hosted"))
        with copycat() as provider:
            released = publish(world, provider, Examples(tuple(EXAMPLES), 12), at_once=2)
            record(world, released)
            with gateway_in_thread(world, max_queue=4) as (url, app):
                yield Site(world, url, app, provider, released)


@pytest.fixture
def site(module_site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv(KEY_NAME, KEY)
    provider = module_site.provider
    provider.failures, provider.retry_after, provider.piece_seconds = [], None, 0.0
    provider.listing = {"id": "copycat-2024-05-01", "owned_by": "tests"}
    return module_site


def test_the_official_client_sees_no_difference(site: Site) -> None:
    raw = site.client.chat.completions.with_raw_response.create(model="home", messages=QUESTION)
    answer = raw.parse()
    assert answer.choices[0].message.content == answer_of(ASKED) == "on it goes now"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage and answer.usage.prompt_tokens == tokens_of(ASKED), "as the provider counts them"
    assert answer.usage.completion_tokens == 4
    assert raw.headers["x-evergreen-base"] == site.released.base_revision
    assert site.provider.asked[-1]["messages"] == ASKED
    assert site.provider.asked[-1]["temperature"] == 0

    stream = site.client.chat.completions.create(
        model="home", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert pieces == ["on", " it", " goes", " now"]
    assert chunks[-1].usage and chunks[-1].usage.total_tokens == tokens_of(ASKED) + 4
    short = site.chat(max_tokens=2).json()
    assert short["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "message": {"role": "assistant", "content": "on it"},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert site.chat(stop=" goes").json()["choices"][0]["message"]["content"] == "on it"
    own = [{"role": "system", "content": "Be long."}, *QUESTION]
    site.chat(messages=own, temperature=0.7, top_p=0.5, seed=7)
    assert site.provider.asked[-1]["messages"] == put_before(own, EXAMPLES)
    assert {name: site.provider.asked[-1][name] for name in ("temperature", "top_p", "seed")} == {
        "temperature": 0.7,
        "top_p": 0.5,
        "seed": 7,
    }


@pytest.mark.parametrize(
    ("pieces", "ascii_only", "said"),
    [
        (["a\u2028b", "\x85c"], False, "a\u2028b\x85c"),
        (["on it \ud83d", "\ude00 now"], True, "on it \U0001f600 now"),
        (["on it \ud83d", " now \ud83d"], True, "on it \ufffd now \ufffd"),
    ],
    ids=["what ends a line elsewhere", "a character in two halves", "a half alone"],
)
def test_any_characters_may_come(
    site: Site, monkeypatch: pytest.MonkeyPatch, pieces: list[str], ascii_only: bool, said: str
) -> None:
    async def chunks(*_: Any) -> AsyncIterator[str]:
        choices = [{"index": 0, "delta": {"content": piece}, "finish_reason": None} for piece in pieces]
        usage = {"prompt_tokens": 5, "completion_tokens": 3}
        end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage}
        for event in (*({"choices": [choice]} for choice in choices), end):
            yield f"data: {json.dumps(event, ensure_ascii=ascii_only)}\r\n\r\n"
        yield "data: [DONE]\n\n"

    monkeypatch.setattr(Copycat, "_chunks", chunks)
    answer = site.chat().json()
    assert answer["choices"][0]["message"]["content"] == said
    assert answer["usage"]["completion_tokens"] == 3
    body = {"model": "home", "messages": QUESTION, "stream": True}
    with site.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert said_in(response.iter_lines()) == said


def test_a_connection_that_nobody_uses_is_closed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = site.app.state.engine
    own = engine.served["home"].text
    other = publish(site.world, site.provider, Examples((), 12), customization="other", seconds=4.0)
    assert other.base_digest != site.released.base_digest
    site.admin.stage(other)
    text = engine.staged["other"].text
    engine.discard("other")
    _wait(lambda: text.http.is_closed, "the connection to be closed")
    assert other.base_digest not in engine.hosted._texts

    monkeypatch.setenv(KEY_NAME, "sk-newer")  # one that the provider does not know
    with pytest.raises(GatewayError):
        site.admin.stage(site.released)
    _wait(lambda: site.released.base_digest not in engine.hosted._texts, "the refused key to be forgotten")
    assert engine.served["home"].text is own and not own.http.is_closed
    assert site.chat().status_code == 200


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def test_released_and_found_again(site: Site) -> None:
    fingerprint = read_fingerprint(site.world.store, site.released.adapter_digest)
    verify_served(site.released, fingerprint, site.admin)
    before = site.provider.chats
    for _ in range(5):
        site.admin.probe("home")
    assert site.provider.chats == before, "health checks are not paid for"
    assert not serve_again(site.released, store=site.world.store, gateway=site.admin)
    site.provider.listing = {"id": "copycat-2024-05-01", "owned_by": "somebody else"}
    with pytest.raises(GatewayError, match="serves another revision of copycat-2024-05-01 now"):
        site.admin.probe("home")


def test_a_model_that_reads_otherwise_is_refused(site: Site) -> None:
    examples = Examples(tuple(EXAMPLES), 11)
    other = publish(site.world, site.provider, examples, counted=lambda messages: tokens_of(messages) + 9)
    with pytest.raises(GatewayError, match="does not answer with its fingerprint"):
        site.admin.stage(other)
    assert site.chat().status_code == 200, "what serves is not touched"


@pytest.mark.parametrize("failures", [[500], [429], ["garbage"], [503, 429]])
def test_what_passes_is_waited_out(site: Site, failures: list[Any]) -> None:
    site.provider.failures = list(failures)
    assert site.chat().json()["choices"][0]["message"]["content"] == "on it goes now"
    assert not site.provider.failures


@pytest.mark.parametrize(
    ("failures", "status", "code"),
    [
        ([500] * 3, 503, "provider_unavailable"),
        ([429] * 3, 429, "provider_busy"),
        ([401], 502, "provider_refused"),
        ([400], 400, "provider_refused_request"),
    ],
)
def test_what_does_not_pass_is_told_without_the_key(
    site: Site, failures: list[Any], status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    site.provider.failures = list(failures)
    with caplog.at_level(logging.DEBUG):
        response = site.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert KEY not in response.text and KEY not in caplog.text
    assert status not in (429, 503) or int(response.headers["retry-after"]) >= 1
    assert site.chat().status_code == 200


def test_the_provider_says_when(site: Site) -> None:
    site.provider.failures, site.provider.retry_after = [429], "1"
    start = time.monotonic()
    assert site.chat().status_code == 200
    assert time.monotonic() - start >= 1
    site.provider.failures, site.provider.retry_after = [429], "60"
    response = site.chat(timeout=2)
    assert response.status_code == 429 and response.headers["retry-after"] == "60", "not waited for in vain"


@pytest.mark.parametrize("failure", ["cut", "error", "half"])
def test_an_answer_that_breaks_off_is_an_error(site: Site, failure: str) -> None:
    site.provider.failures = [failure]
    response = site.chat(stream=True)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert json.loads(events[-1])["error"]["code"] == "provider_lost"
    assert "[DONE]" not in response.text
    site.provider.failures = [failure]
    assert site.chat().status_code == 502


def test_slow_providers_and_lost_clients(site: Site) -> None:
    site.provider.failures = ["slow"]
    start = time.monotonic()
    assert site.chat(timeout=0.5).status_code == 504
    assert time.monotonic() - start < 5
    site.provider.failures = ["endless"]
    body = {"model": "home", "messages": QUESTION, "stream": True, "max_tokens": 12}
    with site.http.stream("POST", "/v1/chat/completions", json=body) as r:
        lines = r.iter_lines()  # kept: to drop it closes the connection
        assert next(line for line in lines if "more" in line)
        assert site.provider.open == 1
    deadline = time.monotonic() + 10
    while site.provider.open and time.monotonic() < deadline:
        time.sleep(0.02)
    assert site.provider.open == 0, "a client that is gone is not paid for"


def test_no_more_at_once_than_allowed(site: Site) -> None:
    site.provider.piece_seconds = 0.3
    most = 0

    def ask(_: int) -> int:
        return site.chat().status_code

    with ThreadPoolExecutor(10) as pool:
        answers = [pool.submit(ask, i) for i in range(10)]
        while not all(answer.done() for answer in answers):
            most = max(most, site.provider.open)
            time.sleep(0.01)
    statuses = sorted(answer.result() for answer in answers)
    assert most == 2
    assert set(statuses) == {200, 429} and statuses.count(200) >= 6, "two answer, four wait"


def test_nearest_examples_and_labels(site: Site) -> None:
    pairs = [(f"the {name} please", name) for name in ("lamp", "door", "radio", "oven", "fan")]
    nearest = Examples(tuple(pairs), 12, Nearest.fit([asked for asked, _ in pairs]), 2)
    labels = [name for _, name in pairs]
    question = [{"role": "user", "content": "now the radio"}]
    release = publish(
        site.world, site.provider, nearest, customization="things", labels=labels, question=question
    )
    site.admin.stage(release)
    record(site.world, release)
    site.admin.activate("things", release.adapter_digest)
    answer = site.client.chat.completions.create(model="things", messages=question, stream=True)  # type: ignore[call-overload]
    assert "".join(c.choices[0].delta.content or "" for c in answer) == "radio"
    asked = site.provider.asked[-1]["messages"]
    assert "- radio" in asked[0]["content"] and len(asked) == 2 + 2 * 2
    assert asked[-2]["content"] == "radio"


def test_our_own_gateway_is_a_provider(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that another team serves with this program are hosted bases here."""
    theirs = site.world.adapter("theirs", 1)
    site.admin.stage(theirs.release())
    site.world.record(theirs)
    site.admin.activate("theirs", theirs.digest)
    monkeypatch.setenv("OUR_KEY", site.world.key)
    one, asked = EXAMPLES[:1], [SYSTEM, *put_before(QUESTION, EXAMPLES[:1])]

    def counted(messages: list[Any]) -> int:
        return len(site.world.base()[0].chat.prompt_ids(messages))

    release = publish(
        site.world,
        site.provider,
        Examples(tuple(one), 12),
        customization="ours",
        counted=counted,
        url=f"{site.url}/v1",
        model="theirs",
        key="OUR_KEY",
    )
    assert site.admin.stage(release).with_adapter == (float(counted(asked)),)
    record(site.world, release)
    site.admin.activate("ours", release.adapter_digest)
    direct = site.chat(model="theirs", messages=asked, max_tokens=12).json()
    through = site.client.chat.completions.create(model="ours", messages=QUESTION, stream=True)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in through)
    assert said == direct["choices"][0]["message"]["content"] != ""


def test_without_its_key_it_is_not_served(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.delenv(KEY_NAME)
    with gateway_in_thread(site.world) as (url, _):
        health = httpx.get(f"{url}/healthz").json()
    assert health["served"].keys().isdisjoint({"home"})
    assert f"environment variable {KEY_NAME}: expected the API key" in health["unserved"]["home"]


def test_a_gateway_that_starts_before_its_provider(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml_assets.endpoints.gateway.app.RESTORE_SECONDS", 0.2)
    monkeypatch.setenv(KEY_NAME, KEY)
    world = World(tmp_path_factory.mktemp("later"))
    with copycat() as provider:
        record(world, publish(world, provider, Examples((), 12), attempts=1))
        provider.failures = [500] * 2
        with gateway_in_thread(world) as (url, _):
            deadline = time.monotonic() + 20
            while not httpx.get(f"{url}/healthz").json()["served"]:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_no_key_is_written_anywhere(site: Site) -> None:
    files = [path for path in site.world.home.rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in path.read_bytes() for path in files)
    assert hosted_module.PROBE_SECONDS > 60
