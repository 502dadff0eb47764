"""How loading the code location and the ticks of its sensors grow with the number of customizations.

A generated project: N customizations on one base family with 10 revisions, each released, with notes of its
assets and traffic. A process loads it as the code server does; another evaluates every sensor over all
customizations, when there is nothing to do and when there is something to do for each.
"""

import contextlib
import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from dagster import AssetMaterialization, DagsterInstance
from safetensors.numpy import save_file

from benchmarks.common import ROOT, Measured, Measurement, Unavailable, alternate, environment, number, table
from benchmarks.deployment import STATE
from ml_assets.artifacts import write_atomic
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.base_models.register import current_revision
from ml_assets.decisions.book import DecisionBook
from ml_assets.endpoints.gateway.keys import ADMIN_KEY_FILE
from ml_assets.endpoints.ledger import Ledger, now
from ml_assets.settings import RUN_ASSETS_VARIABLE, Settings
from ml_assets.spec import BaseFamily, DirectoryBase
from ml_assets.traffic.records import TrafficRecord
from ml_assets.traffic.store import TrafficLog

SIZES = (10, 100, 1000)
REVISIONS = 10
PACKAGE = "fleet_benchmark"
EVERY, ASKED = 10, 200
ADAPTER, DATASET = "a" * 64, "d" * 64

DEFINITIONS = """\
from pathlib import Path

import dagster as dg

from ml_assets.definitions import build_definitions


@dg.definitions
def defs() -> dg.Definitions:
    return build_definitions(Path(__file__).parent)
"""
PYPROJECT = f"""\
[tool.dg]
directory_type = "project"

[tool.dg.project]
root_module = "{PACKAGE}"
defs_module = "{PACKAGE}.defs"
code_location_target_module = "{PACKAGE}.definitions"
code_location_name = "evergreen"
registry_modules = ["ml_assets"]
"""
BASES = """\
type: ml_assets.BaseModels
attributes:
  families:
    - name: tiny
      source: {kind: directory, path: ../../../../base}
"""
CUSTOMIZATION = """\
type: ml_assets.Customization
attributes:
  name: {name}
  owners: [team:fleet]
  source: {{kind: jsonl, path: {rows}}}
  prompt: {{user: "{{text}}", target: "{{colour}}"}}
  base_models: [tiny]
  evaluation: {{task: classification}}
  freshness: {{source: 6h, dataset: 7d, endpoint: 30d}}
  drift: {{every: {every}}}
"""
# what the code server does when it starts: definitions, and the snapshot that daemon and UI ask for
LOAD = f"""
import json, time
start = time.perf_counter()
from {PACKAGE}.definitions import defs
repository = defs().get_repository_def()
loaded = time.perf_counter() - start
from dagster._core.remote_representation.external_data import RepositorySnap
RepositorySnap.from_def(repository, defer_snapshots=True)
print(json.dumps({{"definitions": loaded, "seconds": time.perf_counter() - start}}))
"""
# what the process of a run does before its first step
RUN = f"""
import json, time
start = time.perf_counter()
from dagster._core.definitions.reconstruct import ReconstructableRepository
ReconstructableRepository.for_module("{PACKAGE}.definitions", "defs").get_definition()
print(json.dumps({{"run": time.perf_counter() - start}}))
"""
TICKS = f"""
import json, sys, time
import dagster as dg
from {PACKAGE}.definitions import defs
loaded = defs()
repository = loaded.get_repository_def()
from dagster._core.remote_representation.external_data import RepositorySnap
RepositorySnap.from_def(repository, defer_snapshots=True)  # a code server has made it before its first tick
wanted = ("ledger", "traffic_log", "gateway", "artifact_store", "base_model_hub")
resources = {{name: loaded.resources[name] for name in wanted}}
found = {{}}
with dg.DagsterInstance.get() as instance:
    for name in sys.argv[2:]:
        cursor = None
        for again in range(int(sys.argv[1])):
            start = time.perf_counter()
            context = dg.build_sensor_context(
                instance_ref=instance.get_ref(), repository_def=repository, cursor=cursor,
                resources=resources,
            )
            data = repository.get_sensor_def(name).evaluate_tick(context)
            found.setdefault(name, []).append(time.perf_counter() - start)
            found[name + " runs"] = len(data.run_requests or [])
            cursor = data.cursor
print(json.dumps(found))
"""


class Fleet:
    """A generated project with its data directory."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder / str(size), size
        self.home, self.project = self.folder / "home", self.folder / "project"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.names = [f"customization_{index:04d}" for index in range(size)]
        self._write_project()
        self._fill()

    def _write_project(self) -> None:
        defs = self.project / PACKAGE / "defs"
        rows = self.folder / "rows.jsonl"
        for name in (*self.names, "bases"):
            (defs / name).mkdir(parents=True)
            text = BASES
            if name != "bases":
                text = CUSTOMIZATION.format(name=name, rows=rows, every=EVERY)
            (defs / name / "defs.yaml").write_text(text)
        for folder in (defs, defs.parent):
            (folder / "__init__.py").write_text("")
        (defs.parent / "definitions.py").write_text(DEFINITIONS)
        (self.project / "pyproject.toml").write_text(PYPROJECT)
        rows.write_text("".join(json.dumps({"text": f"a{n}", "colour": "red"}) + "\n" for n in range(50)))

    def _fill(self) -> None:
        """Everything serves, was looked at, and is fresh; each has traffic."""
        (self.home / "dagster").mkdir(parents=True)
        shutil.copy(ROOT / "dagster.yaml", self.home / "dagster")
        with DagsterInstance.from_config(str(self.home / "dagster")) as instance:
            revisions = [f"tiny@{index:012d}" for index in range(REVISIONS - 1)]
            instance.add_dynamic_partitions(str(BASE_MODELS.name), revisions)
        serves = self._publish_base(0)
        write_atomic(self.home / ADMIN_KEY_FILE, b"key")
        ledger = Ledger(f"sqlite:///{self.home / 'ledger.db'}")
        DecisionBook(ledger)  # makes its tables
        at = now()
        facts = {
            "adapter": ADAPTER,
            "base_revision": serves,
            "dataset": DATASET,
            "source_version": "v1",
        }
        notes = {
            "source": {"version": "v1"},
            "dataset": {"digest": DATASET, "source_version": "v1", "train_rows": 500},
            "candidate": facts | {"verdict": "promote"},
            "accepted": facts | {"verdict": "promote"},
            "look": {"adapter": ADAPTER, "to_seq": 10**9, "looked": EVERY, "kind": "quiet"},
        }
        release = {
            "action": "release",
            "base_revision": serves,
            "base_digest": "b" * 64,
            "adapter_digest": ADAPTER,
            "report_digest": "c" * 64,
            "mlflow_version": "1",
            "max_new_tokens": 16,
            "run_id": "run",
            "actor": "benchmark",
            "reason": "benchmark",
            "at": at,
        }
        columns = ", ".join(release)
        values = ", ".join(f":{name}" for name in release)
        with ledger.engine.begin() as connection:
            connection.execute(
                sa.text(f"INSERT INTO releases (customization, {columns}) VALUES (:name, {values})"),
                [release | {"name": name} for name in self.names],
            )
            connection.execute(
                sa.text("INSERT INTO notes (customization, subject, value, at) VALUES (:c, :s, :v, :at)"),
                [
                    {"c": name, "s": subject, "v": json.dumps(value), "at": at}
                    for name in self.names
                    for subject, value in notes.items()
                ],
            )
        ledger.close()
        self.ask(EVERY)

    def _publish_base(self, number_of: int) -> str:
        """Let the source of the base hold another revision, which has passed its probe."""
        folder = self.folder / "base"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "number": number_of}))
        (folder / "tokenizer.json").write_text("{}")
        save_file({"w": np.zeros(4, np.float32)}, folder / "model.safetensors")
        source = DirectoryBase(kind="directory", path=str(folder))
        settings = replace(Settings.from_env(), home=self.home)
        revision = current_revision(BaseFamily(name="tiny", source=source), folder, settings)
        with DagsterInstance.from_config(str(self.home / "dagster")) as instance:
            instance.add_dynamic_partitions(str(BASE_MODELS.name), [revision])
            instance.report_runless_asset_event(AssetMaterialization("base_model", partition=revision))
        return revision

    def ask(self, count: int) -> None:
        """So many requests to each endpoint."""
        log = TrafficLog(f"sqlite:///{self.home / 'traffic.db'}")
        first = sum(head.requests for head in log.heads().values())
        log.append(
            [
                TrafficRecord(
                    id=f"chatcmpl-{first + index}-{name}",
                    at=now(),
                    customization=name,
                    key_id="key",
                    adapter_digest=ADAPTER,
                    base_revision="tiny@0",
                    messages=[{"role": "user", "content": "hello"}],
                    answer="red",
                    status=200,
                    finish_reason="stop",
                    prompt_tokens=1,
                    completion_tokens=1,
                    latency_ms=1.0,
                    first_token_ms=1.0,
                    mean_logprob=-0.1,
                )
                for index in range(count)
                for name in self.names
            ]
        )
        log.close()

    def make_busy(self) -> None:
        """Every source has other rows, every endpoint had enough requests for a look and more (as many as a
        plan looks at), and there is a new base revision."""
        self._publish_base(1)
        ledger = Ledger(f"sqlite:///{self.home / 'ledger.db'}")
        with ledger.engine.begin() as connection:
            other = json.dumps({"version": "v2"})
            connection.execute(sa.text("UPDATE notes SET value = :v WHERE subject = 'source'"), {"v": other})
        ledger.close()
        self.ask(ASKED)

    def run(self, code: str, *arguments: str, **more: str) -> dict[str, float]:
        """The JSON that a process with this project prints last."""
        env = environment(
            EVERGREEN_HOME=str(self.home),
            DAGSTER_HOME=str(self.home / "dagster"),
            PYTHONPATH=f"{self.project}:{ROOT}",
            **dict.fromkeys(STATE, ""),
            **more,
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Unavailable(done.stderr.strip().splitlines()[-1])
        return json.loads(done.stdout.splitlines()[-1])

    def load(self) -> Measurement:
        found = self.run(LOAD) | self.run(RUN, **{RUN_ASSETS_VARIABLE: self.names[0]})
        return {name: found[name] for name in ("definitions", "seconds", "run")}

    def _tick(self, rounds: int, port: int) -> dict[str, float]:
        return self.run(TICKS, str(rounds), *SENSORS, EVERGREEN_GATEWAY_PORT=str(port))

    def ticks(self, rounds: int) -> Measurement:
        """Seconds of each sensor's slowest tick, first with nothing to do and then with something for all."""
        found: Measurement = {}
        with gateway_health(self.names) as port:
            for state in ("idle", "busy"):
                if state == "busy":
                    self.make_busy()
                for name, value in self._tick(rounds, port).items():
                    seconds = max(value) if isinstance(value, list) else value
                    found[f"{name} {state}"] = seconds
        return found


@contextlib.contextmanager
def gateway_health(names: list[str]) -> Iterator[int]:
    """The port of a server that says about its health what a gateway that serves all says. Fingerprints it
    does not know: what they cost is the gateway's time."""
    served = {name: {"adapter_digest": ADAPTER} for name in names}
    body = json.dumps({"live": True, "status": "ready", "served": served, "unserved": {}}).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


SENSORS = ("stale_data", "drift", "feedback_quality", "endpoint_health", "run_failures", "base_updates")


def measure(folder: Path, rounds: int, sizes: tuple[int, ...] = SIZES) -> dict[int, dict[str, Measured]]:
    """{size: {"load": ..., "ticks": ...}}."""
    found = {}
    for size in sizes:
        fleet = Fleet(folder, size)
        loads = alternate({"load": fleet.load}, rounds)
        ticks = alternate({"ticks": functools.partial(fleet.ticks, rounds)}, 1)
        found[size] = loads | ticks
        shutil.rmtree(fleet.folder, ignore_errors=True)
    return found


def slowest(ticks: Measured) -> float | None:
    """Seconds of the slowest tick of any sensor."""
    seconds = [ticks.median(f"{name} {state}") for name in SENSORS for state in ("idle", "busy")]
    return max((one for one in seconds if one is not None), default=None)


def report(found: dict[int, dict[str, Measured]]) -> dict[str, float | None]:
    """Print how both grow; the figures of the largest fleet."""
    sizes = list(found)
    rows: list[list[str]] = [
        ["load: definitions", *(number(found[n]["load"].median("definitions"), 2) for n in sizes)]
    ]
    rows.append(["load: with snapshot", *(number(found[n]["load"].median("seconds"), 2) for n in sizes)])
    rows.append(["load: in a run of one", *(number(found[n]["load"].median("run"), 2) for n in sizes)])
    rows += [
        [f"tick: {name}, {state}", *(number(found[n]["ticks"].median(f"{name} {state}"), 3) for n in sizes)]
        for name in SENSORS
        for state in ("idle", "busy")
    ]
    title = f"Customizations on a base with {REVISIONS} revisions: seconds"
    print(table(title, ["what", *(f"{size:,}" for size in sizes)], rows))
    largest = found[sizes[-1]]
    return {
        f"tick_seconds_{sizes[-1]}": slowest(largest["ticks"]),
        f"load_seconds_{sizes[-1]}": largest["load"].median("definitions"),
        f"snapshot_seconds_{sizes[-1]}": largest["load"].median("seconds"),
        f"run_load_seconds_{sizes[-1]}": largest["load"].median("run"),
    }
