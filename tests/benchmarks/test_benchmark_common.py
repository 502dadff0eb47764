"""Tables, medians, rounds and worker processes of the benchmarks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.common import (
    Measured,
    Options,
    Unavailable,
    Worker,
    alternate,
    number,
    peer_python,
    print_json,
    ratio,
    table,
)

ROOT = Path(__file__).parents[2]


def given(tmp_path: Path, **values) -> Options:
    return Options(**({"quick": False, "cache": tmp_path, "peers": tmp_path / "peers", "rounds": 2} | values))


@pytest.mark.parametrize("name", ["training", "generation", "serving", "orchestration"])
def test_help_of_every_benchmark(name):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout and "--peers" in done.stdout


def test_the_median_leaves_out_rounds_without_the_figure():
    measured = Measured([{"rate": 1.0}, {"rate": 30.0, "x": 5}, {"rate": 2.0}])
    assert measured.median("rate") == 2.0
    assert measured.median("x") == 5
    assert Measured().median("rate") is None


def test_ratios_of_what_was_not_measured_are_missing():
    assert ratio(6.0, 4.0) == 1.5
    assert ratio(None, 4.0) is None
    assert ratio(6.0, None) is None
    assert ratio(6.0, 0.0) is None


def test_rounds_alternate_and_an_unavailable_variant_is_asked_once():
    calls: list[str] = []

    def measure(name: str):
        def call():
            calls.append(name)
            if name == "absent":
                raise Unavailable("not installed")
            return {"seconds": len(calls)}

        return call

    found = alternate({name: measure(name) for name in ("a", "absent", "b")}, 2)
    assert calls == ["a", "absent", "b", "a", "b"]
    assert found["absent"].reason == "not installed" and not found["absent"].rounds
    assert [one["seconds"] for one in found["b"].rounds] == [3, 5]


def test_nothing_is_started_without_time_left():
    found = alternate({"a": lambda: {"seconds": 1.0}}, 2, left=lambda: 0.0)
    assert not found["a"].rounds
    assert "no time" in found["a"].reason
    later = alternate({"a": lambda: {"seconds": 1.0}}, 2, left=lambda: 0.0, first=2)
    assert later["a"].reason == "no time for round 2"


def test_a_table_is_markdown_with_aligned_columns():
    lines = table("Title", ["variant", "rate"], [["a", number(1234.5, 1)], ["longer name", number(None)]])
    assert lines.split("\n")[1:] == [
        "Title",
        "",
        "| variant     |    rate |",
        "| ----------- | ------: |",
        "| a           | 1,234.5 |",
        "| longer name |       - |",
    ]


def test_the_last_line_is_json_with_null_for_what_is_missing(capsys):
    print_json({"lora_vs_trainer": 3.1, "loss_gap": None})
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"lora_vs_trainer": 3.1, "loss_gap": None}


def test_a_peer_that_is_not_installed_says_how_to(tmp_path):
    with pytest.raises(Unavailable, match="make peers PEER=vllm"):
        peer_python(tmp_path, "vllm")


ECHO = """
import os
from benchmarks.worker import serve

def echo(text):
    print("what a library prints")
    return {"text": text, "threads": os.environ["OMP_NUM_THREADS"]}

def broken():
    raise ValueError("row 3: expected a name")

serve({"echo": echo, "broken": broken, "end": lambda: os._exit(3)})
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "echo_worker.py").write_text(ECHO)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    found = Worker("echo", "echo_worker", given(tmp_path), PYTHONPATH=path)
    yield found
    found.close()


def test_a_worker_answers_whatever_libraries_print(worker):
    assert worker.ask("echo", text="zäh\n")["text"] == "zäh\n"
    assert int(worker.ask("echo", text="")["threads"]) >= 1
    assert worker.peak_memory() > 1_000_000
    assert "what a library prints" in worker.log.read_text()


def test_a_worker_tells_why_it_cannot(worker):
    with pytest.raises(Unavailable, match="row 3: expected a name"):
        worker.ask("broken")
    assert worker.ask("echo", text="still there")["text"] == "still there"
    with pytest.raises(Unavailable, match="ended with code 3"):
        worker.ask("end")


def test_a_worker_that_takes_too_long_is_ended(tmp_path):
    (tmp_path / "slow_worker.py").write_text("import time\ntime.sleep(60)\n")
    options = given(tmp_path, quick=True, started=-1e9)
    found = Worker("slow", "slow_worker", options, PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]))
    with pytest.raises(Unavailable, match="no time left"):
        found.ask("anything")
    assert found.process.returncode is not None


def test_a_worker_that_was_ended_for_time_says_so_again(tmp_path):
    (tmp_path / "slow_worker.py").write_text("import time\ntime.sleep(60)\n")
    options = given(tmp_path, quick=True, started=time.monotonic() - 10_000)
    worker = Worker("slow", "slow_worker", options, PYTHONPATH=str(tmp_path))
    for _ in range(2):
        with pytest.raises(Unavailable, match="no time left"):
            worker.ask("x")
