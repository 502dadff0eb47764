"""Greedy generation here, with transformers, vLLM and llama.cpp: prompts per second, memory, equal answers.

    python -m benchmarks.generation --quick

Every variant gets the same token ids and may answer with the same number of tokens, in a process of its own
with all cores. Slow ones answer a sample of the prompts, evenly spaced by length. Classification is timed on
every task that has labels, since what their prompts share decides what scoring saves.
"""

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import (
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
    megabytes,
    number,
    options,
    parser,
    peer_python,
    print_json,
    ratio,
    say,
    start,
    table,
    vllm_environment,
)
from benchmarks.tasks import tasks
from benchmarks.training import RECIPE

ADAPTERS = 8
NEW_TOKENS = 24
CLASSIFIED = tuple(name for name, task in tasks().items() if task.labels)
LATER_SECONDS, MIXED_SECONDS = 120, 60
"""Of a quick run, kept for classification and mixed adapters, and for those alone."""
MIXED_ROWS = 32
"""Rows of one batch for peft, whose memory grows with them."""

OURS, ONE, CONTINUOUS = "Evergreen", "transformers, one by one", "transformers, continuous batching"
VLLM, LLAMA = "vLLM", "llama.cpp, Q4_1"
BATCHED = {rows: f"transformers, sorted batches of {rows}" for rows in (16, 32)}
LABELS, DECODED = "Evergreen, label scoring", ONE
OURS_MIXED, PEFT_MIXED = "Evergreen, 8 adapters mixed", "peft adapter_names, 8 adapters mixed"
PEFT_TURNS, VLLM_MIXED = "peft set_adapter, one after the other", "vLLM, 8 adapters mixed"


def main() -> None:
    arguments = parser(str(__doc__).split("\n\n")[0])
    arguments.add_argument("--prompts", type=int, help="prompts; default 200, with --quick 48")
    given = arguments.parse_args()
    run = Run(options(given), given.prompts or (48 if given.quick else 200))
    with closing(run.workers):
        run.prepare()
        run.measure()
    run.report()


class Run:
    """One run of the benchmark: its processes, prompts and results."""

    def __init__(self, given: Options, prompts: int):
        self.options = given
        self.count = prompts
        self.workers: dict[str, Worker] = {}
        self.missing: dict[str, str] = {}
        self.results: dict[str, Measured] = {}
        self.memory: dict[str, int] = {}

    # -- preparation -----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the adapters, start and load every process, and let each answer a prompt."""
        base = str(cached_base(self.options.cache))
        say("starting the processes")
        ours = self.workers[OURS] = Worker("generation-ours", "benchmarks.ours", self.options)
        self.dtype = ours.ask("load", directory=base)["dtype"]
        found = ours.ask("examples", task="headlines", first=0, count=self.count)
        self.prompts = [one["prompt"] for one in found["examples"]]
        self.classified: dict[str, list[list[int]]] = {}
        self.label_tokens: dict[str, int] = {}
        for task in CLASSIFIED:
            rows = ours.ask("examples", task=task, first=0, count=self.count)["examples"]
            self.classified[task] = [one["prompt"] for one in rows]
            self.label_tokens[task] = max(len(one["target"]) for one in rows)
        self.adapters = self._adapters(base)

        limits = {"stop_ids": found["stop_ids"]}
        order = {"base": base, "dtype": self.dtype, **limits}
        theirs = "benchmarks.peers.transformers_generate"
        loads: dict[str, tuple[str, str | None, dict[str, Any]]] = {
            name: (theirs, None, order | {"pad_id": found["pad_id"]})
            for name in (ONE, *BATCHED.values(), CONTINUOUS)
        }
        mixed = order | {"adapters": self.adapters}
        loads[PEFT_MIXED] = (theirs, None, mixed | {"pad_id": found["pad_id"]})
        loads[VLLM] = ("benchmarks.peers.vllm_offline", "vllm", order)
        if not self.options.quick:
            loads[VLLM_MIXED] = ("benchmarks.peers.vllm_offline", "vllm", mixed)
        try:
            llama = {"gguf": str(base_gguf()), **limits}
            loads[LLAMA] = ("benchmarks.peers.llama_cpp_generate", "llama", llama)
        except Unavailable as error:
            self.missing[LLAMA] = str(error)
        for name, (module, peer, arguments) in loads.items():
            try:
                python = peer_python(self.options.peers, peer) if peer else None
                extra = vllm_environment() if peer == "vllm" else {}
                short = "".join(c if c.isalnum() else "-" for c in name)
                self.workers[name] = Worker(f"generation-{short}", module, self.options, python, **extra)
                self.workers[name].ask("load", **arguments)
            except Unavailable as error:
                self.missing[name] = str(error)
                say(f"{name}: {error}")
        say("warm-up")
        ours.ask("generate", prompts=self.prompts[:2], new_tokens=4)
        for name in loads:
            if name not in self.missing:
                op = "continuous" if name == CONTINUOUS else "generate"
                try:
                    self.workers[name].ask(op, prompts=self.prompts[:2], new_tokens=4)
                except Unavailable as error:
                    self.missing[name] = str(error)
                    say(f"{name}: {error}")

    def _adapters(self, base: str) -> dict[str, str]:
        """Folders of adapters for the same task, each trained for a few steps on rows of its own."""
        folder = self.options.cache / "adapters" / Path(base).name
        ours = self.workers[OURS]
        made = {f"a{i}": str(folder / f"a{i}") for i in range(ADAPTERS)}
        for i, path in enumerate(made.values()):
            if not (Path(path) / "adapter_model.safetensors").exists():
                say(f"training adapter {i + 1} of {ADAPTERS}")
                rows = ours.ask("examples", task="headlines", first=500 + 30 * i, count=30)["examples"]
                recipe = RECIPE | {"steps": 3, "seed": i, "batch_tokens": 1024}
                ours.ask("train", examples=rows, recipe=recipe, output=path)
        return made

    def _sample(self, size: int) -> list[int]:
        """Numbers of prompts, evenly spaced by length."""
        order = sorted(range(self.count), key=lambda i: len(self.prompts[i]))
        step = max(1, len(order) // size)
        return order[step // 2 :: step][:size]

    # -- measuring -------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Rounds of generation, of classification, and of mixed adapters."""
        size = 8 if self.options.quick else 40
        self.sample = self._sample(size)
        few, everything = self.sample, list(range(self.count))
        ask, rounds, left = self._ask, self.options.rounds, self.options.left
        variants: dict[str, Callable[[], Measurement]] = {
            OURS: functools.partial(ask, OURS, "generate", everything, NEW_TOKENS),
            ONE: functools.partial(ask, ONE, "generate", few, NEW_TOKENS),
            LLAMA: functools.partial(ask, LLAMA, "generate", few, NEW_TOKENS),
            VLLM: functools.partial(ask, VLLM, "generate", everything, NEW_TOKENS),
            **{
                name: functools.partial(ask, name, "generate", everything, NEW_TOKENS, rows=rows)
                for rows, name in BATCHED.items()
            },
            CONTINUOUS: functools.partial(ask, CONTINUOUS, "continuous", few, NEW_TOKENS),
        }
        self.results |= alternate(variants, rounds, lambda: left() - LATER_SECONDS)
        for name in variants:
            if name in self.workers:
                self.memory[name] = self.workers[name].peak_memory()
        classified: dict[str, Callable[[], Measurement]] = {}
        for task, prompts in self.classified.items():
            classified[_of(task, LABELS)] = functools.partial(self._choose, task)
            classified[_of(task, DECODED)] = functools.partial(
                ask, ONE, "generate", few, self.label_tokens[task], prompts=prompts
            )
        self.results |= alternate(classified, rounds, lambda: left() - MIXED_SECONDS)
        # only now: a base with adapters, also when none is active, is not the bare base
        try:
            for name, path in self.adapters.items():
                self.workers[OURS].ask("attach", name=name, directory=path)
        except Unavailable as error:
            self.missing[OURS] = str(error)
        names = [f"a{i % ADAPTERS}" for i in range(self.count)]
        folders = [[name, self.adapters[name]] for name in names]
        mixed: dict[str, Callable[[], Measurement]] = {
            OURS_MIXED: functools.partial(ask, OURS, "mixed", everything, NEW_TOKENS, adapters=names),
            PEFT_MIXED: functools.partial(
                ask, PEFT_MIXED, "generate", everything, NEW_TOKENS, adapters=names, rows=MIXED_ROWS
            ),
            PEFT_TURNS: functools.partial(
                ask, PEFT_MIXED, "sequential", everything, NEW_TOKENS, adapters=names, rows=MIXED_ROWS
            ),
        }
        if not self.options.quick:
            mixed[VLLM_MIXED] = functools.partial(
                ask, VLLM_MIXED, "generate", everything, NEW_TOKENS, adapters=folders
            )
        self.results |= alternate(mixed, rounds, left)
        processes = {OURS_MIXED: OURS, PEFT_MIXED: PEFT_MIXED, VLLM_MIXED: VLLM_MIXED}
        for name, process in processes.items():
            if process in self.workers:
                self.memory[name] = self.workers[process].peak_memory()

    def _ask(
        self,
        name: str,
        op: str,
        chosen: list[int],
        new_tokens: int,
        prompts: list[list[int]] | None = None,
        **extra: Any,
    ) -> Measurement:
        """Let a process answer the prompts with the numbers `chosen`; `answers` has the tokens by number."""
        if name in self.missing:
            raise Unavailable(self.missing[name])
        asked = [(prompts or self.prompts)[i] for i in chosen]
        found = self.workers[name].ask(op, prompts=asked, new_tokens=new_tokens, **extra)
        generated = sum(map(len, found["tokens"]))
        return {
            "answers": dict(zip(chosen, found["tokens"], strict=True)),
            "prompts": len(chosen),
            "rate": len(chosen) / found["seconds"],
            "token_rate": generated / found["seconds"],
        }

    def _choose(self, task: str) -> Measurement:
        prompts = self.classified[task]
        found = self.workers[OURS].ask("choose", task=task, prompts=prompts)
        return found | {"prompts": len(prompts), "rate": len(prompts) / found["seconds"]}

    # -- results ---------------------------------------------------------------------------------------

    def equal(self, name: str, reference: str = ONE) -> float | None:
        """Share of the answers that are those of the reference, token for token, where both answered."""
        theirs, ours = self.results[reference].last("answers"), self.results[name].last("answers")
        both = [i for i in ours or () if i in (theirs or {})]
        return round(sum(ours[i] == theirs[i] for i in both) / len(both), 3) if both else None

    def report(self) -> None:
        rate = {name: result.median("rate") for name, result in self.results.items()}

        def row(name: str, reference: str, equal: str, shown: str = "") -> list[str]:
            result = self.results[name]
            return [
                shown or name,
                number(rate[name]),
                number(result.median("token_rate"), 0),
                number(ratio(rate[name], rate[reference])),
                equal,
                megabytes(self.memory.get(name) if result.rounds else None),
                str(result.last("prompts") or "-"),
                str(len(result.rounds)),
                result.reason,
            ]

        header = [
            "prompts/s",
            "new tokens/s",
            "times",
            "equal answers",
            "peak memory",
            "prompts",
            "rounds",
            "",
        ]
        mean = sum(map(len, self.prompts)) / self.count
        peers = [*BATCHED.values(), CONTINUOUS, VLLM, LLAMA]
        print(
            table(
                f"Generation: prompts of {mean:.0f} tokens on average, up to {NEW_TOKENS} new ones, "
                f"{self.dtype}; times one by one",
                ["variant", *header],
                [row(name, ONE, number(self.equal(name))) for name in (OURS, ONE, *peers)],
            )
        )
        scoring: dict[str, float] = {}
        for task, prompts in self.classified.items():
            ours, theirs = _of(task, LABELS), _of(task, DECODED)
            if found := ratio(rate[ours], rate[theirs]):
                scoring[task] = found
            mean, labels = sum(map(len, prompts)) / self.count, len(tasks()[task].labels)
            print(
                table(
                    f"Classification: {task}, {labels} labels, prompts of {mean:.0f} tokens; times "
                    "one-by-one decoding",
                    ["variant", *header],
                    [row(ours, theirs, "-", LABELS), row(theirs, theirs, "-", DECODED)],
                )
            )
        mixed = [name for name in (OURS_MIXED, PEFT_MIXED, PEFT_TURNS, VLLM_MIXED) if name in self.results]
        print(
            table(
                f"{ADAPTERS} adapters, the prompts in turns; times peft's adapter_names",
                ["variant", *header],
                [row(name, PEFT_MIXED, number(self._equal_mixed(name))) for name in mixed],
            )
        )
        print_json(
            {
                "vs_one_by_one": ratio(rate[OURS], rate[ONE]),
                "vs_best_peer": ratio(rate[OURS], best(rate[name] for name in peers)),
                "label_scoring_vs_one_by_one": round(statistics.median(scoring.values()), 3)
                if scoring
                else None,
                "mixed_vs_peft": ratio(rate[OURS_MIXED], rate[PEFT_MIXED]),
                "answers_equal": self.equal(OURS),
                "label_scoring_vs_one_by_one_by_task": scoring,
            }
        )

    def _equal_mixed(self, name: str) -> float | None:
        """Compared with one adapter after the other."""
        return self.equal(name, PEFT_TURNS)


def _of(task: str, variant: str) -> str:
    return f"{task}: {variant}"


if __name__ == "__main__":
    start(main)
