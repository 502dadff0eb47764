"""LoRA training here, with transformers' Trainer and with TRL's SFTTrainer: speed, memory, final evaluation.

    python -m benchmarks.training --quick

Every variant trains on the same token ids, for the same number of epochs and examples per step, in a
process of its own with all cores. Useful tokens are the prompt and target tokens of the examples, counted the
same for all, whatever a variant pads, packs or skips.
"""

import functools
import shutil
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
)
from benchmarks.tasks import tasks
from ml_assets.artifacts import read_json

RECIPE: dict[str, Any] = {
    "rank": 8,
    "alpha": 16,
    "learning_rate": 1e-3,
    "schedule": "linear",
    "warmup": 0.0,  # from step 0 on all libraries then have the same learning rates
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 0,
}
ACTIVATED_EPOCHS = 3
QUALITY_SECONDS = 150
"""Of a quick run, kept for the comparison of the two adapter kinds on all tasks."""

LORA, COLD, WARM = "Evergreen, lora", "Evergreen, activated_lora, 3 epochs cold", "same, warm"
TRAINER, PLANNED = "Trainer + peft", "Trainer + peft, our batches"
SFT, PACKED = "SFTTrainer", "SFTTrainer, packed"


def main() -> None:
    arguments = parser(str(__doc__).split("\n\n")[0])
    arguments.add_argument("--task", default="headlines", choices=sorted(tasks()), help="task that is timed")
    arguments.add_argument("--examples", type=int, help="training examples; default 256, with --quick 64")
    arguments.add_argument("--batch-tokens", type=int, default=1024, help="tokens of one step")
    arguments.add_argument(
        "--evaluate", nargs="*", default=list(tasks()), choices=list(tasks()), help="tasks of the last table"
    )
    arguments.add_argument("--only", choices=["kinds"], help="the last table alone, without the timing")
    given = arguments.parse_args()
    run = Run(options(given), given.task, given.examples or (64 if given.quick else 256), given.batch_tokens)
    with closing(run.workers):
        if given.only:
            run.start(["lora", "activated", "judge"])
            points = run.compare_kinds(given.evaluate)
            report_kinds(points)
            print_json({"activated_points_lost": points_lost(points)})
            return
        run.prepare()
        results = run.measure()
        gap = run.compare_losses(results)
        points = run.compare_kinds(given.evaluate)
    run.report(results, gap, points)


class Run:
    """One run of the benchmark: its worker processes and what they were told."""

    def __init__(self, given: Options, task: str, count: int, batch_tokens: int):
        self.options = given
        self.task = task
        self.count = count
        self.recipe = {**RECIPE, "batch_tokens": batch_tokens}
        self.folder = given.cache / "training"
        self.workers: dict[str, Worker] = {}
        self.missing: dict[str, str] = {}
        self.rates: list[dict[str, float]] = []
        self.examples: list[dict[str, Any]] = []
        self.losses: dict[str, float] = {}
        self.memory: dict[str, int] = {}

    # -- preparation -----------------------------------------------------------------------------------

    def start(self, names: list[str]) -> None:
        """Start processes of our own and load the base in each."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.base = str(cached_base(self.options.cache))
        say("starting the processes")
        for name in names:
            self.workers[name] = Worker(f"training-{name}", "benchmarks.ours", self.options)
            self.workers[name].send("load", directory=self.base)
        for name in names:
            self.facts = self.workers[name].receive()

    def prepare(self) -> None:
        """Start the processes, load what stays loaded, and let each train for a step or two."""
        self.start(["lora", "activated", "judge"])
        module = "benchmarks.peers.trainer"
        self.workers["trainer"] = Worker("training-trainer", module, self.options)
        for name in ("sft", "packed"):
            try:
                python = peer_python(self.options.peers, "trl")
                self.workers[name] = Worker(
                    f"training-{name}", "benchmarks.peers.trainer", self.options, python
                )
            except Unavailable as error:
                self.missing[name] = str(error)
        self.targets = read_json(Path(self.base) / "manifest.json")["lora_targets"]["all-linear"]

        judge = self.workers["judge"]
        found = judge.ask("examples", task=self.task, first=0, count=self.count)
        self.examples, self.pad_id = found["examples"], found["pad_id"]
        held_out = 40 if self.options.quick else 100
        self.held_out = judge.ask("examples", task=self.task, first=self.count, count=held_out)["examples"]
        self.tokens = sum(len(one["prompt"]) + len(one["target"]) for one in self.examples)
        self.batches = judge.ask("plan", examples=self.examples, recipe=self.recipe | {"epochs": 1})[
            "batches"
        ]
        self.rows = max(1, round(self.count / len(self.batches)))
        say(
            f"{self.task}: {self.count} examples, {self.tokens} tokens, {len(self.batches)} steps of about "
            f"{self.rows} examples; {self.facts['dtype']}"
        )
        few = self.examples[: self.rows]
        self.workers["lora"].ask("train", **self._ours("warm-up", 1) | {"examples": few})
        for name in ("trainer", "sft", "packed"):
            if name in self.workers:
                try:
                    self.workers[name].ask("train", **self._theirs(name, "warm-up") | {"examples": few})
                except Unavailable as error:
                    self.missing[name] = str(error)

    def _ours(self, output: str, epochs: int) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "recipe": self.recipe | {"epochs": epochs},
            "output": str(self.folder / output),
        }

    def _theirs(self, name: str, output: str) -> dict[str, Any]:
        return {
            "library": "transformers" if name == "trainer" else "trl",
            "base": self.base,
            "examples": self.examples,
            "recipe": self.recipe | {"epochs": 1},
            "targets": self.targets,
            "output": str(self.folder / output),
            "dtype": self.facts["dtype"],
            "pad_id": self.pad_id,
            "rows": self.rows,
            "packing": name == "packed",
        }

    # -- measuring -------------------------------------------------------------------------------------

    def measure(self) -> dict[str, Measured]:
        """Rounds of every variant."""
        variants: dict[str, Callable[[], Measurement]] = {
            LORA: self._lora,
            TRAINER: functools.partial(self._peer, "trainer", TRAINER),
            SFT: functools.partial(self._peer, "sft", SFT),
            PACKED: functools.partial(self._peer, "packed", PACKED),
            COLD: functools.partial(self._activated, COLD),
            WARM: functools.partial(self._activated, WARM),
        }
        results = alternate(variants, self.options.rounds, lambda: self.options.left() - QUALITY_SECONDS)
        once = {PLANNED: functools.partial(self._peer, "trainer", PLANNED, batches=self.batches)}
        results |= alternate(once, 1, self.options.left)
        self.memory = {name: worker.peak_memory() for name, worker in self.workers.items()}
        return results

    def _rate(self, answer: Measurement, epochs: int = 1) -> Measurement:
        return answer | {"rate": self.tokens * epochs / answer["seconds"]}

    def _lora(self) -> Measurement:
        self.rates.append(self.workers["lora"].ask("matmul")["rates"])
        return self._rate(self.workers["lora"].ask("train", **self._ours(LORA, 1)))

    def _activated(self, variant: str) -> Measurement:
        worker, cache = self.workers["activated"], self.folder / "prompts"
        if variant == COLD:
            worker.ask("forget")
            shutil.rmtree(cache, ignore_errors=True)
        found = worker.ask(
            "train", **self._ours(variant, ACTIVATED_EPOCHS), kind="activated_lora", cache=str(cache)
        )
        return self._rate(found, ACTIVATED_EPOCHS)

    def _peer(self, name: str, output: str, **extra: Any) -> Measurement:
        if name in self.missing:
            raise Unavailable(self.missing[name])
        return self._rate(self.workers[name].ask("train", **self._theirs(name, output), **extra))

    def compare_losses(self, results: dict[str, Measured]) -> float | None:
        """Held-out loss of every adapter. Returns the gap between ours and the Trainer's on our batches."""
        judge = self.workers["judge"]
        try:
            self.losses["base"] = judge.ask("nll", examples=self.held_out)["nll"]
            for name, result in results.items():
                if result.rounds:
                    judge.ask("attach", name="judged", directory=str(self.folder / name))
                    self.losses[name] = judge.ask("nll", examples=self.held_out, adapter="judged")["nll"]
        except Unavailable as error:
            say(f"held-out losses: {error}")
        if LORA not in self.losses or PLANNED not in self.losses:
            return None
        return round(abs(self.losses[LORA] - self.losses[PLANNED]), 5)

    def compare_kinds(self, names: list[str]) -> dict[str, dict[str, float]]:
        """Points of the base and of both adapter kinds, each trained for 3 epochs, by task."""
        train, evaluation = (64, 40) if self.options.quick else (600, 200)
        judge, took = self.workers["judge"], 0.0
        points: dict[str, dict[str, float]] = {}
        for name in names:
            before = self.options.left()
            if before < took * 1.2:
                say(f"no time for the evaluation of {name}")
                continue
            found: dict[str, float] = {}
            rows: list[dict[str, Any]] = []
            for kind, worker in (("base", None), ("lora", "lora"), ("activated_lora", "activated")):
                try:
                    if not rows:
                        count = train + evaluation
                        rows = judge.ask("examples", task=name, first=0, count=count)["examples"]
                    if worker:
                        output = self.folder / f"{name}-{kind}"
                        order = self._ours(output.name, ACTIVATED_EPOCHS) | {"examples": rows[:train]}
                        self.workers[worker].ask("train", **order, kind=kind, cache=f"{output}-prompts")
                        judge.ask("attach", name="judged", directory=str(output))
                    order = {"task": name, "examples": rows[train:], "adapter": "judged" if worker else None}
                    found[kind] = judge.ask("score", **order)["points"]
                except Unavailable as error:
                    say(f"{name}, {kind}: {error}")
            points[name] = found
            took = before - self.options.left() if self.options.quick else 0.0
            say(f"{name}: {found}")
        return points

    # -- results ---------------------------------------------------------------------------------------

    def report(
        self, results: dict[str, Measured], gap: float | None, points: dict[str, dict[str, float]]
    ) -> None:
        process = {LORA: "lora", COLD: "activated", WARM: "activated", TRAINER: "trainer", SFT: "sft"}
        process |= {PLANNED: "trainer", PACKED: "packed"}
        rate = {name: result.median("rate") for name, result in results.items()}
        rows: list[list[str]] = []
        for name, result in results.items():
            memory = self.memory.get(process[name]) if result.rounds else None
            rows.append(
                [
                    name,
                    number(rate[name], 0),
                    number(ratio(rate[name], rate[TRAINER])),
                    megabytes(memory),
                    number(self.losses.get(name), 4),
                    str(len(result.rounds)),
                    result.reason,
                ]
            )
        header = [
            "variant",
            "useful tokens/s",
            "times Trainer",
            "peak memory",
            "held-out NLL",
            "rounds",
            "note",
        ]
        before = number(self.losses.get("base"), 4)
        title = (
            f"Training: {self.task}, {self.count} examples, {len(self.batches)} steps an epoch, rank "
            f"{self.recipe['rank']}, {self.facts['dtype']}; held-out NLL of the base {before}"
        )
        print(table(title, header, rows))

        trained = results[LORA].last("lora_weights")
        work = (4 * self.facts["body_weights"] + 6 * trained) / 1e9 if trained else 0.0
        formats = {name: _median([found[name] for found in self.rates]) for name in ("float32", "bfloat16")}
        done = (rate[LORA] or 0.0) * work
        share = {name: ratio(done or None, value) for name, value in formats.items()}
        used = share.get(self.facts["dtype"])
        print(
            table(
                f"Matrix products: {done:,.0f} GFLOP/s of {work:.3f} GFLOP per useful token",
                ["number format", "GFLOP/s", "share reached"],
                [[name, number(value, 0), number(share[name])] for name, value in formats.items()],
            )
        )
        report_kinds(points)
        print_json(
            {
                "lora_vs_trainer": ratio(rate[LORA], rate[TRAINER]),
                "activated_vs_trainer": ratio(rate[COLD], rate[TRAINER]),
                "lora_vs_sft": ratio(rate[LORA], best([rate[SFT], rate[PACKED]])),
                "lora_of_matmul_rate": share["bfloat16"],
                "loss_gap": gap,
                "activated_warm_vs_trainer": ratio(rate[WARM], rate[TRAINER]),
                "lora_of_best_matmul_rate": used,
                "activated_points_lost": points_lost(points),
            }
        )


def report_kinds(points: dict[str, dict[str, float]]) -> None:
    kinds = ["base", "lora", "activated_lora"]
    lines = [[name, *(number(found.get(kind), 1) for kind in kinds)] for name, found in points.items()]
    print(table("Evaluation of the two adapter kinds, points of 100", ["task", *kinds], lines))


def points_lost(points: dict[str, dict[str, float]]) -> list[float]:
    """By the activated kind against the exact one, a figure for each task that has both."""
    both = [found for found in points.values() if "activated_lora" in found]
    return [round(found["lora"] - found["activated_lora"], 2) for found in both]


def _median(values: list[float]) -> float | None:
    return Measured([{"x": value} for value in values]).median("x")


if __name__ == "__main__":
    start(main)
