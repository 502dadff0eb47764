"""What the benchmarks share: options, base, processes, alternating rounds, tables, the JSON line."""

import argparse
import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from ml_assets.artifacts import ArtifactStore
from ml_assets.base_models.build import build_base
from ml_assets.base_models.register import current_revision
from ml_assets.settings import Settings
from ml_assets.spec import BaseModelsSpec

ROOT = Path(__file__).resolve().parents[1]
QUICK_SECONDS = 8 * 60 - 10
"""A run with `--quick` has measured by then; what no longer fits is left out and said so."""


class Unavailable(Exception):
    """A variant that can't be measured here; the message is the reason shown in its row."""


# -- options -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """`cache` keeps the converted base and what is trained once, `peers` one virtual environment for each
    peer; `rounds` alternate."""

    quick: bool
    cache: Path
    peers: Path
    rounds: int
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds until a quick run has to end."""
        return self.started + QUICK_SECONDS - time.monotonic() if self.quick else float("inf")


def parser(description: str) -> argparse.ArgumentParser:
    home = Settings.from_env().home
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    result.add_argument("--quick", action="store_true", help="smaller, and ended within 8 minutes")
    result.add_argument(
        "--cache", type=Path, default=home / "benchmarks", help="the converted base and its adapters"
    )
    result.add_argument(
        "--peers", type=Path, default=home / "peers", help="virtual environments made by `make peers`"
    )
    result.add_argument("--rounds", type=int, default=None, help="of A B A B; default 3, with --quick 2")
    return result


def start(main: Callable[[], None]) -> None:
    """Run a benchmark; what this project itself can't do here ends it with the reason."""
    try:
        main()
    except Unavailable as error:
        sys.exit(f"error: {error}")


def options(arguments: argparse.Namespace) -> Options:
    rounds = arguments.rounds or (2 if arguments.quick else 3)
    cache = arguments.cache.expanduser().resolve()
    cache.mkdir(parents=True, exist_ok=True)
    return Options(arguments.quick, cache, arguments.peers.expanduser().absolute(), rounds)


def cores() -> int:
    """Threads of a measured process: all cores, or EVERGREEN_THREADS."""
    wanted = os.environ.get("EVERGREEN_THREADS", "")
    if wanted.isdigit() and int(wanted):
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(text: str) -> None:
    """Progress, apart from the results on stdout."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# -- base ----------------------------------------------------------------------------------------------


def declared_base() -> tuple[BaseModelsSpec, Path]:
    """The base models of this project, and the folder that their paths start from."""
    folder = ROOT / "ml_assets" / "defs" / "base_models"
    content = yaml.safe_load((folder / "defs.yaml").read_text(encoding="utf-8"))
    return BaseModelsSpec.model_validate(content["attributes"]), folder


def cached_base(cache: Path) -> Path:
    """Folder of the converted base, which is made the first time."""
    spec, folder = declared_base()
    settings = Settings.from_env()
    store = ArtifactStore(str(cache / "artifacts"))
    revision = current_revision(spec.families[0], folder, settings)
    return store.open(build_base(revision, spec.families, folder, settings, store, log=say).ref)


def base_gguf() -> Path:
    """The quantised file that the base was converted from."""
    from ml_assets.base_models import sources

    spec, folder = declared_base()
    fetched = sources.fetch(spec.families[0].source, folder, Settings.from_env())
    if not fetched.gguf:
        raise Unavailable("the base does not come from a GGUF file")
    return fetched.path


# -- processes -----------------------------------------------------------------------------------------


def peer_python(peers: Path, name: str) -> Path:
    """The interpreter of a peer's environment. Raises Unavailable when it was not made."""
    python = peers / name / "bin" / "python"
    if not python.exists():
        raise Unavailable(f"not installed (make peers PEER={name})")
    return python


def environment(**extra: str) -> dict[str, str]:
    """Of a measured process: all cores, no network. An empty value takes a variable away."""
    n = str(cores())
    whole = os.environ | {
        "OMP_NUM_THREADS": n,
        "MKL_NUM_THREADS": n,
        "EVERGREEN_THREADS": n,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": str(ROOT),
        **extra,
    }
    return {name: value for name, value in whole.items() if value or name not in extra}


def vllm_environment() -> dict[str, str]:
    """What vLLM gets beside `environment`. It binds its own threads, and advises against OMP_NUM_THREADS; by
    itself it leaves a core to its HTTP server, which is half of a small machine."""
    numbers = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(cores()))
    return {
        "OMP_NUM_THREADS": "",
        "MKL_NUM_THREADS": "",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, numbers[: cores()])),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


class Worker:
    """A process that runs `benchmarks.worker.serve`. It waits, without computing, between two requests."""

    def __init__(self, name: str, module: str, given: Options, python: Path | None = None, **extra: str):
        logs = given.cache / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.left = given.left
        self.ended = ""
        """Why it was ended, if it was."""
        self.log = logs / f"{name.replace(' ', '_')}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(python or sys.executable), "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=logs,
                env=environment(**extra),
                start_new_session=True,
            )

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Let the process do something and wait. Raises Unavailable with its reason when it can't."""
        self.send(op, **arguments)
        return self.receive()

    def send(self, op: str, **arguments: Any) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # receive() tells why
            self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout
        if self.left() < float("inf"):  # one answer for each request: nothing waits in Python's own buffer
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, self.left()))
            if not ready:
                self.close("no time left")
                raise Unavailable(self.ended)
        line = self.process.stdout.readline()
        if not line and self.ended:
            raise Unavailable(self.ended)
        if not line:
            raise Unavailable(f"its process ended with code {self.process.wait()}: {last_line(self.log)}")
        answer = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer

    def peak_memory(self) -> int:
        return peak_memory(self.process.pid)

    def close(self, reason: str = "") -> None:
        """End it; who asks it afterwards gets the reason."""
        self.ended = self.ended or reason
        kill(self.process)


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it wrote nothing"


def kill(process: subprocess.Popen[Any]) -> None:
    """End a process started in a session of its own, with its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def peak_memory(pid: int) -> int:
    """Bytes: the highest resident size of a process, plus that of its living children."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                total += _high_water(process.pid) or process.memory_info().rss
    return total


def _high_water(pid: int) -> int | None:
    status = Path(f"/proc/{pid}/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


# -- measuring -----------------------------------------------------------------------------------------

Measurement = dict[str, Any]


@dataclass
class Measured:
    """What the rounds of one variant gave; `reason` when there is nothing, or less than asked for."""

    rounds: list[Measurement] = field(default_factory=list)
    reason: str = ""

    def median(self, name: str) -> float | None:
        """Over the rounds; None when nothing was measured."""
        values = [found[name] for found in self.rounds if found.get(name) is not None]
        return statistics.median(values) if values else None

    def last(self, name: str) -> Any:
        return self.rounds[-1].get(name) if self.rounds else None


def alternate(
    variants: Mapping[str, Callable[[], Measurement]],
    rounds: int,
    left: Callable[[], float] = lambda: float("inf"),
    first: int = 1,
) -> dict[str, Measured]:
    """Measure every variant once, then again, `rounds` times: A B A B. They are counted from `first`.

    `left` tells the seconds that remain: a measurement that took longer the time before is not repeated. A
    variant that raises Unavailable is left alone from then on.
    """
    results = {name: Measured() for name in variants}
    took: dict[str, float] = {}
    for number in range(first, first + rounds):
        for name, measure in variants.items():
            result = results[name]
            if result.reason:
                continue
            if left() < max(1.0, took.get(name, 0.0) * 1.2):
                result.reason = f"no time for round {number}"
                continue
            start = time.monotonic()
            try:
                result.rounds.append(measure())
            except Unavailable as error:
                result.reason = str(error)
                say(f"{name}: {error}")
                continue
            took[name] = time.monotonic() - start
            say(f"round {number}, {name}: {took[name]:.1f} s")
    return results


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """How many times `theirs` goes into `ours`; None when either is missing."""
    return round(ours / theirs, 3) if ours is not None and theirs else None


def best(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return max(found, default=None)


@contextlib.contextmanager
def closing(workers: Mapping[str, Any]) -> Iterator[None]:
    """Ends the processes, also after an error, Ctrl-C or SIGTERM. The mapping may still grow inside."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        for worker in workers.values():
            worker.close()


# -- printing ------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 2) -> str:
    """`-` for what was not measured."""
    return "-" if value is None else f"{value:,.{digits}f}"


def megabytes(value: float | None) -> str:
    return "-" if not value else f"{value / 1e6:,.0f} MB"


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown that reads well as it is: first column to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def cells(line: Sequence[str]) -> str:
        padded = [
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([f"\n{title}\n", cells(lines[0]), cells(rule), *map(cells, lines[1:])])


def print_json(figures: Mapping[str, Any]) -> None:
    """The last line of a benchmark. Figures that were not measured are null."""
    print(flush=True)
    print(json.dumps(dict(figures)), flush=True)
