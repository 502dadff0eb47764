"""Serving here, with vLLM, transformers and llama.cpp: throughput and waiting times of several clients.

    python -m benchmarks.serving --quick

Real questions go to every server in the same order over HTTP; answers are streamed, greedy, and limited to
the same length. One and eight adapters; llama.cpp serves the quantised base without any.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

from benchmarks import load
from benchmarks.common import (
    ROOT,
    Measured,
    Measurement,
    Options,
    Unavailable,
    Worker,
    alternate,
    base_gguf,
    best,
    cached_base,
    closing,
    cores,
    last_line,
    megabytes,
    number,
    options,
    parser,
    peak_memory,
    peer_python,
    print_json,
    ratio,
    say,
    start,
    table,
    vllm_environment,
)
from benchmarks.deployment import Server, deployment_environment, free_ports, gateway, prepare_home
from benchmarks.tasks import tasks
from ml_assets.endpoints.gateway import keys
from ml_assets.endpoints.ledger import Ledger

TASK = "home_commands"
NEW_TOKENS = 24
ADAPTERS = 8
QUESTIONS = {1: 4, 8: 16, 32: 32}
"""Of a measurement, by the number of clients; `--times` multiplies them."""
STEPS = 6
"""Of the training of each adapter: enough that each answers in its own way."""

OURS, VLLM, LLAMA, TRANSFORMERS = "Evergreen", "vLLM", "llama.cpp, Q4_1, no adapter", "transformers serve"


@dataclass
class Target:
    """A server to measure: `models` are the names of its adapters; one name where it has none."""

    server: Server
    url: str
    models: list[str]
    key: str = "none"
    memory: int = 0
    questions: Iterator[Any] = field(default_factory=lambda: iter(()))


def main() -> None:
    arguments = parser(str(__doc__).split("\n\n")[0])
    arguments.add_argument("--times", type=int, help="factor on the questions; default 4, with --quick 1")
    given = arguments.parse_args()
    run = Run(options(given), given.times or (1 if given.quick else 4))
    with closing(run.open):
        run.prepare()
        results = run.measure()
    run.report(results)


class Run:
    """One run of the benchmark: its servers and results."""

    def __init__(self, given: Options, times: int):
        self.options = given
        self.open: dict[str, Any] = {}
        self.targets: dict[str, Target] = {}
        self.missing: dict[str, str] = {}
        self.requests = {clients: count * times for clients, count in QUESTIONS.items()}

    # -- preparation -----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Train the adapters (kept for the next run), start the servers, and ask each a question."""
        self.prepare_ours()
        starts: dict[str, Callable[[], Target]] = {
            OURS: self._ours,
            VLLM: self._vllm,
            LLAMA: self._llama,
        }
        if not self.options.quick:
            starts[TRANSFORMERS] = self._transformers
        for name, begin in starts.items():
            say(f"starting {name}")
            try:
                target = begin()
                self.open[name] = target.server
                target.server.wait(min(300.0, self.options.left()))
                target.questions = cycle(self.questions)
                self.targets[name] = target
                for model in target.models:
                    self._ask(target, [model], 1, 1)
            except (Unavailable, load.LoadError) as error:
                log = f" ({last_line(self.open[name].log)})" if isinstance(error, load.LoadError) else ""
                self.missing[name] = f"{error}{log}"
                self.targets.pop(name, None)
                if name in self.open:
                    self.open.pop(name).close()
                say(f"{name}: {self.missing[name]}")

    def prepare_ours(self) -> None:
        """Adapters and questions."""
        cached_base(self.options.cache)
        home = self.options.cache / "serving"
        self.settings = prepare_home(home, self.options.cache)
        self.folders = self._adapters(home / "customizations")
        task = tasks()[TASK]
        self.questions = [
            [
                {"role": "system", "content": task.prompt.system},
                {"role": "user", "content": task.prompt.user.format_map(row)},
            ]
            for row in task.rows(2000)[1000:]
        ]
        from ml_assets.engine import hardware  # brings torch, which --help can do without

        self.dtype = str(hardware.compute_dtype()).removeprefix("torch.")

    def _adapters(self, folder: Path) -> list[Path]:
        """PEFT folders of adapters that the ledger of the home releases, each trained on rows of its own."""
        content = yaml.safe_load(
            (ROOT / "ml_assets" / "defs" / TASK / "defs.yaml").read_text(encoding="utf-8")
        )
        attributes = content["attributes"]
        worker = Worker(
            "serving-adapters",
            "benchmarks.main_job",
            self.options,
            None,
            **deployment_environment(self.settings),
        )
        self.open["adapters"] = worker
        found: list[Path] = []
        for i in range(ADAPTERS):
            say(f"adapter {i + 1} of {ADAPTERS}")
            attributes["name"] = f"adapter_{i}"
            attributes["source"]["args"] |= {"rows": 200, "seed": i}
            attributes["adapter"] = {"rank": 16, "alpha": 32, "steps": STEPS, "batch_tokens": 768, "seed": i}
            attributes["endpoint"] = {"max_new_tokens": NEW_TOKENS}
            own = folder / f"adapter_{i}"
            own.mkdir(parents=True, exist_ok=True)
            (own / "defs.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
            answer = worker.ask("adapter", folder=str(own))
            self.base = answer["base"]
            found.append(Path(answer["folder"]))
        worker.close()
        return found

    def _log(self, name: str) -> Path:
        return self.options.cache / "logs" / f"serving-{name}.log"

    def _ours(self) -> Target:
        return self.gateway_target(self._log("gateway"))

    def gateway_target(self, log: Path, extra: Mapping[str, str] | None = None) -> Target:
        """A gateway of the benchmark's deployment, on a port of its own."""
        ledger = Ledger(self.settings.ledger_url)
        key, _ = keys.create(ledger, ["*"], name="benchmark")
        ledger.close()
        names = [f"adapter_{i}" for i in range(ADAPTERS)]
        (port,) = free_ports(1)
        settings = replace(self.settings, gateway_port=port)
        return Target(gateway(settings, log, extra), settings.gateway_url, names, key)

    def _vllm(self) -> Target:
        python = peer_python(self.options.peers, "vllm")
        (port,) = free_ports(1)
        modules = [f"adapter_{i}={path}" for i, path in enumerate(self.folders)]
        command = [
            *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"),
            *("--port", str(port), "--model", self.base, "--served-model-name", "base"),
            *("--dtype", self.dtype, "--max-model-len", "1024", "--max-num-seqs", "64"),
            *("--enable-lora", "--max-loras", str(ADAPTERS), "--max-lora-rank", "16"),
            *("--lora-modules", *modules),
        ]
        url = f"http://127.0.0.1:{port}"
        server = Server(command, f"{url}/health", self._log("vllm"), vllm_environment())
        return Target(server, url, [f"adapter_{i}" for i in range(ADAPTERS)])

    def _llama(self) -> Target:
        python = peer_python(self.options.peers, "llama")
        (port,) = free_ports(1)
        command = [
            *(str(python), "-m", "llama_cpp.server", "--host", "127.0.0.1", "--port", str(port)),
            *("--model", str(base_gguf()), "--n_ctx", "1024", "--n_threads", str(cores())),
            *("--n_threads_batch", str(cores()), "--interrupt_requests", "false"),
        ]
        url = f"http://127.0.0.1:{port}"
        return Target(Server(command, f"{url}/v1/models", self._log("llama")), url, ["base"])

    def _transformers(self) -> Target:
        """Asked for the adapters by their folders, the only name that it takes for what is on the disk."""
        (port,) = free_ports(1)
        program = Path(sys.executable).parent / "transformers"
        command = [str(program), "serve", "--host", "127.0.0.1", "--port", str(port)]
        url = f"http://127.0.0.1:{port}"
        server = Server(command, f"{url}/health", self._log("transformers"))
        return Target(server, url, [str(path) for path in self.folders])

    # -- measuring -------------------------------------------------------------------------------------

    def measure(self) -> dict[tuple[str, int, int], Measured]:
        """Rounds over {(server, adapters, clients)}; a server without adapters has a single cell of each."""
        cells: dict[tuple[str, int, int], Callable[[], Measurement]] = {}
        for clients in QUESTIONS:
            for adapters in (1, ADAPTERS):
                for name, target in self.targets.items():
                    if adapters <= len(target.models):
                        cells[name, adapters, clients] = functools.partial(
                            self._cell, target, adapters, clients
                        )
        titles = {cell: f"{cell[0]}, adapters {cell[1]}, clients {cell[2]}" for cell in cells}
        named = {titles[cell]: measure for cell, measure in cells.items()}
        found = alternate(named, self.options.rounds, self.options.left)
        for target in self.targets.values():
            target.memory = peak_memory(target.server.process.pid)
        return {cell: found[titles[cell]] for cell in cells}

    def _cell(self, target: Target, adapters: int, clients: int) -> Measurement:
        try:
            return self._ask(target, target.models[:adapters], clients, self.requests[clients])
        except load.LoadError as error:
            raise Unavailable(str(error)) from error

    def _ask(self, target: Target, models: list[str], clients: int, count: int) -> Measurement:
        requests = [
            {
                "model": models[i % len(models)],
                "messages": next(target.questions),
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
            }
            for i in range(count)
        ]
        answers = load.run(target.url, target.key, requests, clients)
        seconds = max(one.ended for one in answers) - min(one.asked for one in answers)
        waits = [one.ended - one.asked for one in answers]
        return {
            "requests": count / seconds,
            "tokens": sum(one.tokens for one in answers) / seconds,
            "first": load.percentile([one.first - one.asked for one in answers], 0.5),
            "p99": load.percentile(waits, 0.99),
        }

    # -- results ---------------------------------------------------------------------------------------

    def report(self, results: dict[tuple[str, int, int], Measured]) -> None:
        rows: list[list[str]] = []
        for (name, adapters, clients), found in results.items():
            rows.append(
                [
                    name,
                    str(adapters) if len(self.targets[name].models) > 1 else "none",
                    str(clients),
                    number(found.median("requests")),
                    number(found.median("tokens"), 1),
                    number(_milliseconds(found.median("first")), 0),
                    number(_milliseconds(found.median("p99")), 0),
                    megabytes(self.targets[name].memory),
                    str(len(found.rounds)),
                    found.reason,
                ]
            )
        rows += [[name, *["-"] * 7, "0", reason] for name, reason in self.missing.items()]
        header = ["server", "adapters", "clients", "requests/s", "new tokens/s", "median first ms", "p99 ms"]
        title = f"Serving: {TASK}, up to {NEW_TOKENS} new tokens, {self.dtype}"
        print(table(title, [*header, "peak memory", "rounds", "note"], rows))

        def median(name: str, adapters: int, clients: int, figure: str) -> float | None:
            found = results.get((name, adapters, clients))
            return found.median(figure) if found else None

        busiest = max(QUESTIONS)
        ours = median(OURS, ADAPTERS, busiest, "tokens")
        peers = [
            median(name, len(target.models), busiest, "tokens")
            for name, target in self.targets.items()
            if name != OURS
        ]
        p99 = _milliseconds(median(OURS, ADAPTERS, 8, "p99"))
        print_json(
            {
                "eight_vs_one_adapter": ratio(ours, median(OURS, 1, busiest, "tokens")),
                "vs_best_peer_at_32": ratio(ours, best(peers)),
                "p99_ms_at_8": p99 and round(p99, 1),
            }
        )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


if __name__ == "__main__":
    start(main)
