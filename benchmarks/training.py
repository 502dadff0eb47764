"""LoRA training here, with transformers' Trainer and with TRL's SFTTrainer: speed, memory, final evaluation.

    python -m benchmarks.training --quick

Every variant trains on the same token ids, for the same number of epochs and examples per step, in a
process of its own with all cores. Useful tokens are the prompt and target tokens of the examples, counted the
same for all, whatever a variant pads, packs or skips. How much there is to skip depends on the task, so this
project and the Trainer are timed on each; the others, and what is compared in detail, on the first.
"""

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
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
PROCESS = {
    LORA: "lora",
    COLD: "activated",
    WARM: "activated",
    TRAINER: "trainer",
    PLANNED: "trainer",
    SFT: "sft",
    PACKED: "packed",
}


def main() -> None:
    arguments = parser(str(__doc__).split("\n\n")[0])
    arguments.add_argument(
        "--tasks",
        nargs="+",
        choices=list(tasks()),
        help="that are timed; default all, with --quick the first of the list",
    )
    arguments.add_argument("--examples", type=int, help="of each task; default 256, with --quick 64")
    arguments.add_argument("--batch-tokens", type=int, default=1024, help="tokens of one step")
    arguments.add_argument(
        "--evaluate", nargs="*", default=list(tasks()), choices=list(tasks()), help="tasks of the last table"
    )
    arguments.add_argument("--only", choices=["kinds"], help="the last table alone, without the timing")
    given = arguments.parse_args()
    timed = given.tasks or list(tasks())[: 1 if given.quick else None]
    run = Run(options(given), timed, given.examples or (64 if given.quick else 256), given.batch_tokens)
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


@dataclass(frozen=True)
class Material:
    """What is trained on for one task. `batches` are the examples of each step here; peers take `rows`."""

    task: str
    examples: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    pad_id: int
    batches: list[list[int]]

    @property
    def tokens(self) -> int:
        return sum(len(one["prompt"]) + len(one["target"]) for one in self.examples)

    @property
    def rows(self) -> int:
        return max(1, round(len(self.examples) / len(self.batches)))


@dataclass(frozen=True)
class Variant:
    """One way to train on one task."""

    name: str
    material: Material

    @property
    def key(self) -> str:
        return f"{self.material.task}, {self.name}"


class Run:
    """One run of the benchmark: its worker processes and what they were told."""

    def __init__(self, given: Options, names: list[str], count: int, batch_tokens: int):
        self.options = given
        self.names = names
        self.count = count
        self.recipe = {**RECIPE, "batch_tokens": batch_tokens}
        self.folder = given.cache / "training"
        self.workers: dict[str, Worker] = {}
        self.missing: dict[str, str] = {}
        self.rates: list[dict[str, float]] = []
        self.materials: list[Material] = []
        self.variants: dict[str, Variant] = {}
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
                self.workers[name] = Worker(f"training-{name}", module, self.options, python)
            except Unavailable as error:
                self.missing[name] = str(error)
        self.targets = read_json(Path(self.base) / "manifest.json")["lora_targets"]["all-linear"]
        self.materials = [self._material(name) for name in self.names]
        first = self.materials[0]
        few = first.examples[: first.rows]
        self.workers["lora"].ask("train", **self._ours(Variant("warm-up", first), 1) | {"examples": few})
        for name in ("trainer", "sft", "packed"):
            if name in self.workers:
                order = self._theirs(name, Variant("warm-up", first)) | {"examples": few}
                try:
                    self.workers[name].ask("train", **order)
                except Unavailable as error:
                    self.missing[name] = str(error)

    def _material(self, task: str) -> Material:
        judge = self.workers["judge"]
        found = judge.ask("examples", task=task, first=0, count=self.count)
        held_out = 40 if self.options.quick else 100
        others = judge.ask("examples", task=task, first=self.count, count=held_out)["examples"]
        planned = judge.ask("plan", examples=found["examples"], recipe=self.recipe | {"epochs": 1})
        material = Material(task, found["examples"], others, found["pad_id"], planned["batches"])
        say(
            f"{task}: {self.count} examples, {material.tokens} tokens, {len(material.batches)} steps of "
            f"about {material.rows} examples; {self.facts['dtype']}"
        )
        return material

    def _output(self, variant: Variant) -> str:
        return str(self.folder / variant.key)

    def _ours(self, variant: Variant, epochs: int) -> dict[str, Any]:
        return {
            "examples": variant.material.examples,
            "recipe": self.recipe | {"epochs": epochs},
            "output": self._output(variant),
        }

    def _theirs(self, name: str, variant: Variant) -> dict[str, Any]:
        return {
            "library": "transformers" if name == "trainer" else "trl",
            "base": self.base,
            "examples": variant.material.examples,
            "recipe": self.recipe | {"epochs": 1},
            "targets": self.targets,
            "output": self._output(variant),
            "dtype": self.facts["dtype"],
            "pad_id": variant.material.pad_id,
            "rows": variant.material.rows,
            "packing": name == "packed",
        }

    # -- measuring -------------------------------------------------------------------------------------

    def measure(self) -> dict[str, Measured]:
        """Rounds of every variant, by its key; of those that are timed on the first task alone, one."""
        often: dict[str, Callable[[], Measurement]] = {}
        once: dict[str, Callable[[], Measurement]] = {}
        for material in self.materials:
            for name in (LORA, TRAINER, COLD, WARM):
                variant = self._variant(name, material)
                often[variant.key] = functools.partial(self._measured, variant)
        for name in (SFT, PACKED, PLANNED):
            variant = self._variant(name, self.materials[0])
            once[variant.key] = functools.partial(self._measured, variant)

        def left() -> float:
            return self.options.left() - QUALITY_SECONDS

        # what is measured once comes after a round of the rest, so that a quick run has something of all
        results = alternate(often, 1, left) | alternate(once, 1, left)
        again = {key: measure for key, measure in often.items() if not results[key].reason}
        for key, found in alternate(again, self.options.rounds - 1, left, first=2).items():
            results[key] = Measured(results[key].rounds + found.rounds, found.reason)
        self.memory = {name: worker.peak_memory() for name, worker in self.workers.items()}
        return results

    def _variant(self, name: str, material: Material) -> Variant:
        variant = Variant(name, material)
        self.variants[variant.key] = variant
        return variant

    def _measured(self, variant: Variant) -> Measurement:
        if variant.name == LORA:
            self.rates.append(self.workers["lora"].ask("matmul")["rates"])
            return self._rate(variant, self.workers["lora"].ask("train", **self._ours(variant, 1)))
        if variant.name in (COLD, WARM):
            return self._rate(variant, self._activated(variant), ACTIVATED_EPOCHS)
        name = PROCESS[variant.name]
        if name in self.missing:
            raise Unavailable(self.missing[name])
        extra = {"batches": variant.material.batches} if variant.name == PLANNED else {}
        return self._rate(variant, self.workers[name].ask("train", **self._theirs(name, variant), **extra))

    def _rate(self, variant: Variant, answer: Measurement, epochs: int = 1) -> Measurement:
        return answer | {"rate": variant.material.tokens * epochs / answer["seconds"]}

    def _activated(self, variant: Variant) -> Measurement:
        worker, cache = self.workers["activated"], self.folder / f"{variant.material.task} prompts"
        if variant.name == COLD:
            worker.ask("forget")
            shutil.rmtree(cache, ignore_errors=True)
        order = self._ours(variant, ACTIVATED_EPOCHS)
        return worker.ask("train", **order, kind="activated_lora", cache=str(cache))

    def compare_losses(self, results: dict[str, Measured]) -> float | None:
        """Held-out loss of every adapter. Returns the gap between ours and the Trainer's on our batches."""
        judge = self.workers["judge"]
        try:
            for material in self.materials:
                order = {"examples": material.held_out}
                self.losses[f"{material.task}, base"] = judge.ask("nll", **order)["nll"]
            for key, result in results.items():
                if result.rounds:
                    variant = self.variants[key]
                    judge.ask("attach", name="judged", directory=self._output(variant))
                    order = {"examples": variant.material.held_out, "adapter": "judged"}
                    self.losses[key] = judge.ask("nll", **order)["nll"]
        except Unavailable as error:
            say(f"held-out losses: {error}")
        ours, theirs = (self.losses.get(Variant(name, self.materials[0]).key) for name in (LORA, PLANNED))
        return round(abs(ours - theirs), 5) if ours is not None and theirs is not None else None

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
                        order = {
                            "examples": rows[:train],
                            "recipe": self.recipe | {"epochs": ACTIVATED_EPOCHS},
                            "output": str(output),
                        }
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
        rate = {key: result.median("rate") for key, result in results.items()}
        for material in self.materials:
            print(table(*self._timing(material, results, rate)))

        first = self.materials[0]
        lora = Variant(LORA, first).key
        trained = results[lora].last("lora_weights")
        work = (4 * self.facts["body_weights"] + 6 * trained) / 1e9 if trained else 0.0
        formats = {name: _median([found[name] for found in self.rates]) for name in ("float32", "bfloat16")}
        done = (rate[lora] or 0.0) * work
        share = {name: ratio(done or None, value) for name, value in formats.items()}
        print(
            table(
                f"Matrix products of exact LoRA on {first.task}: {done:,.0f} GFLOP/s of {work:.3f} GFLOP per "
                "useful token",
                ["number format", "GFLOP/s", "share reached"],
                [[name, number(value, 0), number(share[name])] for name, value in formats.items()],
            )
        )
        report_kinds(points)

        def times(name: str) -> dict[str, float]:
            """Of the Trainer's rate, by task."""
            found = {
                material.task: ratio(rate[Variant(name, material).key], rate[Variant(TRAINER, material).key])
                for material in self.materials
            }
            return {task: value for task, value in found.items() if value is not None}

        def middle(name: str) -> float | None:
            value = _median(list(times(name).values()))
            return None if value is None else round(value, 3)

        peers = best([rate[Variant(name, first).key] for name in (SFT, PACKED)])
        print_json(
            {
                "lora_vs_trainer": middle(LORA),
                "activated_vs_trainer": middle(COLD),
                "lora_vs_sft": ratio(rate[lora], peers),
                "lora_of_matmul_rate": share["bfloat16"],
                "loss_gap": gap,
                "activated_warm_vs_trainer": middle(WARM),
                "lora_of_best_matmul_rate": share.get(self.facts["dtype"]),
                "activated_points_lost": points_lost(points),
                "lora_vs_trainer_by_task": times(LORA),
                "activated_vs_trainer_by_task": times(COLD),
                "activated_warm_vs_trainer_by_task": times(WARM),
            }
        )

    def _timing(
        self, material: Material, results: dict[str, Measured], rate: dict[str, float | None]
    ) -> tuple[str, list[str], list[list[str]]]:
        """Title, header and lines of the table of one task."""
        lines: list[list[str]] = []
        trainer = rate[Variant(TRAINER, material).key]
        for key, result in results.items():
            variant = self.variants[key]
            if variant.material is not material:
                continue
            memory = self.memory.get(PROCESS[variant.name]) if result.rounds else None
            lines.append(
                [
                    variant.name,
                    number(rate[key], 0),
                    number(ratio(rate[key], trainer)),
                    megabytes(memory),
                    number(self.losses.get(key), 4),
                    str(len(result.rounds)),
                    result.reason,
                ]
            )
        before = number(self.losses.get(f"{material.task}, base"), 4)
        title = (
            f"Training: {material.task}, {self.count} examples, {material.tokens} tokens, "
            f"{len(material.batches)} steps an epoch, rank {self.recipe['rank']}, {self.facts['dtype']}; "
            f"held-out NLL of the base {before}"
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
        return title, header, lines


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
