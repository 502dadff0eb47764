"""Starting programs together, keeping them, and ending all of them."""

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from dagster import DagsterInstance, DagsterRunStatus
from dagster._core.test_utils import create_run_for_test
from postgres import private_postgres

from ml_assets.cli import supervisor as module
from ml_assets.cli.launcher import identity, is_alive, kill_group
from ml_assets.cli.supervisor import OperationError, Program, Supervisor, check_ports, end_leftovers
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings
from resources import mlflow_tracking


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Settings:
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path))
    return replace(
        Settings.from_env(), dagster_port=free_port(), mlflow_port=free_port(), gateway_port=free_port()
    )


@pytest.fixture
def supervise(settings):
    """Keeps a program running until the test ends; returns the supervisor."""
    supervisor = Supervisor(settings)
    threads = []

    def keep(*command: str) -> Supervisor:
        threads.append(
            threading.Thread(target=supervisor.keep, args=(Program("it", command, settings.home),))
        )
        threads[-1].start()
        return supervisor

    yield keep
    supervisor.stop()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return result


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# -- ports ---------------------------------------------------------------------------------------------


def test_free_ports_are_fine(settings):
    check_ports(settings)


def test_a_taken_port_is_named_with_its_variable_and_holder(settings):
    code = "import socket, time; s = socket.create_server(('127.0.0.1', %d)); print('up', flush=True)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code % settings.mlflow_port + "; time.sleep(60)"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout and holder.stdout.readline() == "up\n"
        with pytest.raises(OperationError) as caught:
            check_ports(settings)
    finally:
        holder.kill()
        holder.communicate()
    message = str(caught.value)
    assert f"port {settings.mlflow_port} is in use by process {holder.pid} ({sys.executable}" in message
    assert "with EVERGREEN_MLFLOW_PORT" in message


def test_two_programs_on_one_port_is_an_error(settings):
    with pytest.raises(OperationError, match="EVERGREEN_GATEWAY_PORT and EVERGREEN_DAGSTER_PORT are both"):
        check_ports(replace(settings, gateway_port=settings.dagster_port))


def test_an_address_of_another_machine_is_an_error(settings):
    with pytest.raises(OperationError, match=r"192\.0\.2\.7 \(EVERGREEN_HOST\) can't be used"):
        check_ports(replace(settings, host="192.0.2.7"))


# -- keeping and ending --------------------------------------------------------------------------------


def test_a_program_that_dies_is_started_again(supervise, tmp_path):
    starts = tmp_path / "starts"
    supervisor = supervise("sh", "-c", f"echo $$ >> {starts}; exec sleep 60")
    first = int(wait_for(lambda: lines(starts))[0])
    os.kill(first, signal.SIGKILL)
    pids = wait_for(lambda: len(lines(starts)) == 2 and lines(starts))
    assert int(pids[1]) != first
    state = tmp_path / "supervisor.json"  # written a moment after the start
    wait_for(lambda: json.loads(state.read_text())["processes"]["it"] == identity(int(pids[1])))
    assert supervisor.processes["it"].pid == int(pids[1])


def test_a_program_can_be_ended_to_be_started_again(supervise, settings, tmp_path):
    starts = tmp_path / "starts"
    supervisor = supervise("sh", "-c", f"trap '' TERM; echo $$ >> {starts}; sleep 60")
    wait_for(lambda: lines(starts))
    assert not supervisor.end("another") and supervisor.end("it")
    wait_for(lambda: len(lines(starts)) == 2)


def test_a_restart_is_asked_of_a_supervisor_that_lives(settings):
    assert not module.ask_for_restart(settings, "gateway")
    state = {"supervisor": identity(os.getpid()), "processes": {}, "urls": {}}
    module.state_path(settings).write_text(json.dumps(state))
    assert module.ask_for_restart(settings, "gateway") and module.ask_for_restart(settings, "gateway")
    assert module.restart_path(settings, "gateway").exists()


def test_what_a_dead_program_left_in_its_group_goes_with_it(supervise, tmp_path):
    children = tmp_path / "children"
    supervise("sh", "-c", f"sleep 60 & echo $! >> {children}; wait")
    child = identity(int(wait_for(lambda: lines(children))[0]))
    os.kill(psutil.Process(int(child["evergreen/pid"])).ppid(), signal.SIGKILL)
    wait_for(lambda: not is_alive(child))


def test_stopping_ends_what_ignores_term(supervise, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STOP_SECONDS", 0.5)
    ready = tmp_path / "ready"
    supervisor = supervise("sh", "-c", f"trap '' TERM; touch {ready}; sleep 60 & sleep 60; sleep 60")
    wait_for(ready.exists)
    group = wait_for(lambda: supervisor.processes.get("it")).pid  # it may be quicker than its supervisor
    supervisor.stop()
    wait_for(lambda: not module._group_lives(group))


def test_nothing_is_started_after_a_stop(supervise, tmp_path):
    starts = tmp_path / "starts"
    supervisor = supervise("sh", "-c", f"echo x >> {starts}")  # ends at once, again and again
    wait_for(lambda: lines(starts))
    supervisor.stop()
    count = len(lines(starts))
    time.sleep(2.5)  # longer than the first pause
    assert len(lines(starts)) == count


def test_output_goes_to_the_log_with_the_name_and_without_colors(supervise, caplog):
    caplog.set_level(logging.INFO)
    supervise(sys.executable, "-c", r"print('\033[32mhello\033[0m', flush=True); import time; time.sleep(60)")
    wait_for(lambda: [r for r in caplog.records if (r.name, r.getMessage()) == ("it", "hello")])


def test_what_a_killed_supervisor_left_is_ended_but_no_stranger(settings):
    left = subprocess.Popen(["sleep", "60"], start_new_session=True)
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        processes = {
            "a": identity(left.pid),
            "b": identity(stranger.pid) | {"evergreen/process_started": "1"},
        }
        state = {"urls": {}, "supervisor": processes["b"], "processes": processes}
        module.state_path(settings).write_text(json.dumps(state))
        end_leftovers(settings)
        wait_for(lambda: left.poll() is not None)
        assert stranger.poll() is None
    finally:
        for process in (left, stranger):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()


def test_a_program_runs_though_who_it_is_can_not_be_written(
    supervise, settings, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.1)
    caplog.set_level(logging.INFO)
    module.state_path(settings).mkdir()  # as good as a full disk
    starts = tmp_path / "starts"
    supervisor = supervise("sh", "-c", f"echo $$ >> {starts}; echo hello; exec sleep 60")
    wait_for(lambda: [r for r in caplog.records if (r.name, r.getMessage()) == ("it", "hello")])
    os.kill(int(lines(starts)[0]), signal.SIGKILL)
    wait_for(lambda: len(lines(starts)) == 2)
    wait_for(lambda: supervisor.processes["it"].poll() is None)


def test_a_program_does_not_outlive_a_supervisor_that_is_killed_before_it_is_known(settings, tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from ml_assets.cli.supervisor import Program, Supervisor
from ml_assets.settings import Settings

def killed():
    Path({str(tmp_path / "pid")!r}).write_text(str(supervisor.processes["it"].pid))
    os.kill(os.getpid(), signal.SIGKILL)

supervisor = Supervisor(Settings.from_env())
supervisor.write_state = killed
supervisor.keep(Program("it", ("sh", "-c", "touch begun; exec sleep 60"), Path({str(tmp_path)!r})))
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=module.ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    left = identity(int((tmp_path / "pid").read_text()))
    try:
        wait_for(lambda: not is_alive(left), seconds=5)
        assert not (tmp_path / "begun").exists()
    finally:
        kill_group(left)


def test_a_program_that_could_not_be_started_is_tried_again(settings, monkeypatch, caplog):
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.1)
    directory = settings.home / "later"
    supervisor = Supervisor(settings)
    keeper = threading.Thread(target=supervisor.keep, args=(Program("it", ("sleep", "60"), directory),))
    keeper.start()
    try:
        wait_for(lambda: "it could not be started; starting it again" in caplog.text)
        assert "FileNotFoundError" in caplog.text
        directory.mkdir()
        wait_for(lambda: "it" in supervisor.processes)
    finally:
        supervisor.stop()
        keeper.join(20)
    assert not keeper.is_alive()


def test_an_error_while_keeping_house_ends_nothing(settings, monkeypatch, caplog):
    monkeypatch.setattr(module, "REQUEUE_SECONDS", 0.05)
    settings.dagster_home.mkdir()
    supervisor = Supervisor(settings)
    supervisor.written = False  # the disk was full when a program started
    with DagsterInstance.local_temp(str(settings.dagster_home)) as instance:
        (runs,) = settings.dagster_home.rglob("runs.db")
        content = runs.read_bytes()
        runs.write_bytes(b"damaged " * 1000)
        watcher = threading.Thread(target=supervisor.watch, args=(instance,))
        watcher.start()
        try:
            wait_for(lambda: "keeping house failed" in caplog.text)
            assert "file is not a database" in caplog.text
            assert module.is_running(settings) and supervisor.written
            assert module.ask_for_restart(settings, "gateway")
            wait_for(lambda: not module.restart_path(settings, "gateway").exists())
            assert watcher.is_alive()
            runs.write_bytes(content)
        finally:
            supervisor.stop()
            watcher.join(20)
    assert not watcher.is_alive()


def test_a_ledger_that_is_away_at_the_start_is_waited_for(settings, tmp_path, monkeypatch, caplog):
    """As after a reboot, when its server comes up later: a lost run waits for it, what serves does not."""
    ledger = tmp_path / "ledger.db"
    ledger.mkdir()  # as good as a server that is away
    settings.dagster_home.mkdir()
    shutil.copy(module.ROOT / "dagster.yaml", settings.dagster_home)
    process = subprocess.Popen(["sleep", "60"])
    tags = identity(process.pid)
    process.kill()
    process.wait()
    with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
        run = create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags=tags)
    begun = {name: tmp_path / name for name in ("gateway", "dagster-daemon")}
    kept = [
        Program(name, ("sh", "-c", f"touch {path}; exec sleep 60"), tmp_path) for name, path in begun.items()
    ]
    supervisor = Supervisor(settings)
    monkeypatch.setattr(module, "Supervisor", lambda _settings: supervisor)
    monkeypatch.setattr(module, "programs", lambda _settings, _socket: kept)
    monkeypatch.setattr(module, "_wait_for_code_server", lambda _supervisor, _socket: None)
    monkeypatch.setattr(module, "REQUEUE_SECONDS", 0.1)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # which the main thread alone may do
    with ThreadPoolExecutor() as pool:
        running = pool.submit(module._supervise, settings)
        try:
            wait_for(lambda: running.done() or "can't look for lost runs yet" in caplog.text)
            wait_for(begun["gateway"].exists)
            assert not running.done() and not begun["dagster-daemon"].exists()
            ledger.rmdir()
            wait_for(begun["dagster-daemon"].exists)
        finally:
            supervisor.stop()
        running.result(20)
    with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
        found = instance.get_run_by_id(run.run_id)
    assert found and found.status == DagsterRunStatus.FAILURE


# -- one ledger, one deployment ------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request, tmp_path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'shared.db'}"
    else:
        with private_postgres() as url:
            yield url


def of_home(settings: Settings, home: Path, ledger_url: str) -> Settings:
    home.mkdir(parents=True, exist_ok=True)
    return replace(settings, home=home, ledger_url=ledger_url)


def refused(settings: Settings) -> str:
    """What `check_ledger` says against it; nothing where all is well."""
    try:
        module.check_ledger(settings)
    except OperationError as error:
        return str(error)
    return ""


def test_a_ledger_belongs_to_one_deployment(settings, tmp_path, ledger_url):
    first, second = (of_home(settings, tmp_path / name, ledger_url) for name in ("first", "second"))
    Ledger(ledger_url).close()  # made by an earlier release, so to say
    assert refused(first) == "" and refused(first) == ""
    message = refused(second)
    ids = [(one.home / "deployment").read_text().strip() for one in (first, second)]
    assert ids[0] != ids[1]
    for word in (*ids, str(first.home), str(second.home), "set EVERGREEN_LEDGER_URL to another database"):
        assert word in message
    assert f"write {ids[0]} into {second.home / 'deployment'}" in message
    shutil.copy(first.home / "deployment", second.home)  # it takes the place of the first
    assert refused(second) == ""
    assert refused(replace(second, ledger_url=f"sqlite:///{tmp_path / 'its own.db'}")) == ""


def test_of_many_first_starts_one_gets_the_ledger(settings, tmp_path, ledger_url):
    homes = [of_home(settings, tmp_path / str(number // 2), ledger_url) for number in range(12)]
    with ThreadPoolExecutor(len(homes)) as pool:
        results = list(pool.map(refused, homes))
    well = {homes[index].home for index, message in enumerate(results) if not message}
    assert len(well) == 1 and results.count("") == 2, "two starts of the same home"


def test_an_empty_id_is_an_error_that_names_the_file(settings, tmp_path):
    (tmp_path / "deployment").write_text("\n")
    assert f"{tmp_path / 'deployment'}: expected the id" in refused(settings)


def test_initializing_refuses_a_ledger_of_another_and_goes_on_without_one(
    settings, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(mlflow_tracking, "ensure_store", lambda *_: None)
    away = tmp_path / "away"
    away.mkdir()
    module.initialize(replace(settings, ledger_url=f"sqlite:///{away}"))
    assert "The ledger does not answer" in capsys.readouterr().out
    module.initialize(settings)
    assert capsys.readouterr().out == ""
    with pytest.raises(OperationError, match="the ledger belongs to deployment"):
        module.initialize(of_home(settings, tmp_path / "another", settings.ledger_url))


# -- up and down at the same time ----------------------------------------------------------------------


@pytest.fixture
def initialized(settings, monkeypatch) -> Iterator[Settings]:
    """A data directory without the databases, whose creation takes seconds."""
    for directory in (settings.logs, settings.dagster_home):
        directory.mkdir(parents=True)
    monkeypatch.setattr(module, "initialize", lambda _settings: None)
    yield settings
    module.stop(settings)


def test_a_supervisor_is_known_from_its_first_moment(initialized):
    process = module._start_supervisor(initialized)
    assert module.is_running(initialized)
    assert module.read_state(initialized) == {
        "urls": module.urls(initialized),
        "supervisor": identity(process.pid),
        "processes": {},
    }
    assert module.stop(initialized) == (True, 0)
    assert process.wait(1) == -signal.SIGTERM
    assert not module.state_path(initialized).exists()


def test_an_up_that_ends_before_its_supervisor_is_known_leaves_none(initialized, monkeypatch):
    found: list[dict[str, str]] = []

    def interrupted(_settings, pid, _processes):
        found.append(identity(pid))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module._start_supervisor(initialized)
    wait_for(lambda: not is_alive(found[0]), seconds=2)
    assert module.read_state(initialized) is None


def test_down_waits_for_an_up_under_way_and_ends_what_it_started(initialized, capsys):
    told: list[str] = []
    with ThreadPoolExecutor() as pool:
        with module._one_at_a_time(initialized):
            ended = pool.submit(module.stop, initialized)
            wait_for(lambda: ended.done() or told.append(capsys.readouterr().out) or any(told))
            process = module._start_supervisor(initialized)
        try:
            assert ended.result(20) == (True, 0)
        finally:
            process.kill()
            process.wait()
    assert "is under way; waiting for it" in "".join(told)


def test_an_up_that_waits_for_the_supervisor_of_another_sees_its_end(settings, monkeypatch):
    monkeypatch.setattr(module, "START_SECONDS", 10.0)
    looked = threading.Event()

    def answers(_settings, _urls):
        looked.set()
        return {"gateway": False}

    monkeypatch.setattr(module, "answers", answers)
    process = subprocess.Popen(["sleep", "60"])
    module._write_state(settings, process.pid, {})
    with ThreadPoolExecutor() as pool:
        second = pool.submit(module.start, settings)
        try:
            assert looked.wait(20) and not second.done()
        finally:
            process.kill()
            process.wait()
        with pytest.raises(OperationError, match="the supervisor ended"):
            second.result(20)


def test_running_is_a_supervisor_that_lives(settings):
    assert not module.is_running(settings)
    process = subprocess.Popen(["sleep", "60"])
    try:
        state = {"supervisor": identity(process.pid), "processes": {}, "urls": {}}
        module.state_path(settings).write_text(json.dumps(state))
        assert module.is_running(settings)
    finally:
        process.kill()
        process.wait()
    assert not module.is_running(settings)


def test_programs_get_this_deployment_and_no_telemetry(settings):
    environment = module.environment(settings)
    assert environment["DAGSTER_HOME"] == str(settings.home / "dagster")
    assert environment["EVERGREEN_GATEWAY_PORT"] == str(settings.gateway_port)
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert environment["DO_NOT_TRACK"] == "1"
