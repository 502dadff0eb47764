"""What the gateway stores of its requests, and the feedback that it takes, over real HTTP."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from gateway_world import QUESTION, Made, World, gateway_in_thread

from ml_assets.artifacts import ArtifactRef
from ml_assets.endpoints.gateway import keys
from ml_assets.endpoints.ledger import Ledger
from ml_assets.engine.scoring import label_log_probs, mean_logprobs
from ml_assets.traffic.records import TrafficRecord
from ml_assets.traffic.store import TrafficLog
from ml_assets.traffic.writer import TrafficWriter

LABELS = ["kitchen", "living room", "off"]


class Served:
    def __init__(self, world: World, url: str, app: FastAPI, made: dict[str, Made], writer: TrafficWriter):
        self.world, self.url, self.app, self.made, self.writer = world, url, app, made, writer
        self.log = TrafficLog(writer.url)
        self.http = self.with_key(world.key)

    def with_key(self, key: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def chat(self, http: httpx.Client | None = None, **body: Any) -> httpx.Response:
        body = {"model": "home", "messages": QUESTION} | body
        return (http or self.http).post("/v1/chat/completions", json=body)

    def record(self, response_id: str) -> TrafficRecord:
        assert self.writer.flush()
        found = self.log.request(response_id)
        assert found is not None
        return found

    def say(self, http: httpx.Client | None = None, **body: Any) -> httpx.Response:
        return (http or self.http).post("/v1/feedback", json=body)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    world = World(tmp_path_factory.mktemp("traffic"))
    made = {
        "home": world.adapter("home", 1, system="Be brief."),
        "private": world.adapter("private", 2),
        "topics": world.adapter("topics", 3, manifest={"answer_by": "label_scores", "labels": LABELS}),
    }
    world.record(made["home"])
    world.record(made["topics"])
    world.record(made["private"], traffic_policy={"redact": [], "retention": "1d"})
    writer = TrafficWriter(f"sqlite:///{world.home}/traffic.db")
    with gateway_in_thread(world, traffic=writer) as (url, app):
        yield Served(world, url, app, made, writer)


def test_a_request_is_stored_with_its_answer(served: Served) -> None:
    asked = [{"role": "user", "content": "turn on the light, a@b.com"}]
    answer = served.chat(messages=asked, metadata={"language": "en"}).json()
    record = served.record(answer["id"])
    made = served.made["home"]
    assert record.messages == [{"role": "user", "content": "turn on the light, [EMAIL]"}]
    assert record.answer == answer["choices"][0]["message"]["content"]
    assert (record.customization, record.adapter_digest) == ("home", made.digest)
    assert record.base_revision == made.base_revision
    assert record.key_id == served.world.key.split("_")[1]
    assert (record.status, record.finish_reason) == (200, answer["choices"][0]["finish_reason"])
    assert record.prompt_tokens == answer["usage"]["prompt_tokens"]
    assert record.completion_tokens == answer["usage"]["completion_tokens"]
    assert record.metadata == {"language": "en"}
    assert record.first_token_ms is not None and 0 < record.first_token_ms <= record.latency_ms < 60_000


def test_the_ledger_says_what_is_redacted(served: Served) -> None:
    answer = served.chat(model="private", messages=[{"role": "user", "content": "a@b.com"}]).json()
    assert served.record(answer["id"]).messages[0]["content"] == "a@b.com"


def test_mean_logprob_is_that_of_the_answer(served: Served) -> None:
    """As a forward pass over the whole answer says, for greedy and for sampled answers."""
    base = served.world.base()[0]
    base.attach("home", served.world.store.open(ArtifactRef("adapter", served.made["home"].digest)))
    system = {"role": "system", "content": "Be brief."}
    prompt = base.chat.prompt_ids([system, *QUESTION])
    try:
        for options in ({}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}):
            tokens: list[int] = []
            feed = served.app.state.engine.submit

            def spy(*args: Any, feed: Any = feed, tokens: list[int] = tokens, **kwargs: Any) -> Any:
                request = feed(*args, **kwargs)
                real = request.feed

                def keep(token: int | None, *rest: Any) -> None:
                    if token is not None:
                        tokens.append(token)
                    real(token, *rest)

                request.feed = keep
                return request

            served.app.state.engine.submit = spy
            try:
                answer = served.chat(**options).json()
            finally:
                served.app.state.engine.submit = feed
            record = served.record(answer["id"])
            assert record.finish_reason == "length" and len(tokens) == record.completion_tokens
            with base.active("home"):
                expected = mean_logprobs(base, [(prompt, tokens)])[0]
            assert record.mean_logprob == pytest.approx(expected, abs=1e-3)
            assert record.mean_logprob < 0
    finally:
        base.detach("home")


def test_mean_logprob_of_a_chosen_label(served: Served) -> None:
    base = served.world.base()[0]
    base.attach("topics", served.world.store.open(ArtifactRef("adapter", served.made["topics"].digest)))
    answer = served.chat(model="topics").json()
    tokens = [base.chat.target_ids(label) for label in LABELS]
    with base.active("topics"):
        (scores,) = label_log_probs(base, [base.chat.prompt_ids(QUESTION)], tokens)
    base.detach("topics")
    best = int(scores.argmax())
    record = served.record(answer["id"])
    assert record.answer == LABELS[best]
    assert record.mean_logprob == pytest.approx(float(scores[best]) / len(tokens[best]), abs=1e-3)


def test_streams_are_stored_whole_and_feedback_may_follow_at_once(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.world.key, max_retries=0)
    for _ in range(10):
        chunks = list(client.chat.completions.create(model="home", messages=QUESTION, stream=True))
        said = served.say(id=chunks[0].id, rating="up")
        assert said.status_code == 200, said.text
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    record = served.record(chunks[0].id)
    assert (record.answer, record.status) == (text, 200)
    assert record.mean_logprob is not None


def test_failed_and_cancelled_requests_are_stored_with_their_status(served: Served) -> None:
    served.record(served.chat().json()["id"])
    head = served.log.heads()["home"]
    before, known = head.last_seq, head.requests + 2
    assert served.chat(timeout=1e-6).status_code == 504
    with served.http.stream(
        "POST", "/v1/chat/completions", json={"model": "home", "messages": QUESTION, "stream": True}
    ) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 20
    statuses: set[int] = set()
    while not {504, 499} <= statuses and time.monotonic() < deadline:
        served.writer.flush()
        statuses = {record.status for record in served.log.requests("home", before)}
        if 499 not in statuses:  # the answer may have been faster than the client
            known += 1
            with served.http.stream(
                "POST", "/v1/chat/completions", json={"model": "home", "messages": QUESTION, "stream": True}
            ):
                pass
    assert {504, 499} <= statuses
    # what no model took on is no traffic; the last one that was cancelled may still be on its way
    while served.log.heads()["home"].requests < known and time.monotonic() < deadline:
        served.writer.flush()
    assert served.chat(messages=[]).status_code == 400
    assert served.chat(model="nothing").status_code == 404
    assert served.chat(messages=[{"role": "user", "content": "word " * 3000}]).status_code == 413
    assert served.writer.flush()
    assert served.log.heads()["home"].requests == known


def test_only_the_key_that_asked_may_say_something(served: Served) -> None:
    other = served.with_key(keys.create(served.world.ledger, ["*"])[0])
    answer = served.chat().json()
    refused = served.say(other, id=answer["id"], rating="down")
    unknown = served.say(other, id="chatcmpl-nothing", rating="down")
    assert refused.status_code == unknown.status_code == 404
    hide = refused.json()["error"]["message"].replace(answer["id"], "ID")
    assert hide == unknown.json()["error"]["message"].replace("chatcmpl-nothing", "ID")
    assert refused.json()["error"]["code"] == "request_not_found"
    assert served.say(id=answer["id"], rating="down").status_code == 200
    assert httpx.post(f"{served.url}/v1/feedback", json={"id": answer["id"]}).status_code == 401


def test_the_last_feedback_wins_and_is_redacted(served: Served) -> None:
    answer = served.chat().json()
    first = served.say(id=answer["id"], rating="down")
    assert first.json() == {
        "object": "feedback",
        "id": answer["id"],
        "rating": "down",
        "at": first.json()["at"],
    }
    assert served.say(id=answer["id"], rating="down").json() == first.json(), "idempotent"
    assert served.say(id=answer["id"], rating="up", right_answer="mail a@b.com").status_code == 200
    found = [j for j in served.log.feedback("home") if j.request.id == answer["id"]]
    assert [(j.feedback.rating, j.feedback.right_answer) for j in found] == [(1, "mail [EMAIL]")]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "id"),
        ({"id": "x"}, None),
        ({"id": "x", "rating": "meh"}, "rating"),
        ({"id": "x", "rating": 1}, "rating"),
        ({"id": "x", "right_answer": ""}, "right_answer"),
        ({"id": "x", "right_answer": "a" * 32_769}, "right_answer"),
        ({"id": "x" * 65, "rating": "up"}, "id"),
        ({"id": "x\0", "rating": "up"}, "id"),
        ({"id": "x y", "rating": "up"}, "id"),
        ({"id": "x\n", "rating": "up"}, "id"),
        ({"id": "x", "rating": "up", "comment": "no"}, "comment"),
    ],
)
def test_wrong_feedback_is_an_error_like_openais(served: Served, body: dict[str, Any], param: str) -> None:
    response = served.say(**body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param


@pytest.mark.parametrize(
    "metadata",
    [{str(n): "x" for n in range(17)}, {"k" * 65: "x"}, {"k": "v" * 513}, {"k": 1}, ["k"]],
)
def test_wrong_metadata_is_refused(served: Served, metadata: Any) -> None:
    response = served.chat(metadata=metadata)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("metadata")


def test_of_a_key_without_log_only_the_number_is_stored(served: Served) -> None:
    key, info = keys.create(served.world.ledger, ["*"], unlogged=True)
    assert info.unlogged
    http = served.with_key(key)
    before = served.log.heads()["home"]
    secret = "nobody may read this sentence"
    answer = served.chat(http, messages=[{"role": "user", "content": secret}]).json()
    assert served.say(http, id=answer["id"], rating="up").status_code == 404
    deadline = time.monotonic() + 20
    while served.log.heads()["home"].unlogged == before.unlogged and time.monotonic() < deadline:
        time.sleep(0.02)
    after = served.log.heads()["home"]
    assert (after.unlogged, after.requests) == (before.unlogged + 1, before.requests)
    with served.log.engine.connect() as connection:
        everything = json.dumps(
            [list(map(str, row)) for row in connection.execute(sa.text("SELECT * FROM requests"))]
        )
    assert secret not in everything and key.split("_")[1] not in everything


def test_probes_with_an_admin_key_are_no_traffic(served: Served) -> None:
    before = served.log.heads()["home"]
    answer = served.chat(served.with_key(served.world.admin_key)).json()
    assert answer["choices"]
    assert served.writer.flush()
    assert served.log.heads()["home"] == before and served.log.request(answer["id"]) is None


def test_metrics(served: Served) -> None:
    served.chat()
    assert served.writer.flush()
    text = httpx.get(f"{served.url}/metrics").text
    assert 'evergreen_traffic_records_total{customization="home",outcome="stored"}' in text


def test_without_a_traffic_database_it_answers_and_takes_no_feedback(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.record(world.adapter("home", 1))
    with gateway_in_thread(world) as (url, _):
        http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {world.key}"}, timeout=60)
        body = {"model": "home", "messages": QUESTION}
        answer = http.post("/v1/chat/completions", json=body).json()
        response = http.post("/v1/feedback", json={"id": answer["id"], "rating": "up"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "no_traffic_log")


def test_with_its_database_away_it_answers_and_refuses_feedback(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.record(world.adapter("home", 1))
    (tmp_path / "traffic.db").mkdir()
    with gateway_in_thread(world, traffic=TrafficWriter(f"sqlite:///{tmp_path}/traffic.db")) as (url, _):
        http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {world.key}"}, timeout=60)
        body = {"model": "home", "messages": QUESTION}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        response = http.post("/v1/feedback", json={"id": answer.json()["id"], "rating": "up"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "feedback_not_available")
        assert response.headers["Retry-After"]
        (tmp_path / "traffic.db").rmdir()
        deadline = time.monotonic() + 20
        while response.status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.2)
            response = http.post("/v1/feedback", json={"id": answer.json()["id"], "rating": "up"})
        assert response.status_code == 200


def test_older_ledgers_get_the_new_columns(tmp_path: Path) -> None:
    world = World(tmp_path)
    made = world.adapter("home", 1)
    world.record(made)
    with world.ledger.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE releases DROP COLUMN traffic_policy"))
        connection.execute(sa.text("ALTER TABLE api_keys DROP COLUMN unlogged"))
    again = Ledger(world.ledger_url)
    current = again.current("home")
    assert current is not None and current.traffic_policy is None
    assert not any(info.unlogged for info in keys.list_keys(again))
    policy = {"redact": ["email"], "retention": "7d"}
    world.record(made, traffic_policy=policy, action="withdraw")
    assert again.current("home") is None
    assert again.newest_all()["home"].traffic_policy == policy


def test_requests_under_way_together_are_all_stored(served: Served) -> None:
    ids: list[str] = []

    def ask() -> None:
        ids.extend(served.chat().json()["id"] for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(ids) == 30
    assert {served.record(one).status for one in ids} == {200}
