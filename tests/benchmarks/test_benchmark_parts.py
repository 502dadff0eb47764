"""Tasks, load generator and temporary deployments of the benchmarks."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks import generation, incremental, load, orchestration, sharing, traffic
from benchmarks.common import Measured, Options, Unavailable
from benchmarks.deployment import STATE, Server, free_ports, prepare_home
from benchmarks.fleet import SENSORS, TICKS, Fleet
from benchmarks.orchestration import Sampler, figures
from benchmarks.tasks import tasks
from ml_assets.artifacts import ArtifactStore
from ml_assets.decisions.book import DecisionBook
from ml_assets.endpoints.ledger import Ledger


@contextmanager
def chat_server(status: int = 200) -> Iterator[tuple[str, list[int]]]:
    """(url, how many requests were open at each) of a server that streams two pieces."""
    together: list[int] = []
    now = 0
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal now
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                now += 1
                together.append(now)
            self.send_response(status)
            self.end_headers()
            if status == 200:
                for text in ("", "turn", " on"):
                    self.event({"choices": [{"delta": {"content": text}}]})
                    threading.Event().wait(0.02)
                self.event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
                self.wfile.write(b"data: [DONE]\n\n")
            else:
                self.wfile.write(b"the adapter is not there")
            with lock:
                now -= 1

        def event(self, value: object) -> None:
            self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that left is no failure
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", together
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_every_request_is_answered_with_that_many_clients_at_a_time():
    with chat_server() as (url, together):
        answers = load.run(url, "key", [{"max_tokens": n} for n in range(1, 13)], clients=4)
    assert sorted(one.tokens for one in answers) == list(range(1, 13))
    assert 2 <= max(together) <= 4
    # the empty first piece is no text yet
    assert all(one.first - one.asked >= 0.015 and one.ended > one.first for one in answers)


def test_a_refused_request_is_an_error_that_says_why():
    with chat_server(404) as (url, _), pytest.raises(load.LoadError, match="404: the adapter is not there"):
        load.run(url, "key", [{"max_tokens": 3}] * 4, clients=2)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.0, 1)])
def test_percentile(share, expected):
    assert load.percentile(list(range(100, 0, -1)), share) == expected


def test_a_server_that_ends_is_unavailable_with_its_last_words(tmp_path):
    (port,) = free_ports(1)
    command = ["/bin/sh", "-c", "echo no such model >&2; exit 1"]
    server = Server(command, f"http://127.0.0.1:{port}/", tmp_path / "log")
    with pytest.raises(Unavailable, match="no such model"):
        server.wait(10)
    server.close()


def test_a_home_has_the_base_of_the_cache_and_its_own_state(tmp_path, evergreen_home):
    cache = ArtifactStore(str(tmp_path / "cache" / "artifacts"))
    ref = cache.publish("base_model", {"config.json": b"{}"})
    cache.remember("base_model", "a" * 64, ref, {})
    cache.remember("adapter", "b" * 64, ref, {})
    settings = prepare_home(tmp_path / "home", tmp_path / "cache")
    store = ArtifactStore(settings.artifacts_url)
    assert store.open(ref).is_dir()
    assert store.recall("base_model", "a" * 64) == (ref, {})
    assert store.recall("adapter", "b" * 64) is None
    assert (settings.home / "downloads").resolve() == (evergreen_home / "downloads").resolve()
    assert len({settings.dagster_port, settings.mlflow_port, settings.gateway_port}) == 3
    prepare_home(tmp_path / "home", tmp_path / "cache")  # a second time changes nothing


def test_figures_of_a_run_that_broke_off_have_what_there_is():
    sampler = Sampler(lambda: None)
    sampler.samples = [(10.5, 100), (11.5, 300), (13.0, 200)]
    found = figures(
        9.0, 14.0, {"dataset": [10.0, 11.0], "adapter": [11.0, 12.5], "endpoint": [13.0]}, 12.0, sampler
    )
    assert found["wall"] == 5.0 and found["first_step"] == 3.0
    assert found["dataset seconds"] == 1.0 and found["dataset memory"] == 100
    assert found["adapter memory"] == 300
    assert "endpoint seconds" not in found
    assert found["computed"] == 2.5


def test_tasks_have_prompts_for_the_columns_of_their_rows():
    assert len(tasks()) >= 4
    for task in tasks().values():
        columns = {name for names in task.prompt.columns().values() for name in names}
        assert columns and task.kind in ("text", "json", "classification")
        assert (task.kind == "classification") == bool(task.labels)


def test_rows_of_the_tasks_differ_and_stay_the_same(home_with_packages: Path, monkeypatch):
    monkeypatch.setenv("EVERGREEN_HOME", str(home_with_packages))
    for task in tasks().values():
        rows = task.rows(40)
        assert rows == task.rows(60)[:40] and len(rows) == 40
        assert len({task.prompt.user.format_map(row) for row in rows}) == 40
        assert all(task.prompt.target.format_map(row).strip() for row in rows)


class InstantWorker:
    """Answers at once, but attaches nothing."""

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        if op == "attach":
            raise Unavailable("no time left")
        return {"seconds": 1.0, "tokens": [[1]] * len(arguments["prompts"])}

    def peak_memory(self) -> int:
        return 1


def test_what_was_measured_of_generation_is_reported_when_time_runs_out(tmp_path, capsys):
    run = generation.Run(Options(True, tmp_path, tmp_path, 1), 8)
    run.prompts, run.dtype = [[1, 2]] * 8, "float32"
    run.adapters = {f"a{i}": "x" for i in range(generation.ADAPTERS)}
    run.classified = {task: [[1]] * 8 for task in generation.CLASSIFIED}
    run.label_tokens = dict.fromkeys(generation.CLASSIFIED, 2)
    peers = (generation.CONTINUOUS, *generation.BATCHED.values(), generation.VLLM, generation.LLAMA)
    for name in (generation.OURS, generation.ONE, generation.PEFT_MIXED, *peers):
        run.workers[name] = InstantWorker()  # type: ignore[assignment]
    run.measure()
    run.report()
    text = capsys.readouterr().out
    last = json.loads(text.splitlines()[-1])
    assert last["vs_one_by_one"] == 1.0 and last["mixed_vs_peft"] is None
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {generation.OURS_MIXED}"))
    assert "no time left" in row


def test_classification_leaves_time_for_mixed_adapters(tmp_path, monkeypatch):
    run = generation.Run(Options(True, tmp_path, tmp_path, 1), 8)
    run.prompts, run.adapters, run.classified = [[1, 2]] * 8, {}, {}
    left: list[float] = []
    monkeypatch.setattr(run, "adapters", {f"a{i}": "x" for i in range(generation.ADAPTERS)})
    monkeypatch.setitem(run.missing, generation.OURS, "not here")
    run.workers[generation.OURS] = InstantWorker()  # type: ignore[assignment]
    monkeypatch.setattr(generation, "alternate", lambda _, __, seconds: left.append(seconds()) or {})
    run.measure()
    assert left[0] < left[1] - 30 and left[1] < left[2] - 30


def test_a_plan_that_was_not_measured_has_no_figure(capsys):
    run = object.__new__(sharing.Sharing)
    run.dtype = "float32"
    found = {
        "training alone": Measured([{"trained": 10.0}]),
        "gateway alone": Measured([{"tokens": 5.0}]),
        sharing.PLAN: Measured([], "the training failed"),
        sharing.FREE: Measured([{"trained": 5.0, "tokens": 2.0, "p99": 1.0}]),
    }
    run.print(found)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["plan_vs_none"] is None


def test_a_gateway_that_does_not_answer_is_told():
    (port,) = free_ports(1)
    with pytest.raises(Unavailable, match="the gateway does not answer"):
        traffic._block(f"http://127.0.0.1:{port}", "key", {})


def test_held_out_rows_are_not_those_of_the_old_release():
    rows = [{"utterance": text} for text in ("Open it", "close it", "stop", "go")]
    found = incremental.unknown(rows, [{"utterance": "open it"}], 2)
    assert [row["utterance"] for row in found] == ["close it", "stop"]
    with pytest.raises(Unavailable, match=r"4 rows .* asked for, but there are 3"):
        incremental.unknown(rows, [{"utterance": "open it"}], 4)


def test_a_fleet_keeps_to_its_own_home(tmp_path, monkeypatch):
    for name in STATE:
        monkeypatch.setenv(name, "elsewhere")
    fleet = object.__new__(Fleet)
    fleet.folder, fleet.home, fleet.project = tmp_path, tmp_path, tmp_path
    code = "import json, os; print(json.dumps(sorted(n for n in os.environ if n.startswith('EVERGREEN_'))))"
    assert not set(STATE) & set(fleet.run(code))


def test_a_new_base_revision_is_planned_and_carried_out_in_the_fleet(tmp_path):
    fleet = Fleet(tmp_path, 2)
    fleet.run(TICKS, "1", "base_updates")
    fleet.make_busy()
    fleet.run(TICKS, "3", "base_updates")
    book = DecisionBook(Ledger(f"sqlite:///{tmp_path / '2' / 'home' / 'ledger.db'}"))
    assert len(book.migrations()) == 2
    assert all(history.claimed for history in book.migrations())
    assert "base_updates" in SENSORS


def test_a_deployment_that_a_killed_run_left_is_ended(tmp_path, monkeypatch):
    ended: list[Path] = []

    def stop(settings: Any) -> None:
        assert (tmp_path / "orchestration").exists()
        ended.append(settings.home)

    (tmp_path / "orchestration" / "dagster").mkdir(parents=True)
    monkeypatch.setattr(orchestration.supervisor, "stop", stop)
    orchestration.Run(Options(True, tmp_path, tmp_path, 1), 10, 5)
    assert ended == [tmp_path / "orchestration" / "dagster"]
