"""The gateway as a program, killed under load: which of its traffic is lost, and which is not."""

import sqlite3
import threading
import time
from pathlib import Path

import httpx
import pytest
from gateway_world import QUESTION, World, running_server

from ml_assets.traffic.store import TrafficLog

LOST_SECONDS = 1.0
"""docs/traffic.md: of what was answered longer ago than this before a SIGKILL, nothing is lost."""


@pytest.mark.slow
def test_killed_under_load_it_loses_the_last_moment_and_no_feedback(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.record(world.adapter("home", 1))
    answered: dict[str, float] = {}
    said: dict[str, str] = {}
    killed_at: list[float] = []

    def ask(url: str, ended: threading.Event, worker: int) -> None:
        http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {world.key}"}, timeout=30)
        number = 0
        while not ended.is_set():
            number += 1
            try:
                body = {"model": "home", "messages": QUESTION, "max_tokens": 1}
                answer = http.post("/v1/chat/completions", json=body)
                if answer.status_code != 200:
                    continue
                response_id = answer.json()["id"]
                answered[response_id] = time.monotonic()
                if number % 2:
                    right = f"answer {worker} {number}"
                    feedback = {"id": response_id, "right_answer": right}
                    if http.post("/v1/feedback", json=feedback).status_code == 200:
                        said[response_id] = right
            except httpx.TransportError:
                time.sleep(0.01)

    with running_server(world) as server:
        for _ in range(3):
            ended = threading.Event()
            threads = [threading.Thread(target=ask, args=(server.url, ended, n)) for n in range(6)]
            for thread in threads:
                thread.start()
            time.sleep(3)
            killed_at.append(time.monotonic())
            server.kill()
            ended.set()
            for thread in threads:
                thread.join(60)
            server.start()
        server.stop()

    log = TrafficLog(f"sqlite:///{tmp_path}/traffic.db")
    stored = {record.id for record in log.requests("home")}
    assert len(answered) > 100 and len(said) > 30
    lost = {one: at for one, at in answered.items() if one not in stored}
    for one, at in lost.items():
        kill = min(moment for moment in killed_at if moment >= at - LOST_SECONDS)
        assert kill - at <= LOST_SECONDS, f"{one} was answered {kill - at:.2f} s before the end"
    assert {j.request.id: j.feedback.right_answer for j in log.feedback("home")} == said | {
        j.request.id: j.feedback.right_answer for j in log.feedback("home") if j.request.id not in said
    }, "acknowledged feedback is there"
    assert said.keys() <= {j.request.id for j in log.feedback("home")}
    connection = sqlite3.connect(tmp_path / "traffic.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    print(
        f"\n{len(answered)} answered, {len(lost)} lost in {len(killed_at)} kills; {len(said)} feedback kept"
    )


@pytest.mark.slow
def test_ended_in_order_it_loses_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.record(world.adapter("home", 1))
    with running_server(world) as server:
        http = httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {world.key}"}, timeout=30)
        body = {"model": "home", "messages": QUESTION, "max_tokens": 1}
        ids = {http.post("/v1/chat/completions", json=body).json()["id"] for _ in range(20)}
        server.stop()
    assert {record.id for record in TrafficLog(f"sqlite:///{tmp_path}/traffic.db").requests("home")} == ids
