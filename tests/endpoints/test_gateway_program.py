"""The gateway as a program: killed and started again, and what it writes where."""

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from gateway_world import QUESTION, ROOT, Server, World, running_server

from ml_assets.endpoints.gateway.keys import ADMIN_KEY_FILE


def test_it_loads_without_torch() -> None:
    heavy = ("torch", "transformers", "peft", "mlflow", "datasets", "dagster")
    code = (
        "import sys, ml_assets.endpoints.gateway.app, ml_assets.endpoints.release\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


@pytest.mark.slow
def test_killed_and_started_again_it_serves_what_was_served(tmp_path: Path) -> None:
    world = World(tmp_path)
    home, newer, news = world.adapter("home", 1), world.adapter("home", 2), world.adapter("news", 3)
    world.record(home)
    world.record(news)
    with running_server(world) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=world.key, max_retries=0)
        assert (
            client.chat.completions.create(model="home", messages=QUESTION).system_fingerprint == home.digest
        )
        server.kill()
        world.record(newer)  # as a release does that is killed before the gateway follows
        server.start()
        assert [model.id for model in client.models.list()] == ["home", "news"]
        for made in (newer, news):
            answer = client.chat.completions.create(model=made.customization, messages=QUESTION)
            assert answer.system_fingerprint == made.digest
            assert answer.choices[0].message.content in made.answers

        assert Server(world, server.port).launch().wait(60) != 0
        assert "address already in use" in server.log.read_text()
        secret = "please keep this sentence to yourself"
        body = {"model": "home", "messages": [{"role": "user", "content": secret}]}
        headers = {"Authorization": f"Bearer {world.key}"}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers).status_code == 200
        server.stop()
    log = server.log.read_text()
    assert "POST /v1/chat/completions" in log and "/healthz" not in log
    for text in (world.key, world.admin_key, secret):
        assert text not in log
    assert not re.search(r"evg_[0-9a-f]{8}_", log)
    assert (tmp_path / ADMIN_KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert os.stat(tmp_path / ADMIN_KEY_FILE).st_size > 40
