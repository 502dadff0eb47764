"""Processes of one deployment see whether another one computes, however it ended."""

import os
import queue
import resource
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from ml_assets.artifacts import ArtifactStore
from ml_assets.endpoints.gateway.engine import Engine
from ml_assets.engine import hardware
from ml_assets.engine.hardware import computing, neighbours

CHILD = """
import sys, time
from pathlib import Path
from ml_assets.engine.hardware import computing
with computing(Path(sys.argv[1])):
    print("computes", flush=True)
    time.sleep(60)
"""


def test_a_neighbour_is_seen_until_it_ends(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert not neighbours(home)
    with computing(home):
        pass
    assert not neighbours(home)
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(home)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)  # e.g. two devices
    ]
    for child in children:
        assert child.stdout and child.stdout.readline() == "computes\n"
    for child in children:
        assert neighbours(home)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert not neighbours(home)


def test_where_no_file_can_be_opened_no_neighbour_is_known(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        found = neighbours(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not found


def test_a_gateway_that_can_not_compute_any_more_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path))
    codes: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(os, "_exit", codes.put)
    engine = Engine(ArtifactStore(str(tmp_path / "artifacts")))
    engine._jobs.append(lambda: engine._bases["gone"].base.detach("adapter"))
    engine.start()
    assert codes.get(timeout=20) == 1
    assert "KeyError: 'gone'" in caplog.text
    engine.close()


def test_only_one_thread_of_the_gateway_computes_with_all_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path))
    monkeypatch.setattr(hardware, "threads", lambda: 2)
    engine = Engine(ArtifactStore(str(tmp_path / "artifacts")))
    engine.start()
    try:
        engine._loader.submit(lambda: None).result(60)
        computing_with: Future[int] = Future()
        with engine._changed:
            engine._jobs.append(lambda: computing_with.set_result(torch.get_num_threads()))
            engine._changed.notify_all()
        assert computing_with.result(60) == 2
        # torch takes the number that any thread set last, unless this thread has asked for its own before
        assert engine._loader.submit(torch.get_num_threads).result(60) == 1
    finally:
        engine.close()


def test_threads_do_not_spin_for_long_unless_told_otherwise() -> None:
    ask = "import os, ml_assets.engine; print(os.environ.get('GOMP_SPINCOUNT'))"

    def spin(**changes: str) -> str:
        kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        return subprocess.run(
            [sys.executable, "-c", ask], env=kept | changes, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert int(spin()) > 0
    assert spin(GOMP_SPINCOUNT="7") == "7"
    assert spin(OMP_WAIT_POLICY="ACTIVE") == "None"


def test_the_number_format_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bfloat16", "float32"):
        monkeypatch.setenv("EVERGREEN_DTYPE", name)
        assert hardware.compute_dtype(tmp_path) == getattr(torch, name)
        assert hardware.hardware_class(tmp_path).endswith(name)
    assert not (tmp_path / "hardware.json").exists(), "nothing had to be measured"
    monkeypatch.setenv("EVERGREEN_DTYPE", "float16")
    with pytest.raises(ValueError, match="EVERGREEN_DTYPE='float16': expected bfloat16 or float32"):
        hardware.compute_dtype(tmp_path)
