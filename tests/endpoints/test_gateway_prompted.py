"""Adapters without weights at the gateway: examples before the question, beside adapters with weights."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from gateway_world import QUESTION, Made, World, gateway_in_thread
from vllm_servers import SmallVllm

from ml_assets.artifacts import ArtifactRef
from ml_assets.endpoints.gateway.client import GatewayClient, GatewayError
from ml_assets.endpoints.gateway.vllm import VllmEngine
from ml_assets.endpoints.release import read_fingerprint, verify_served

EXAMPLES = [("turn on the lamp", '{"intent": "HassTurnOn"}'), ("is the door open?", "no"), ("hello", "hi")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("prompted"))


@pytest.fixture(scope="module")
def made(world: World) -> dict[str, Made]:
    found = {
        "shown": world.prompted("shown", EXAMPLES, system="Answer in one word."),
        "bare": world.prompted("bare", []),
        "home": world.adapter("home", 1),
    }
    for one in found.values():
        world.record(one)
    return found


@pytest.fixture(scope="module", params=["in_process", "vllm"])
def gateway(request: Any, world: World, made: dict[str, Made]) -> Iterator[tuple[str, Any]]:
    if request.param == "in_process":
        with gateway_in_thread(world) as (url, app):
            yield url, app
        return
    server = SmallVllm(world, made["home"])
    server.start()
    try:
        with gateway_in_thread(world, engine_name="vllm", vllm=VllmEngine([server.url])) as (url, app):
            yield url, app
    finally:
        server.stop()


def client(world: World, url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=world.key, max_retries=0)


def test_answers_are_those_of_the_base_with_examples(
    world: World, made: dict[str, Made], gateway: tuple[str, Any]
) -> None:
    asked = client(world, gateway[0])
    assert made["home"].answer != made["bare"].answer, "they can be told apart"

    def ask(name: str) -> tuple[str, str | None, int]:
        answer = asked.chat.completions.create(model=name, messages=QUESTION)  # type: ignore[arg-type]
        assert answer.usage
        return name, answer.choices[0].message.content, answer.usage.prompt_tokens

    with ThreadPoolExecutor(12) as pool:  # all in one batch
        answers = list(pool.map(ask, ["shown", "bare", "home"] * 8))
    assert all(text in made[name].answers for name, text, _ in answers)
    tokens = {name: count for name, _, count in answers}
    assert tokens["bare"] == tokens["home"] < tokens["shown"], "the examples are counted: they cost"

    stream = asked.chat.completions.create(model="shown", messages=QUESTION, stream=True)  # type: ignore[call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text in made["shown"].answers


def test_a_long_question_takes_the_room_of_examples(
    world: World, made: dict[str, Made], gateway: tuple[str, Any]
) -> None:
    base = world.base()[0]
    asked = client(world, gateway[0])

    def usage(text: str) -> tuple[int, int]:
        question = [{"role": "user", "content": text}]
        answer = asked.chat.completions.create(model="shown", messages=question, max_tokens=4)  # type: ignore[arg-type]
        assert answer.usage
        own = base.chat.prompt_ids([{"role": "system", "content": "Answer in one word."}, *question])
        return answer.usage.prompt_tokens, len(own)

    word = "light "
    per_word = usage(word * 20)[1] - usage(word * 19)[1]
    longest = (base.context_length - 40) // per_word
    counted = [usage(word * n) for n in (10, longest - 30, longest - 5)]
    shown = [with_examples - own for with_examples, own in counted]
    assert shown[0] > shown[1] > 0 or shown[0] > shown[1] == 0, "the least helpful go first"
    assert shown[2] == 0, "then all of them; the question is answered"
    with pytest.raises(openai.APIStatusError, match="takes at most"):
        usage(word * (longest * 2))


def test_released_with_its_fingerprint(world: World, made: dict[str, Made], gateway: tuple[str, Any]) -> None:
    with GatewayClient(gateway[0], world.admin_key) as admin:
        for name in ("shown", "bare"):
            release = made[name].release()
            probed = admin.stage(release)
            assert (probed.with_adapter == probed.without) == (name == "bare")
            admin.activate(name, made[name].digest)
            fingerprint = read_fingerprint(world.store, made[name].digest)
            assert verify_served(release, fingerprint, admin).adapter_digest == made[name].digest
    assert not gateway[1].state.engine.unserved


def test_another_fingerprint_is_refused(
    world: World, made: dict[str, Made], gateway: tuple[str, Any]
) -> None:
    directory = world.store.open(ArtifactRef("adapter", made["shown"].digest))
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["fingerprint"]["probes"][0]["with"] += 1
    other = world.store.publish("adapter", {"manifest.json": json.dumps(manifest).encode()})
    with (
        GatewayClient(gateway[0], world.admin_key) as admin,
        pytest.raises(GatewayError, match="fingerprint"),
    ):
        admin.stage(made["shown"].release(adapter_digest=other.digest))
