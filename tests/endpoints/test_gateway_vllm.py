"""The gateway in front of vLLM servers that answer, fail, restart and mix things up."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from gateway_world import QUESTION, Made, World, gateway_in_thread, said_in
from vllm_servers import SmallVllm, name_of, small_vllm, wait_for

from ml_assets.endpoints.gateway import app as gateway_app
from ml_assets.endpoints.gateway import vllm
from ml_assets.endpoints.gateway.client import GatewayClient, GatewayError
from ml_assets.endpoints.gateway.vllm import VllmEngine
from ml_assets.endpoints.release import serve_again, verify_served
from ml_assets.traffic.store import TrafficLog
from ml_assets.traffic.writer import TrafficWriter

MAX_NEW = 12


class Fleet:
    """A gateway in front of small vLLM servers."""

    def __init__(self, world: World, url: str, app: FastAPI, servers: list[SmallVllm]):
        self.world, self.url, self.app, self.servers = world, url, app, servers
        self.admin = GatewayClient(url, world.admin_key)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key=world.key, max_retries=0)
        headers = {"Authorization": f"Bearer {world.key}"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=60)

    def chat(self, **body: Any) -> httpx.Response:
        body = {"model": "home", "messages": QUESTION} | body
        return self.http.post("/v1/chat/completions", json=body)

    def serve(self, made: Made, **values: Any) -> None:
        self.admin.stage(made.release(**values))
        self.world.record(made, **values)
        self.admin.activate(made.customization, made.digest)

    def ready(self, made: Made) -> int:
        """Replicas that answer with an adapter."""
        return sum(name_of(made) in r.ready for r in self.app.state.engine.vllm.replicas)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def adapters(world: World) -> list[Made]:
    return [world.adapter("home", 1), world.adapter("home", 2), world.adapter("news", 3)]


def fleet_of(world: World, servers: list[SmallVllm], **options: Any) -> Any:
    engine = VllmEngine([s.url for s in servers], "secret", watch_seconds=0.1)
    return gateway_in_thread(world, engine_name="vllm", vllm=engine, **options)


@pytest.fixture
def one(world: World, adapters: list[Made]) -> Iterator[Fleet]:
    with small_vllm(world, adapters[0]) as server, fleet_of(world, [server], max_queue=2) as (url, app):
        yield Fleet(world, url, app, [server])
    withdraw(world)


@pytest.fixture
def two(world: World, adapters: list[Made]) -> Iterator[Fleet]:
    with (
        small_vllm(world, adapters[0]) as first,
        small_vllm(world, adapters[0]) as second,
        fleet_of(world, [first, second]) as (url, app),
    ):
        yield Fleet(world, url, app, [first, second])
    withdraw(world)


def withdraw(world: World) -> None:
    for release in world.ledger.current_all().values():
        with world.ledger.release_transaction(release.customization, "end of test") as tx:
            row = {**release.__dict__, "action": "withdraw", "run_id": "end of test"}
            tx.record(type(release)(**row))


# -- answers -------------------------------------------------------------------------------------------


def test_it_answers_as_the_engine_of_the_process_does(one: Fleet, adapters: list[Made]) -> None:
    home, _, news = adapters
    one.serve(home)
    one.serve(news)
    server = one.servers[0]
    assert set(server.adapters) == {name_of(home), name_of(news)}
    for made in (home, news):
        raw = one.openai.chat.completions.with_raw_response.create(
            model=made.customization, messages=QUESTION, max_tokens=MAX_NEW
        )
        answer = raw.parse()
        assert answer.choices[0].message.content in made.answers
        assert answer.choices[0].finish_reason == "length"
        assert answer.system_fingerprint == made.digest == raw.headers["x-evergreen-adapter"]
        assert raw.headers["x-evergreen-base"] == made.base_revision
        assert answer.usage and answer.usage.completion_tokens == MAX_NEW
        stream = one.openai.chat.completions.create(
            model=made.customization, messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text in made.answers and len(chunks) > 4
        assert chunks[-1].usage and chunks[-1].usage.completion_tokens == MAX_NEW
    content = one.chat().json()["choices"][0]["message"]["content"]
    stop = content[4:6]
    stopped = one.chat(stop=stop).json()["choices"][0]
    assert stopped == stopped | {"finish_reason": "stop"}
    assert stopped["message"]["content"] == content[: content.index(stop)].strip()
    health = httpx.get(f"{one.url}/healthz").json()
    assert health["status"] == "ready" and health["served"]["home"]["engine"] == "vllm"
    assert 'evergreen_vllm_replicas{customization="home"} 1.0' in httpx.get(f"{one.url}/metrics").text


def test_an_answer_may_hold_what_ends_a_line_elsewhere(one: Fleet, adapters: list[Made]) -> None:
    one.serve(adapters[0])
    one.servers[0].says = said = "a\u2028b\x85c"
    assert one.chat().json()["choices"][0]["message"]["content"] == said
    body = {"model": "home", "messages": QUESTION, "stream": True}
    with one.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert said_in(response.iter_lines()) == said


def test_the_tokenizer_of_a_base_that_nobody_uses_is_dropped(one: Fleet, adapters: list[Made]) -> None:
    home, _, news = adapters
    engine = one.app.state.engine.vllm
    texts = engine._texts
    for made in (home, news):
        one.serve(made)
    for made in (home, news):
        assert list(texts) == [made.base_digest]
        one.world.record(made, action="withdraw")
        one.admin.activate(made.customization, None)
        name = name_of(made)
        wait_for(lambda name=name: name not in engine._adapters, "it to be forgotten")
    wait_for(lambda: not texts, "the tokenizer to be dropped")


def test_an_answer_ends_where_the_model_ends_its_turn(one: Fleet, adapters: list[Made]) -> None:
    one.serve(adapters[0])
    text = one.app.state.engine.served["home"].text
    prompt = text.encode(QUESTION)
    tokens = list(_tokens(one, prompt, adapters[0]))
    # from now on the third token of the answer ends a turn
    text.chat.stop_ids = frozenset({tokens[2]})
    one.servers[0].base.chat.stop_ids = text.chat.stop_ids
    body = one.chat().json()
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == tokens.index(tokens[2])


def test_traffic_tells_the_log_probability_of_an_answer(world: World, adapters: list[Made]) -> None:
    writer = TrafficWriter(f"sqlite:///{world.home}/traffic.db")
    with small_vllm(world, adapters[0]) as server, fleet_of(world, [server], traffic=writer) as (url, app):
        fleet = Fleet(world, url, app, [server])
        fleet.serve(adapters[0])

        def mean_logprob() -> float | None:
            answer = fleet.chat().json()
            assert writer.flush()
            record = TrafficLog(writer.url).request(answer["id"])
            assert record is not None and record.answer == answer["choices"][0]["message"]["content"]
            return record.mean_logprob

        assert mean_logprob() == pytest.approx(-0.5)
        text = app.state.engine.served["home"].text
        tokens = list(_tokens(fleet, text.encode(QUESTION), adapters[0]))
        text.chat.stop_ids = server.base.chat.stop_ids = frozenset({tokens[2]})
        before = tokens.index(tokens[2])
        assert mean_logprob() == pytest.approx((-0.5 * before - 0.25) / (before + 1)), "its end included"
        server.tells_logprobs = False
        assert mean_logprob() is None
    withdraw(world)


def _tokens(fleet: Fleet, prompt: list[int], made: Made) -> list[int]:
    from ml_assets.engine.generation import generate

    server = fleet.servers[0]
    with server._lock, server.base.active(server.adapters[name_of(made)]):
        return generate(server.base, [prompt], MAX_NEW)[0].token_ids


def test_both_engines_side_by_side(one: Fleet, adapters: list[Made]) -> None:
    home, _, news = adapters
    one.serve(home)
    one.serve(news, engine="in_process")
    assert one.chat().json()["system_fingerprint"] == home.digest
    assert one.chat(model="news").json()["choices"][0]["message"]["content"] in news.answers
    assert one.servers[0].asked("load") == [name_of(home)]
    served = httpx.get(f"{one.url}/healthz").json()["served"]
    assert {name: version["engine"] for name, version in served.items()} == {
        "home": "vllm",
        "news": "in_process",
    }


def test_requests_go_to_the_replica_with_the_fewest(two: Fleet, adapters: list[Made]) -> None:
    two.serve(adapters[0])
    for server in two.servers:
        server.token_seconds = 0.05
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: two.chat(), range(4)))
    assert {answer.status_code for answer in answers} == {200}
    assert [len(server.asked("answer")) for server in two.servers] == [2, 2]


def test_servers_of_two_revisions_side_by_side(world: World, adapters: list[Made]) -> None:
    newer = world.adapter("migrated", 1, base_seed=5)
    with (
        small_vllm(world, adapters[0]) as old,
        small_vllm(world, newer) as new,
        fleet_of(world, [old, new]) as (url, app),
    ):
        fleet = Fleet(world, url, app, [old, new])
        fleet.serve(adapters[0])
        fleet.serve(newer)
        for made, server in ((adapters[0], old), (newer, new)):
            answer = fleet.chat(model=made.customization)
            assert answer.headers["x-evergreen-base"] == made.base_revision
            assert answer.json()["choices"][0]["message"]["content"] in made.answers
            assert set(server.adapters) == {name_of(made)}
    withdraw(world)


def test_a_client_that_leaves_is_not_worked_for(one: Fleet, adapters: list[Made]) -> None:
    one.serve(adapters[0])
    one.servers[0].token_seconds = 0.2
    body = {"model": "home", "messages": QUESTION, "stream": True}
    with one.http.stream("POST", "/v1/chat/completions", json=body) as response:
        wait_for(lambda: one.servers[0].open == 1, "the answer to begin")
        assert response.status_code == 200
    wait_for(lambda: one.servers[0].open == 0, "the server to stop", seconds=1.5)


def test_an_answer_ends_at_its_deadline(one: Fleet, adapters: list[Made]) -> None:
    one.serve(adapters[0])
    one.servers[0].token_seconds = 4.0
    late = one.http.post("/v1/chat/completions", json={"model": "home", "messages": QUESTION, "timeout": 0.3})
    assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
    wait_for(lambda: one.servers[0].open == 0, "the server to stop", seconds=6.0)


def test_too_many_wait(one: Fleet, adapters: list[Made]) -> None:
    one.serve(adapters[0])
    one.servers[0].token_seconds = 1.0
    body = {"model": "home", "messages": QUESTION, "stream": True}
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(one.chat, max_tokens=1) for _ in range(2)]
        wait_for(lambda: one.servers[0].open == 2, "two requests to wait")
        refused = one.http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "2"
        assert 'evergreen_queue_length{customization="home"} 2.0' in httpx.get(f"{one.url}/metrics").text
        assert [future.result().status_code for future in waiting] == [200, 200]


# -- releases ------------------------------------------------------------------------------------------


def test_a_replaced_adapter_is_unloaded_after_its_last_request(one: Fleet, adapters: list[Made]) -> None:
    old, new, _ = adapters
    server = one.servers[0]
    one.serve(old)
    server.token_seconds = 0.1
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(one.chat)
        wait_for(lambda: server.open == 1, "the answer to begin")
        one.serve(new)
        assert name_of(old) in server.adapters and not server.asked("unload")
        assert one.chat(max_tokens=1).json()["system_fingerprint"] == new.digest
        body = answer.result().json()
    assert body["system_fingerprint"] == old.digest
    assert body["choices"][0]["message"]["content"] in old.answers
    wait_for(lambda: set(server.adapters) == {name_of(new)}, "the old adapter to be unloaded")
    one.serve(old)  # and back
    assert one.chat().json()["system_fingerprint"] == old.digest


def test_staging_what_serves_does_not_unload_it(one: Fleet, adapters: list[Made]) -> None:
    made = adapters[0]
    one.serve(made)
    one.serve(made)
    one.admin.stage(made.release())
    one.admin.discard("home")
    wait_for(lambda: len(one.app.state.engine._alive) == 1, "the other versions to go")
    assert one.chat().status_code == 200 and not one.servers[0].asked("unload")


def test_an_adapter_that_is_not_itself_is_refused(two: Fleet, adapters: list[Made]) -> None:
    old, new, _ = adapters
    two.serve(old)
    paths = [str(two.world.home / "artifacts" / "adapter" / made.digest) for made in (new, old)]
    two.servers[1].swap = {paths[0]: paths[1]}  # one replica of two gives the old one for the new one
    with pytest.raises(GatewayError, match="does not answer with its fingerprint"):
        two.admin.stage(new.release())
    for server in two.servers:
        wait_for(lambda server=server: set(server.adapters) == {name_of(old)}, "the wrong one to go")
    assert two.chat().json()["system_fingerprint"] == old.digest
    two.servers[1].swap = {}
    two.serve(new)
    assert two.ready(new) == 2


def test_a_replica_that_mixes_adapters_up_gets_no_requests(two: Fleet, adapters: list[Made]) -> None:
    made, other, _ = adapters
    two.serve(made)
    server = two.servers[0]
    server.stop()
    paths = [str(two.world.home / "artifacts" / "adapter" / m.digest) for m in (made, other)]
    server.swap = {paths[0]: paths[1]}
    server.base.detach(paths[0])
    wait_for(lambda: two.ready(made) == 1, "the loss to be noticed")
    server.log.clear()
    server.start()
    wait_for(lambda: server.asked("unload"), "the wrong adapter to be found")
    assert {two.chat(max_tokens=1).status_code for _ in range(4)} == {200}
    assert not server.asked("answer") and two.ready(made) == 1


def test_an_activated_lora_is_refused(one: Fleet, adapters: list[Made]) -> None:
    source = one.world.home / "artifacts" / "adapter" / adapters[0].digest
    files = {p.name: p.read_bytes() for p in source.iterdir() if p.name != "files.json"}
    config = json.loads(files["adapter_config.json"]) | {"alora_invocation_tokens": [1, 2]}
    files["adapter_config.json"] = json.dumps(config).encode()
    digest = one.world.store.publish("adapter", files).digest
    with pytest.raises(GatewayError, match="activated LoRA, vLLM serves exact LoRA only"):
        one.admin.stage(adapters[0].release(adapter_digest=digest))
    assert not one.servers[0].asked("load")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("rank", "LoRA rank 64 is greater than max_lora_rank 16"),
        ("route", "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ("path", "mounted at the same path"),
    ],
)
def test_a_server_that_cannot_load_says_why(one: Fleet, adapters: list[Made], fault: str, says: str) -> None:
    server = one.servers[0]
    server.refuse = says if fault == "rank" else None
    server.runtime_loras, server.mounted = fault != "route", fault != "path"
    with pytest.raises(GatewayError, match=says) as error:
        one.admin.stage(adapters[0].release())
    assert error.value.code == "vllm_refused"
    assert one.chat().status_code == 404


# -- servers that come and go --------------------------------------------------------------------------


def test_what_a_restart_lost_is_loaded_and_verified_again(one: Fleet, adapters: list[Made]) -> None:
    home, _, news = adapters
    one.serve(home)
    one.serve(news)
    server = one.servers[0]
    server.stop()
    wait_for(lambda: one.ready(home) == 0, "the loss to be noticed")
    lost = one.chat()
    assert lost.status_code == 503 and lost.headers["retry-after"] == "5"
    assert lost.json()["error"]["code"] == "model_not_available"
    assert "server 1 is not reachable" in lost.text and server.url not in lost.text
    health = httpx.get(f"{one.url}/healthz").json()
    assert health["status"] == "degraded" and "home" in health["unserved"] and not health["served"]
    with pytest.raises(GatewayError, match="not available"):
        verify_served(home.release(), _fingerprint(one.world, home), one.admin)
    server.log.clear()
    server.start()
    wait_for(lambda: one.ready(home) == one.ready(news) == 1, "both to be back")
    kinds = [kind for kind, name in server.log if name == name_of(home)]
    assert kinds[0] == "load" and set(kinds[1:]) == {"probe"}
    assert one.chat().json()["system_fingerprint"] == home.digest
    verify_served(home.release(), _fingerprint(one.world, home), one.admin)
    assert serve_again(home.release(), store=one.world.store, gateway=one.admin) is False


def _fingerprint(world: World, made: Made) -> dict[str, Any]:
    path = world.home / "artifacts" / "adapter" / made.digest / "manifest.json"
    return json.loads(path.read_text())["fingerprint"]


def test_a_lost_adapter_is_noticed_by_the_request(two: Fleet, adapters: list[Made]) -> None:
    """Also between two looks at the replicas."""
    made = adapters[0]
    two.serve(made)
    two.app.state.engine.vllm._watch_seconds = 60.0
    time.sleep(0.3)  # the last look before the long pause
    first, second = two.servers
    forget(first, made)
    for _ in range(2):  # one of the two goes to the first, and on to the second
        assert two.chat(max_tokens=1).status_code == 200
    wait_for(lambda: two.ready(made) == 2, "the first to have it again")
    assert first.asked("load") == [name_of(made)] * 2 and second.asked("load") == [name_of(made)]
    forget(first, made)
    forget(second, made)
    lost = two.chat(max_tokens=1)
    assert lost.status_code == 503 and f"{name_of(made)} is being loaded" in lost.text
    wait_for(lambda: two.ready(made) == 2, "both to have it again")
    assert two.chat().json()["system_fingerprint"] == made.digest


def forget(server: SmallVllm, made: Made) -> None:
    with server._lock:
        server.base.detach(server.adapters.pop(name_of(made)))


def test_before_its_first_token_a_request_moves_to_another_replica(two: Fleet, adapters: list[Made]) -> None:
    two.serve(adapters[0])
    first, second = two.servers
    first.break_after, second.break_after = 0, 0
    assert two.chat().status_code == 503
    second.break_after = None
    first.status = 500
    for _ in range(4):
        assert two.chat().json()["choices"][0]["message"]["content"] in adapters[0].answers
    assert first.asked("answer")


def test_after_its_first_token_a_request_fails(two: Fleet, adapters: list[Made]) -> None:
    two.serve(adapters[0])
    for server in two.servers:
        server.break_after = 3
    lost = two.chat()
    assert lost.status_code == 502 and lost.json()["error"]["code"] == "replica_lost"
    with pytest.raises(openai.APIError, match="lost while it answered"):
        list(two.openai.chat.completions.create(model="home", messages=QUESTION, stream=True))


def test_a_replica_that_hangs_is_left(two: Fleet, adapters: list[Made], monkeypatch: Any) -> None:
    """Its requests go to the other one when it is found dead, although their connections are open."""
    monkeypatch.setattr(vllm, "HEALTH_SECONDS", 1.0)
    two.serve(adapters[0])
    first, second = two.servers
    for server in two.servers:
        server.token_seconds = 1.0
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(two.chat)
        wait_for(lambda: first.open + second.open == 1, "the answer to begin")
        hung, other = (first, second) if first.open else (second, first)
        hung.hangs, other.token_seconds = True, 0.0
        assert answer.result().json()["choices"][0]["message"]["content"] in adapters[0].answers
    assert two.ready(adapters[0]) == 1
    hung.hangs = False
    wait_for(lambda: two.ready(adapters[0]) == 2, "it to be back")
    assert len(hung.asked("load")) == 1, "it had lost nothing, but was verified again"
    assert len(hung.asked("probe")) == 2 * len(other.asked("probe"))
    assert hung.asked("probe").count(name_of(adapters[0])) == len(other.asked("probe"))


def test_a_gateway_that_starts_before_its_servers(
    world: World, adapters: list[Made], monkeypatch: Any
) -> None:
    monkeypatch.setattr(gateway_app, "RESTORE_SECONDS", 0.1)
    made = adapters[0]
    world.record(made)
    server = SmallVllm(world, made, api_key="secret")
    try:
        with fleet_of(world, [server]) as (url, app):
            fleet = Fleet(world, url, app, [server])
            health = httpx.get(f"{url}/healthz").json()
            assert health["status"] == "degraded" and "no vLLM server answers" in health["unserved"]["home"]
            assert fleet.chat().status_code == 503
            for change in ("releases RENAME TO away", "away RENAME TO releases"):
                with world.ledger.engine.begin() as connection:
                    connection.exec_driver_sql(f"ALTER TABLE {change}")
                time.sleep(0.3)  # it looks for servers also after the ledger could not be read
            server.start()
            wait_for(lambda: fleet.chat().status_code == 200, "the server to be found")
            assert httpx.get(f"{url}/healthz").json()["status"] == "ready"
        # the next gateway finds the adapter loaded, and verifies it before it serves
        assert set(server.adapters) == {name_of(made)}
        server.log.clear()
        with fleet_of(world, [server]) as (url, app):
            assert Fleet(world, url, app, [server]).chat().json()["system_fingerprint"] == made.digest
            assert not server.asked("load") and server.log[0] == ("probe", name_of(made))
    finally:
        server.stop()
        withdraw(world)


def test_a_server_of_another_base_is_not_asked(world: World, adapters: list[Made]) -> None:
    with (
        small_vllm(world, adapters[0], served_name="tiny-llama@ffffffffffff") as server,
        fleet_of(world, [server]) as (url, app),
    ):
        fleet = Fleet(world, url, app, [server])
        with pytest.raises(GatewayError, match="server 1 serves tiny-llama@ffffffffffff") as error:
            fleet.admin.stage(adapters[0].release())
        assert error.value.code == "no_replica"
        assert not server.asked("load")


def test_a_server_with_the_wrong_weights_is_found_out(world: World, adapters: list[Made]) -> None:
    """Its name is right, its base is not: the probes without an adapter tell."""
    other = world.adapter("home", 1, base_seed=5)
    with small_vllm(world, other, served_name=adapters[0].base_revision) as server:
        server.base.manifest = {**server.base.manifest, **_pins(world, adapters[0])}
        with (
            fleet_of(world, [server]) as (url, app),
            pytest.raises(GatewayError, match="does not answer with its fingerprint"),
        ):
            Fleet(world, url, app, [server]).admin.stage(adapters[0].release())


def _pins(world: World, made: Made) -> dict[str, str]:
    path = world.home / "artifacts" / "base_model" / made.base_digest / "manifest.json"
    return {"identity": json.loads(path.read_text())["identity"]}


def test_a_wrong_key_is_told(world: World, adapters: list[Made]) -> None:
    with (
        small_vllm(world, adapters[0], api_key="another") as server,
        fleet_of(world, [server]) as (url, app),
        pytest.raises(GatewayError, match="401"),
    ):
        Fleet(world, url, app, [server]).admin.stage(adapters[0].release())


def test_without_servers_vllm_is_refused(world: World, adapters: list[Made]) -> None:
    with gateway_in_thread(world) as (url, app):
        with pytest.raises(GatewayError, match="EVERGREEN_VLLM_URLS") as error:
            Fleet(world, url, app, []).admin.stage(adapters[0].release(engine="vllm"))
        assert error.value.code == "no_vllm"


def test_a_gateway_stops_while_a_server_hangs(world: World, adapters: list[Made]) -> None:
    with small_vllm(world, adapters[0], api_key="secret") as server:
        with fleet_of(world, [server]) as (url, app):
            fleet = Fleet(world, url, app, [server])
            fleet.serve(adapters[0])
            server.token_seconds = 20.0
            pool = ThreadPoolExecutor(1)
            answer = pool.submit(fleet.chat)
            wait_for(lambda: server.open == 1, "the answer to begin")
        assert answer.result().status_code >= 499
        pool.shutdown()
    withdraw(world)
