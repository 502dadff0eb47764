"""Runs the programs of one deployment together: Dagster, MLflow and the gateway, with one log.

`python -m ml_assets.cli.supervisor` is what `evergreen up` starts in the background. It writes who it is and
what it started to `supervisor.json` in EVERGREEN_HOME, starts again what dies, and ends all on SIGTERM.
"""

import contextlib
import errno
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
from filelock import FileLock, Timeout

from ml_assets.artifacts import write_atomic
from ml_assets.settings import Settings

if TYPE_CHECKING:
    from dagster import DagsterInstance

ROOT = Path(__file__).resolve().parents[2]
MODULE_VARIABLE = "EVERGREEN_DAGSTER_MODULE"
PORTS = {
    "dagster": "EVERGREEN_DAGSTER_PORT",
    "mlflow": "EVERGREEN_MLFLOW_PORT",
    "gateway": "EVERGREEN_GATEWAY_PORT",
}
STOP_SECONDS = 10.0
REQUEUE_SECONDS = 10.0
START_SECONDS = 180.0
LONGEST_PAUSE = 30.0
LOG_BYTES = 50_000_000
WAITING = ("/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "sh")
"""Put before a command: it begins at the first line of its input, and never when that is closed before."""
COLOR = re.compile(r"\x1b\[[0-9;]*m")
LOCATION_ERROR = """
{workspaceOrError{... on Workspace{locationEntries{
  locationOrLoadError{... on PythonError{message errorChain{error{message}}}}
}}}}
"""
RELOAD = """
mutation{reloadRepositoryLocation(repositoryLocationName:"evergreen"){
  __typename ... on UnauthorizedError{message} ... on ReloadNotSupported{message}
  ... on RepositoryLocationNotFound{message}
}}
"""
DAEMON_HEALTH = "{instance{daemonHealth{allDaemonStatuses{daemonType required healthy}}}}"

logger = logging.getLogger("supervisor")


class OperationError(Exception):
    """Something the operator has to change; the message says what."""


# -- the deployment's directory ------------------------------------------------------------------------


def environment(settings: Settings) -> dict[str, str]:
    """The environment of every program: this deployment's settings, and no telemetry."""
    return {
        **os.environ,
        "EVERGREEN_HOME": str(settings.home),
        "EVERGREEN_HOST": settings.host,
        "EVERGREEN_DAGSTER_PORT": str(settings.dagster_port),
        "EVERGREEN_MLFLOW_PORT": str(settings.mlflow_port),
        "EVERGREEN_GATEWAY_PORT": str(settings.gateway_port),
        "EVERGREEN_ARTIFACTS_URL": settings.artifacts_url,
        "EVERGREEN_LEDGER_URL": settings.ledger_url,
        "EVERGREEN_TRAFFIC_URL": settings.traffic_url,
        "EVERGREEN_MLFLOW_URI": settings.mlflow_uri,
        "EVERGREEN_LOG": str(log_path(settings)),
        "DAGSTER_HOME": str(settings.dagster_home),
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "GIT_PYTHON_REFRESH": "quiet",
        "PYTHONUNBUFFERED": "1",
        # programs run in other directories, where a relative entry would lead nowhere
        "PYTHONPATH": os.pathsep.join([str(ROOT), *_absolute(os.environ.get("PYTHONPATH", ""))]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


def _absolute(path: str) -> list[str]:
    return [os.path.abspath(entry) for entry in path.split(os.pathsep) if entry]


def initialize(settings: Settings) -> None:
    """Create the data directory with its Dagster instance and its MLflow store; harmless when they exist."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from sqlalchemy.exc import OperationalError

    from resources.mlflow_tracking import ensure_store

    for directory in (settings.home, settings.dagster_home, settings.mlflow_artifacts, settings.logs):
        directory.mkdir(parents=True, exist_ok=True)
    write_atomic(settings.dagster_home / "dagster.yaml", (ROOT / "dagster.yaml").read_bytes())
    ensure_store(settings.mlflow_uri, str(settings.mlflow_artifacts))
    try:
        check_ledger(settings)
    except OperationalError:  # after a reboot its server may come up later: the supervisor looks again
        print("The ledger does not answer; what starts runs waits for it.", flush=True)


def check_ledger(settings: Settings) -> None:
    """Raises OperationError when the ledger is another deployment's: each would take the other's work for its
    own. The first deployment that asks gets it."""
    from ml_assets.endpoints.ledger import Ledger

    path = settings.home / "deployment"
    with FileLock(settings.locks / "deployment.lock"):
        if not path.exists():
            write_atomic(path, f"{uuid.uuid4().hex[:12]}\n".encode())
        own = path.read_text().strip()
    if not own:
        raise OperationError(f"{path}: expected the id of this deployment, found an empty file")
    place = f"{socket.gethostname()}:{settings.home}"
    with contextlib.closing(Ledger(settings.ledger_url)) as ledger:
        owner, owners_place = ledger.owner(own, place)
    if owner != own:
        raise OperationError(
            f"the ledger belongs to deployment {owner} (of {owners_place}), and this is deployment {own} "
            f"(of {place}): set EVERGREEN_LEDGER_URL to another database; or, if this one takes the place of "
            f"{owner}, write {owner} into {path}"
        )


def log_path(settings: Settings) -> Path:
    return settings.logs / "evergreen.log"


def state_path(settings: Settings) -> Path:
    return settings.home / "supervisor.json"


def read_state(settings: Settings) -> dict[str, Any] | None:
    """What the supervisor started last: {"urls", "supervisor", "processes": {name: identity tags}}. Raises
    OperationError when the file is damaged."""
    path = state_path(settings)
    try:
        state = json.loads(path.read_text())
        if {"urls", "supervisor", "processes"} <= state.keys():
            return state
        reason = "its entries are missing"
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        reason = str(error)
    raise OperationError(
        f"{path}: expected what `evergreen up` wrote ({reason}); end the programs of this deployment that "
        "still run, then remove the file"
    )


def is_running(settings: Settings) -> bool:
    """Whether a supervisor runs for this data directory."""
    from ml_assets.cli.launcher import is_alive

    state = read_state(settings)
    return state is not None and is_alive(state["supervisor"])


def _write_state(settings: Settings, pid: int, processes: Mapping[str, int]) -> None:
    """`pid` is the supervisor's, `processes` those of its programs."""
    from ml_assets.cli.launcher import identity

    state = {
        "urls": urls(settings),
        "supervisor": identity(pid),
        "processes": {name: identity(pid) for name, pid in processes.items()},
    }
    write_atomic(state_path(settings), json.dumps(state, indent=2).encode())


@contextlib.contextmanager
def _one_at_a_time(settings: Settings) -> Iterator[None]:
    """So that two people who start or stop the same deployment do so one after the other."""
    settings.home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.home / "operation.lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock.acquire(timeout=0))
        except Timeout:
            print(f"Another `up` or `down` of {settings.home} is under way; waiting for it ...", flush=True)
            held.enter_context(lock)
        yield


def restart_path(settings: Settings, program: str) -> Path:
    return settings.home / "restart" / program


def ask_for_restart(settings: Settings, program: str) -> bool:
    """Have the supervisor end a program and start it again, within REQUEUE_SECONDS; asking again before that
    changes nothing. False when no supervisor runs for this data directory."""
    if not is_running(settings):
        return False
    write_atomic(restart_path(settings, program), b"")
    return True


# -- programs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A program to keep running."""

    name: str
    command: tuple[str, ...]
    directory: Path


def programs(settings: Settings, socket_path: str) -> list[Program]:
    """What makes up a deployment; Dagster's daemon and UI share the code server at `socket_path`."""
    module = os.environ.get(MODULE_VARIABLE, "ml_assets.definitions")
    workspace = settings.dagster_home / "workspace.yaml"
    python = (sys.executable, "-m")
    code_server = "dagster code-server start --use-python-environment-entry-point --log-level warning"
    address = ("--host", settings.host, "--port")
    return [
        Program(
            "code-server",
            (
                *python,
                *code_server.split(),
                "--location-name",
                "evergreen",
                "--socket",
                socket_path,
                "-m",
                module,
            ),
            ROOT,
        ),
        Program(
            "dagster-daemon",
            (*python, "dagster._daemon", "run", "--log-level", "warning", "-w", str(workspace)),
            settings.dagster_home,
        ),
        Program(
            "dagster-webserver",
            (*python, "dagster_webserver", "-w", str(workspace), *address, str(settings.dagster_port)),
            settings.dagster_home,
        ),
        Program(
            "mlflow",
            (
                *(*python, "mlflow", "server", *address, str(settings.mlflow_port), "--workers", "1"),
                *("--backend-store-uri", settings.mlflow_uri),
                *("--artifacts-destination", str(settings.mlflow_artifacts)),
            ),
            settings.mlflow_artifacts,
        ),
        Program("gateway", (*python, "ml_assets.endpoints.gateway"), settings.home),
    ]


class Supervisor:
    """Starts programs, each in a session of its own, and keeps them running until `stop`."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.environment = environment(settings)
        self.stopping = threading.Event()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.written = True
        self.lock = threading.Lock()

    def keep(self, program: Program) -> None:
        """Run the program again and again until `stop`; waits longer between ends that follow quickly."""
        pause = 1.0
        while not self.stopping.is_set():
            started = time.monotonic()
            try:
                end = f"ended with code {self._run_once(program)}"
            except Exception:  # there may be memory or a free process again later
                end = "could not be started"
                logger.exception("%s %s", program.name, end)
            if self.stopping.is_set():
                return
            pause = 1.0 if time.monotonic() - started > 60 else min(pause * 2, LONGEST_PAUSE)
            logger.error("%s %s; starting it again in %.0f s", program.name, end, pause)
            self.stopping.wait(pause)

    def _run_once(self, program: Program) -> int | None:
        """The program waits until the state was written: should this process be killed before, it ends as
        well, and no later supervisor starts a second one beside it."""
        with self.lock:
            if self.stopping.is_set():
                return None
            process = subprocess.Popen(
                [*WAITING, *program.command],
                cwd=program.directory,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                threading.Thread(target=_copy_lines, args=(program.name, process), daemon=True).start()
            except BaseException:  # with nobody to read what it says it would stand still, and hold its port
                _signal_group(process.pid, signal.SIGKILL)
                raise
            self.processes[program.name] = process
        assert process.stdin
        with contextlib.suppress(BrokenPipeError), process.stdin:  # `stop` may have ended it already
            self.write_state()
            process.stdin.write(b"go\n")
        code = process.wait()
        _signal_group(process.pid, signal.SIGKILL)  # what it started itself goes with it
        return code

    def end(self, name: str) -> bool:
        """End a program, which `keep` starts again; False when it does not run."""
        with self.lock:
            process = self.processes.get(name)
        return process is not None and process.poll() is None and _signal_group(process.pid, signal.SIGKILL)

    def write_state(self) -> None:
        """Failing is no reason to let a program alone: `keep_house` tries again."""
        with self.lock:
            pids = {name: process.pid for name, process in self.processes.items()}
            try:
                _write_state(self.settings, os.getpid(), pids)
                self.written = True
            except Exception:
                self.written = False
                logger.exception("%s can't be written", state_path(self.settings))

    def keep_house(self, instance: "DagsterInstance", known: set[str]) -> None:
        """What is to be looked after from time to time; `known` is the memory of `requeue_lost`."""
        from ml_assets.cli.recovery import requeue_lost

        if not self.written:
            self.write_state()
        if restart_path(self.settings, "gateway").exists():
            restart_path(self.settings, "gateway").unlink()
            logger.error("the gateway does not answer well: it is ended and started again")
            self.end("gateway")
        for run_id in requeue_lost(instance, self.settings.dagster_url, known):
            logger.warning("run %s is requeued; the daemon had lost its retry", run_id)

    def watch(self, instance: "DagsterInstance") -> None:
        """Keep house until `stopping` is set. A full disk or a locked database must not end everything."""
        known: set[str] = set()
        while not self.stopping.wait(REQUEUE_SECONDS):
            try:
                self.keep_house(instance, known)
            except Exception:
                logger.exception("keeping house failed; trying again in %.0f s", REQUEUE_SECONDS)

    def stop(self) -> None:
        """TERM to every process group, KILL to those that are still there 10 seconds later (some of
        Dagster's processes ignore TERM)."""
        self.stopping.set()
        with self.lock:
            pids = [process.pid for process in self.processes.values()]
        end_groups(pids)


def _copy_lines(name: str, process: subprocess.Popen[bytes]) -> None:
    assert process.stdout
    lines = logging.getLogger(name)
    with process.stdout:
        for line in process.stdout:
            lines.info("%s", COLOR.sub("", line.decode(errors="replace").rstrip()))


def _signal_group(pid: int, number: int) -> bool:
    """False when the process group of `pid` is empty."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):  # macOS: EPERM when only zombies are left
        return False
    return True


def end_groups(pids: list[int]) -> None:
    """End process groups: TERM, then KILL."""
    pids = [pid for pid in pids if _signal_group(pid, signal.SIGTERM)]
    deadline = time.monotonic() + STOP_SECONDS
    while pids and time.monotonic() < deadline:
        time.sleep(0.1)
        pids = [pid for pid in pids if _group_lives(pid)]
    for pid in pids:
        _signal_group(pid, signal.SIGKILL)


def _group_lives(group: int) -> bool:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def end_leftovers(settings: Settings) -> None:
    """End what a supervisor that was killed left behind, so that nothing holds ports or fights a new daemon.
    Run workers are not among these."""
    from ml_assets.cli.launcher import PID, is_alive

    state = read_state(settings) or {"processes": {}}
    end_groups([int(tags[PID]) for tags in state["processes"].values() if is_alive(tags)])


def end_workers(settings: Settings) -> int:
    """Kill the processes of all runs in progress; the next start requeues these runs. Returns how many."""
    from dagster import DagsterInstance, RunsFilter

    from ml_assets.cli.launcher import PID, is_alive, kill_group
    from ml_assets.cli.recovery import IN_PROGRESS

    with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
        runs = instance.get_runs(RunsFilter(statuses=IN_PROGRESS))
    alive = [run.tags for run in runs if PID in run.tags and is_alive(run.tags)]
    for tags in alive:
        kill_group(tags)
    # a killed process is there until its memory is given back: only then may another use the device
    deadline = time.monotonic() + STOP_SECONDS
    while any(map(is_alive, alive)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(alive)


# -- up, down ------------------------------------------------------------------------------------------


def urls(settings: Settings) -> dict[str, str]:
    return {
        "dagster": settings.dagster_url,
        "mlflow": settings.mlflow_url,
        "gateway": settings.gateway_url,
    }


def print_urls(urls: dict[str, str]) -> None:
    print(f"  Dagster UI  {urls['dagster']}")
    print(f"  MLflow UI   {urls['mlflow']}")
    print(f"  endpoint    {urls['gateway']}/v1")


def check_ports(settings: Settings) -> None:
    """Raises OperationError that names the port, its variable and who holds it when one can't be used."""
    ports = {
        "dagster": settings.dagster_port,
        "mlflow": settings.mlflow_port,
        "gateway": settings.gateway_port,
    }
    taken: dict[int, str] = {}
    for name, port in ports.items():
        variable = PORTS[name]
        if port in taken:
            raise OperationError(
                f"{variable} and {taken[port]} are both {port}: give each program its own port"
            )
        taken[port] = variable
        with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((settings.host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    reason = f"is in use{_holder(port)}"
                else:
                    reason = f"of {settings.host} (EVERGREEN_HOST) can't be used: {error.strerror}"
                raise OperationError(
                    f"port {port} {reason}; choose another one for {name} with {variable}, "
                    f"for example `make up {variable}={port + 10}`"
                ) from error


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid is None:
                    break
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f" by process {connection.pid} ({command[:80]})"
    return " by another user's process"


def answers(settings: Settings, addresses: dict[str, str]) -> dict[str, bool]:
    """Which program answers, and answers well; "daemon" is what Dagster's UI says about its daemons."""
    result = dict.fromkeys(["dagster", "daemon", "mlflow", "gateway"], False)
    with httpx.Client(timeout=5, trust_env=False) as client:
        with contextlib.suppress(httpx.HTTPError, KeyError, ValueError, TypeError):
            response = client.post(f"{addresses['dagster']}/graphql", json={"query": DAEMON_HEALTH})
            statuses = response.json()["data"]["instance"]["daemonHealth"]["allDaemonStatuses"]
            result["dagster"] = True
            result["daemon"] = all(status["healthy"] for status in statuses if status["required"])
        # a gateway that is still loading would answer its users with 503
        for name, path in (("mlflow", "/health"), ("gateway", "/healthz/ready")):
            with contextlib.suppress(httpx.HTTPError):
                result[name] = client.get(f"{addresses[name]}{path}").status_code == 200
    return result


def load_error(addresses: dict[str, str]) -> str | None:
    """Why Dagster can't load this project's definitions; None when it can."""
    response = httpx.post(
        f"{addresses['dagster']}/graphql", json={"query": LOCATION_ERROR}, timeout=60, trust_env=False
    )
    for entry in response.json()["data"]["workspaceOrError"]["locationEntries"]:
        error = entry["locationOrLoadError"]
        if error:
            chain = [error["message"], *(link["error"]["message"] for link in error["errorChain"])]
            return chain[-1].strip()
    return None


def reload(addresses: dict[str, str]) -> None:
    """Load the project's definitions again. Raises OperationError when they can't be loaded."""
    response = httpx.post(
        f"{addresses['dagster']}/graphql", json={"query": RELOAD}, timeout=120, trust_env=False
    )
    found = response.json()["data"]["reloadRepositoryLocation"]
    reason = load_error(addresses) or found.get("message")
    if reason:
        raise OperationError(f"can't load the definitions: {reason}")


def start(settings: Settings) -> bool:
    """Start everything in the background and wait until all answer. False when it was running already.

    Raises OperationError when a port is taken, a program does not come up within 3 minutes, or all runs but
    the definitions of the project can't be loaded.
    """
    with _one_at_a_time(settings):
        process = None if is_running(settings) else _start_supervisor(settings)
    deadline = time.monotonic() + START_SECONDS
    while True:
        state = read_state(settings)
        up = answers(settings, state["urls"]) if state else {"supervisor": False}
        if state and all(up.values()):
            if reason := load_error(state["urls"]):
                raise OperationError(
                    f"{state['urls']['dagster']} runs, but can't load the definitions: {reason}\n"
                    "correct it, then press 'Reload' under Deployment in the UI, or run `make down up`"
                )
            return process is not None
        if not is_running(settings):
            raise OperationError(f"the supervisor ended: see {log_path(settings)}")
        if time.monotonic() > deadline:
            missing = ", ".join(name for name, well in up.items() if not well)
            raise OperationError(
                f"no answer from {missing} within {START_SECONDS:.0f} s: "
                f"see {log_path(settings)}; `make down` ends what was started"
            )
        time.sleep(0.5)


def _start_supervisor(settings: Settings) -> subprocess.Popen[bytes]:
    """It waits until the state names it: should this process end in between, it ends as well, and whoever
    looks at the state later finds it, however far it is."""
    end_leftovers(settings)
    state_path(settings).unlink(missing_ok=True)
    check_ports(settings)
    initialize(settings)
    command = (sys.executable, "-m", "ml_assets.cli.supervisor")
    with log_path(settings).open("ab") as log:
        process = subprocess.Popen(
            [*WAITING, *command],
            cwd=ROOT,
            env=environment(settings),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdin
    with process.stdin:
        _write_state(settings, process.pid, {})
        process.stdin.write(b"go\n")
    return process


def stop(settings: Settings) -> tuple[bool, int]:
    """End everything. Returns (whether something was running, how many runs were interrupted)."""
    if not settings.home.is_dir():
        return False, 0
    with _one_at_a_time(settings):
        return _stop(settings)


def _stop(settings: Settings) -> tuple[bool, int]:
    from ml_assets.cli.launcher import PID, is_alive, kill_group

    state = read_state(settings)
    if state is None:
        return False, 0
    supervisor = state["supervisor"]
    was_running = is_alive(supervisor)
    if was_running:
        os.kill(int(supervisor[PID]), signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS + 10
        while is_alive(supervisor) and time.monotonic() < deadline:
            time.sleep(0.1)
        kill_group(supervisor)
    end_leftovers(settings)
    interrupted = end_workers(settings)
    state_path(settings).unlink(missing_ok=True)
    return was_running, interrupted


# -- the background process ----------------------------------------------------------------------------


@contextlib.contextmanager
def _code_server_socket(settings: Settings) -> Iterator[str]:
    """A short path for a socket (the length is limited), and the workspace file that names it."""
    with tempfile.TemporaryDirectory(prefix="evergreen-") as directory:
        path = f"{directory}/code.sock"
        server = {"grpc_server": {"socket": path, "location_name": "evergreen"}}
        write_atomic(settings.dagster_home / "workspace.yaml", json.dumps({"load_from": [server]}).encode())
        yield path


def _wait_for_code_server(supervisor: Supervisor, socket_path: str) -> None:
    from dagster._grpc.client import DagsterGrpcClient

    client = DagsterGrpcClient(socket=socket_path)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and not supervisor.stopping.is_set():
        try:
            client.ping("ready?")
            return
        except Exception:  # it says in many ways that it is not there yet
            supervisor.stopping.wait(0.2)
    if not supervisor.stopping.is_set():
        logger.error("the code server does not answer; the others start without it")


def _recover(supervisor: Supervisor, instance: "DagsterInstance") -> None:
    """Before the daemon starts. A ledger that is away, such as a server that comes up later after a reboot,
    is waited for: what serves goes on."""
    from ml_assets.cli.recovery import recover

    while not supervisor.stopping.is_set():
        try:
            check_ledger(supervisor.settings)
            for run in recover(instance):
                logger.warning("run %s (%s) had lost its process", run.run_id, run.job_name)
            return
        except Exception:
            logger.exception("can't look for lost runs yet; trying again in %.0f s", REQUEUE_SECONDS)
            supervisor.stopping.wait(REQUEUE_SECONDS)


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    settings = Settings.from_env()
    handler = RotatingFileHandler(log_path(settings), maxBytes=LOG_BYTES, backupCount=3)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)-17s | %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        _supervise(settings)
    except Exception:
        logger.exception("cannot go on")
        raise


def _supervise(settings: Settings) -> None:
    supervisor = Supervisor(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stopping.set())
    logger.info("starting; state in %s", settings.home)
    supervisor.write_state()
    with _code_server_socket(settings) as socket_path:
        threads: list[threading.Thread] = []

        def keep(*names: str) -> None:
            for program in programs(settings, socket_path):
                if program.name in names:
                    threads.append(threading.Thread(target=supervisor.keep, args=(program,)))
                    threads[-1].start()

        try:
            keep("code-server", "mlflow", "gateway")
            from dagster import DagsterInstance

            with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
                _recover(supervisor, instance)
                _wait_for_code_server(supervisor, socket_path)
                keep("dagster-daemon", "dagster-webserver")
                restart_path(settings, "gateway").unlink(missing_ok=True)  # asked of an earlier supervisor
                supervisor.watch(instance)
        finally:
            logger.info("stopping")
            supervisor.stop()
            for thread in threads:
                thread.join()
    logger.info("stopped")


if __name__ == "__main__":
    main()
