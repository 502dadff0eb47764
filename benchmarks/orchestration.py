"""What Dagster and MLflow add to the computations of the main job: seconds, memory, time to the first step.

    python -m benchmarks.orchestration --quick

The main job of one customization runs in a fresh deployment (`evergreen up`, a run launched through the UI's
API), and the functions that its assets call run one after another in a plain process, in turns. The base is
converted beforehand.

And how loading the code location and the sensors' ticks grow with the number of customizations
(`benchmarks.fleet`); `--only job` and `--only scale` are one half each.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import yaml
from dagster import AssetKey, DagsterEventType, DagsterInstance, RunsFilter

from benchmarks import fleet
from benchmarks.common import (
    ROOT,
    Measured,
    Measurement,
    Options,
    Unavailable,
    Worker,
    alternate,
    cached_base,
    closing,
    declared_base,
    environment,
    last_line,
    megabytes,
    number,
    options,
    parser,
    print_json,
    say,
    start,
    table,
)
from benchmarks.deployment import (
    changed_environment,
    deployment_environment,
    gateway,
    prepare_home,
)
from ml_assets.base_models.partitions import add_revisions
from ml_assets.base_models.register import register_revisions
from ml_assets.cli import supervisor
from ml_assets.cli.launcher import PID
from ml_assets.cli.runs import ASSET_JOB, Dagster
from ml_assets.cli.supervisor import OperationError
from ml_assets.settings import Settings

ASSETS = ("dataset", "adapter", "eval_report", "endpoint")
NAME = "news_topics"
PACKAGE = "benchmark_location"
PLAIN, DAGSTER = "plain process", "Dagster"
SAMPLE_SECONDS = 0.1

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


def main() -> None:
    arguments = parser(str(__doc__).split("\n\n")[0])
    arguments.add_argument("--rows", type=int, help=f"of {NAME}; default all of its 800, with --quick 240")
    arguments.add_argument("--evaluated", type=int, help="rows evaluated; default 200, with --quick 48")
    arguments.add_argument("--only", choices=["job", "scale"], help="one half of it; default both")
    given = arguments.parse_args()
    chosen = options(given)
    figures: dict[str, float | None] = {}
    if given.only != "job":
        found = fleet.measure(chosen.cache / "fleet", 3 if chosen.quick else 5)
        figures = {name: value and round(value, 3) for name, value in fleet.report(found).items()}
    if given.only == "scale":
        print_json(figures)
        return
    loading = measure_loading(5 if not chosen.quick else 3)
    rows, evaluated = (240, 48) if chosen.quick else (800, 200)
    cached_base(chosen.cache)
    run = Run(chosen, given.rows or rows, given.evaluated or evaluated)
    print_json(report(run.measure(), loading) | figures)


def measure_loading(rounds: int) -> dict[str, Measured]:
    """A process that loads the code location, beside one that imports Dagster alone."""

    def load(code: str) -> Measurement:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Unavailable(done.stderr.strip().splitlines()[-1])
        return {"seconds": time.perf_counter() - start}

    code = "from ml_assets.definitions import defs\ndefs().get_repository_def()"
    variants = {"code location": code, "import dagster": "import dagster"}
    for text in variants.values():
        load(text)  # compiles, fills the page cache
    return alternate({name: functools.partial(load, text) for name, text in variants.items()}, rounds)


class Run:
    """Alternates the two ways to do the main job, each time in a fresh home."""

    def __init__(self, given: Options, rows: int, evaluated: int):
        self.options = given
        self.folder = given.cache / "orchestration"
        self.project = self.folder / "project"
        self.customization = self.project / PACKAGE / "defs" / NAME
        _end(self.folder / "dagster")
        shutil.rmtree(self.folder, ignore_errors=True)
        self._write_project(rows, evaluated)

    def _write_project(self, rows: int, evaluated: int) -> None:
        """A project with this one's base model and one of its customizations, on fewer rows."""
        defs = self.project / PACKAGE / "defs"
        shutil.copytree(ROOT / "ml_assets" / "defs" / "base_models", defs / "base_models")
        content = yaml.safe_load(
            (ROOT / "ml_assets" / "defs" / NAME / "defs.yaml").read_text(encoding="utf-8")
        )
        content["attributes"]["source"]["args"]["rows"] = rows
        content["attributes"]["evaluation"]["max_rows"] = evaluated
        # speed is measured here, not whether a short training convinces the gate
        content["attributes"]["evaluation"]["gate"] = {
            "alpha": 0.4,
            "max_forgetting": 100,
            "max_negative_flips": 1.0,
        }
        self.customization.mkdir()
        (self.customization / "defs.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        for folder in (defs, defs.parent):
            (folder / "__init__.py").write_text("")
        (defs.parent / "definitions.py").write_text(DEFINITIONS)
        (self.project / "pyproject.toml").write_text(PYPROJECT)

    def measure(self) -> dict[str, Measured]:
        return alternate({PLAIN: self._plain, DAGSTER: self._dagster}, self.options.rounds, self.options.left)

    @contextlib.contextmanager
    def _home(self, name: str) -> Iterator[Settings]:
        """An empty deployment that has the converted base."""
        home = self.folder / name
        shutil.rmtree(home, ignore_errors=True)
        yield prepare_home(home, self.options.cache)
        shutil.rmtree(home, ignore_errors=True)

    # -- one round of each -----------------------------------------------------------------------------

    def _plain(self) -> Measurement:
        with self._home("plain") as settings:
            server = gateway(settings, self.options.cache / "logs" / "orchestration-gateway.log")
            with closing({"gateway": server}):
                server.wait(180)
                requested = time.time()
                extra = deployment_environment(settings)
                worker = Worker("orchestration-plain", "benchmarks.main_job", self.options, None, **extra)
                with closing({"plain": worker}), Sampler(lambda: worker.process.pid) as sampler:
                    found = worker.ask("run", folder=str(self.customization))
                    ended = time.time()
        return figures(requested, ended, found["steps"], found["first_step"], sampler)

    def _dagster(self) -> Measurement:
        path = os.pathsep.join([str(self.project), str(ROOT)])
        module = {"PYTHONPATH": path, supervisor.MODULE_VARIABLE: f"{PACKAGE}.definitions"}
        with self._home("dagster") as settings, changed_environment(environment(**module)):
            started = time.time()
            try:
                supervisor.start(settings)
                up = time.time() - started
                with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
                    return self._follow(settings, instance) | {"up": up}
            except OperationError as error:
                raise Unavailable(f"{error}; {last_line(supervisor.log_path(settings))}") from error
            finally:
                supervisor.stop(settings)

    def _follow(self, settings: Settings, instance: DagsterInstance) -> Measurement:
        families, root = declared_base()
        (revision,) = register_revisions(
            families.families,
            root,
            settings,
            functools.partial(add_revisions, instance),
        )
        dagster = Dagster(settings.dagster_url, instance)
        ready = dagster.launch(ASSET_JOB, assets=[AssetKey("base_model")], partition=revision)
        dagster.follow(ready, lambda _: None)
        requested = time.time()
        run_id = dagster.launch(f"{NAME}__main", partition=revision)

        def pid() -> int | None:
            run = instance.get_run_by_id(run_id)
            return int(run.tags[PID]) if run and PID in run.tags else None

        failed = False
        with Sampler(pid) as sampler:
            try:
                dagster.follow(run_id, lambda _: None)
            except OperationError as error:
                failed = True
                say(str(error))
        steps: dict[str, list[float]] = {}
        first: float | None = None
        for entry in instance.all_logs(run_id):
            name = (entry.step_key or "").split("__")[-1]
            event = entry.dagster_event
            if event is None:
                if "step 1/" in entry.user_message:
                    first = first or entry.timestamp
            elif event.event_type == DagsterEventType.STEP_START:
                steps[name] = [entry.timestamp]
            elif event.event_type == DagsterEventType.STEP_SUCCESS:
                steps[name].append(entry.timestamp)
        (record,) = instance.get_run_records(RunsFilter(run_ids=[run_id]))
        found = figures(requested, record.end_time or time.time(), steps, first, sampler)
        return found | {"wall": None} if failed else found


def _end(home: Path) -> None:
    """A run that was killed leaves its deployment."""
    supervisor.stop(replace(Settings.from_env(), home=home))


class Sampler:
    """Samples the resident memory of a process and its children while it is open."""

    def __init__(self, pid: Any):
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.samples: list[tuple[float, int]] = []

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        process: psutil.Process | None = None
        while not self._stop.wait(SAMPLE_SECONDS):
            with contextlib.suppress(psutil.Error, KeyError):
                if process is None:
                    found = self._pid()
                    process = psutil.Process(found) if found else None
                    continue
                family = [process, *process.children(recursive=True)]
                self.samples.append((time.time(), sum(one.memory_info().rss for one in family)))

    def peak(self, start: float, end: float) -> int:
        return max((size for at, size in self.samples if start <= at <= end), default=0)


def figures(
    requested: float, ended: float, steps: dict[str, list[float]], first_step: float | None, sampler: Sampler
) -> Measurement:
    """Seconds of the whole, of each asset, and to the first training step; peak bytes of each asset."""
    found: Measurement = {"wall": ended - requested}
    found["first_step"] = None if first_step is None else first_step - requested
    for name, window in steps.items():
        if len(window) == 2:
            found[f"{name} seconds"] = window[1] - window[0]
            found[f"{name} memory"] = sampler.peak(*window)
    found["computed"] = sum(found.get(f"{name} seconds", 0.0) for name in ASSETS)
    return found


def report(results: dict[str, Measured], loading: dict[str, Measured]) -> dict[str, float | None]:
    plain, dagster = results[PLAIN], results[DAGSTER]
    rows = [
        [
            name,
            number(plain.median(f"{name} seconds"), 1),
            number(dagster.median(f"{name} seconds"), 1),
            megabytes(plain.median(f"{name} memory")),
            megabytes(dagster.median(f"{name} memory")),
        ]
        for name in ASSETS
    ]

    def both(title: str, name: str) -> list[str]:
        return [title, number(plain.median(name), 1), number(dagster.median(name), 1), "", ""]

    rows += [
        both("sum of the assets", "computed"),
        both("request to first training step", "first_step"),
        both("request to end", "wall"),
    ]
    header = [NAME, "s, plain", "s, Dagster", "peak, plain", "peak, Dagster"]
    rounds = f"{len(plain.rounds)} and {len(dagster.rounds)} rounds"
    reasons = "; ".join(result.reason for result in (plain, dagster) if result.reason)
    print(table(f"Main job: medians of {rounds}. {reasons}".strip(), header, rows))
    print(
        table(
            "Start",
            ["what", "seconds"],
            [
                *([name, number(found.median("seconds"))] for name, found in loading.items()),
                ["evergreen up", number(dagster.median("up"))],
            ],
        )
    )
    computed, wall = plain.median("computed"), dagster.median("wall")
    overhead = round(wall / computed - 1, 4) if wall and computed else None
    load = loading["code location"].median("seconds")
    return {"overhead": overhead, "load_seconds": load and round(load, 3)}


if __name__ == "__main__":
    start(main)
