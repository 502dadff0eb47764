"""Carrying customizations to new base revisions by the port ladder: what it saves, what it loses, what it
flips, against doing nothing, copying, retraining in full, in half, and as briefly from scratch.

    python -m benchmarks.migration --quick

The revisions are those of `examples/base_revisions`: `minor` (all weights moved), `shapes` (layers removed),
`family` (another architecture and tokenizer). Everything runs through the functions that the assets call, in
an artifact store of its own. Each cell (task, seed, revision) is kept when it is done: a run that was ended
goes on where it was, also within a training. Wall times are only as good as the machine is quiet.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from benchmarks.common import Options, Unavailable, number, options, parser, print_json, say, start, table
from benchmarks.migration_tasks import MARGIN, NEW, OLD, MigrationTask, migration_tasks
from examples.base_revisions.revisions import Revision, make
from ml_assets.adapters.ladder import LADDER_VERSION, climb
from ml_assets.adapters.port import PORT_VERSION, SCRATCH, Port
from ml_assets.adapters.prompted import PROMPTED_VERSION
from ml_assets.adapters.rungs import Climb, RungResult
from ml_assets.adapters.train import AdapterInputs, open_inputs, train_adapter
from ml_assets.artifacts import (
    ArtifactRef,
    ArtifactStore,
    canonical_json,
    read_json,
    sha256_bytes,
    write_atomic,
)
from ml_assets.base_models.build import build_base
from ml_assets.base_models.register import current_revision
from ml_assets.datasets.build import build_dataset
from ml_assets.eval_reports.build import REPORT_VERSION, BuiltReport, Champion, build_report
from ml_assets.eval_reports.gate import decide, is_sampled
from ml_assets.eval_reports.metrics import metric_name
from ml_assets.eval_reports.statistics import mean_bounds
from ml_assets.settings import Settings
from ml_assets.spec import BaseFamily, CustomizationSpec, DirectoryBase, EvaluationSpec, GateSpec

CELL_VERSION = "1"
"""Raise when the same arguments would give other cells."""
FIRST_VERSIONS = {"port": "2", "prompted": "1", "training": "3"}
"""Those with which cells were first made; they are not in the names of these."""
CHANGES: tuple[Revision, ...] = ("minor", "shapes", "family")
MIN_GAIN = 0.03
"""The gap recovered is counted where the full retrain gains so much over the bare new base."""
EQUAL = 0.02
"""Margin of 'equal quality': paired non-inferiority to the full retrain."""
PLANTED = 0.03
QUICK_SECONDS = 15 * 60 - 20
PORTED, NONE, COPY, FULL = "port ladder", "no adapter", "direct copy", "full retrain"
HALF, SAME = "half retrain", "random start, same steps"
BASELINES = (NONE, COPY, SAME, HALF, FULL)


@dataclass(frozen=True)
class Size:
    """Rows of a task, and how many of them at most are evaluation rows."""

    rows: int
    evaluation: int


def main() -> None:
    tasks = migration_tasks()
    arguments = parser(str(__doc__).split("\n\n")[0])
    arguments.add_argument("--tasks", nargs="+", choices=list(tasks), help="default all, with --quick one")
    arguments.add_argument("--seeds", type=int, help="how many; default 3, with --quick 1")
    arguments.add_argument("--revisions", nargs="+", choices=CHANGES, default=list(CHANGES))
    arguments.add_argument("--rows", type=int, help="of a task; default 1500, with --quick 360")
    arguments.add_argument("--trials", type=int, help="planted regressions; default 1000, with --quick 200")
    given = arguments.parse_args()
    chosen = options(given)
    names = given.tasks or (["news_topics"] if chosen.quick else list(tasks))
    rows = given.rows or (360 if chosen.quick else 1500)
    bench = Bench(chosen, Size(rows, rows // (3 if chosen.quick else 5)))
    trials = given.trials or (200 if chosen.quick else 1000)
    if trials < 1:
        raise Unavailable(f"--trials {trials}: expected 1 or more")
    try:
        for name in names:
            tasks[name].spec(bench.folder, 0, rows, bench.size.evaluation)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise Unavailable(f"--rows {rows} give {bench.size.evaluation} evaluation rows: {reason}") from error
    worlds = [world for world in WORLDS if not chosen.quick or (world.usual and not world.graded)]
    parts = {"trials": trials, "worlds": [asdict(world) for world in worlds]}
    gate = bench.remembered("gate", parts, lambda: planted_regressions(trials, worlds))
    like_cells = [world for world in CELL_WORLDS if not chosen.quick or world.rows == CELL_ROWS[0]]
    parts = {"trials": trials, "worlds": [asdict(world) for world in like_cells]}
    with_margin = bench.remembered(
        "gate_cells", parts, lambda: planted_regressions(trials, like_cells, MARGIN)
    )
    gate = {
        "false_promotion": gate["false_promotion"],
        "false_promotion_cells": with_margin["false_promotion"],
        "worlds": gate["worlds"] + with_margin["worlds"],
    }
    wanted = [
        (tasks[name], seed, revision)
        for seed in range(given.seeds or (1 if chosen.quick else 3))
        for name in names
        for revision in given.revisions
    ]
    cells, took = [], 0.0
    for task, seed, revision in wanted:
        if chosen.quick and cells and time.monotonic() - chosen.started + took > QUICK_SECONDS:
            say(f"{task.name}, seed {seed}, {revision}: left out, no time")
            continue
        began = time.monotonic()
        cells.append(bench.cell(task, seed, revision))
        took = max(took, time.monotonic() - began)
    report(cells, gate)


# -- cells ---------------------------------------------------------------------------------------------


class Bench:
    """A store with the bases, and the cells that are done."""

    def __init__(self, chosen: Options, size: Size, made: Callable[[Revision], Path] | None = None):
        self.folder = chosen.cache / "migration"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.size = size
        # revisions and downloads are shared with the rest of the deployment
        self.shared = Settings.from_env()
        self.settings = replace(self.shared, home=self.folder)
        self.store = ArtifactStore(str(self.folder / "artifacts"), self.folder / "cache")
        self._made = made or (lambda revision: make(revision, self.shared, log=say).directory)
        self._bases: dict[str, ArtifactRef] = {}

    def remembered(
        self, kind: str, parts: Mapping[str, Any], find: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What `find` gave for the same parts, now or in an earlier run."""
        code: list[Any] = [CELL_VERSION, LADDER_VERSION, REPORT_VERSION]
        if (beneath := _versions_beneath()) != FIRST_VERSIONS:
            code.append(beneath)
        key = sha256_bytes(canonical_json({"kind": kind, "code": code, **parts}))
        path = self.folder / "cells" / f"{kind}-{key[:16]}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(find(), ensure_ascii=False, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
        return json.loads(text)

    def base(self, revision: Revision) -> ArtifactRef:
        """The artifact of a revision, which is made the first time."""
        if revision not in self._bases:
            source = DirectoryBase(kind="directory", path=str(self._made(revision)))
            family = BaseFamily(name=NEW if revision == "family" else OLD, source=source)
            key = current_revision(family, self.folder, self.settings)
            built = build_base(key, [family], self.folder, self.settings, self.store, log=say)
            self._bases[revision] = built.ref
        return self._bases[revision]

    def cell(self, task: MigrationTask, seed: int, revision: Revision) -> dict[str, Any]:
        from ml_assets.engine import hardware

        old, new = self.base("original"), self.base(revision)
        spec, dataset = self._customization(task, seed)
        parts = {
            "spec": spec.model_dump(mode="json", exclude={"source"}),
            "dataset": dataset.digest,
            "bases": [old.digest, new.digest],
            "compute": hardware.hardware_class(self.settings.home),
        }
        say(f"{task.name}, seed {seed}, {revision}")
        return self.remembered(
            f"{task.name}-{seed}-{revision}",
            parts,
            lambda: (
                {"task": task.name, "seed": seed, "revision": revision, "generative": task.generative}
                | Cell(self, spec, dataset, old, new).measure()
            ),
        )

    def _customization(self, task: MigrationTask, seed: int) -> tuple[CustomizationSpec, ArtifactRef]:
        file = self.folder / "rows" / f"{task.name}-{seed}-{self.size.rows}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        found = task.rows(self.size.rows, seed)
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in found)
        write_atomic(file, text.encode())
        spec = task.spec(file, seed, self.size.rows, self.size.evaluation)
        return spec, build_dataset(spec, self.folder, self.settings, self.store).ref


def _versions_beneath() -> dict[str, str]:
    """Of what the ladder uses."""
    from ml_assets.engine.training import TRAINING_VERSION

    return {"port": PORT_VERSION, "prompted": PROMPTED_VERSION, "training": TRAINING_VERSION}


@dataclass
class Cell:
    """One customization on its way to one base."""

    bench: Bench
    spec: CustomizationSpec
    dataset: ArtifactRef
    old: ArtifactRef
    new: ArtifactRef

    def measure(self) -> dict[str, Any]:
        """Champion on the old base; climb; then the baselines, which the climb must not find done.

        `scores`: {variant: {row: score}} on the frozen rows; `right`: the same of the decisions right or
        wrong; `seconds`: of the variants' trainings; `climb`: what the ladder recorded.
        """
        store, home = self.bench.store, self.bench.settings.home
        before = open_inputs(self.spec, store, self.old, self.dataset)
        champion = Champion(self._train("champion", before).ref, self.old)
        began = time.monotonic()
        climbed = climb(
            self.spec,
            self.bench.folder,
            store,
            home,
            base_model=self.new,
            dataset=self.dataset,
            champion=champion,
            tell=say,
        )
        say(f"climbed in {time.monotonic() - began:.0f} s")
        inputs = open_inputs(self.spec, store, self.new, self.dataset)
        full = self._train(FULL, inputs)
        variants = {PORTED: climbed.adapter.ref, FULL: full.ref}
        seconds = {FULL: full.record["seconds"]}
        steps = read_json(store.open(full.ref) / "manifest.json")["steps"]
        for name, made in self._baselines(inputs, champion, climbed.climb, steps).items():
            try:
                trained = self._train(name, made)
            except ValueError as error:  # such as a copy that does not fit
                say(f"{name}: {error}")
                continue
            variants[name], seconds[name] = trained.ref, trained.record["seconds"]
        reports = {name: self._report(ref, champion) for name, ref in variants.items()}
        return {
            "climb": asdict(climbed.climb),
            "seconds": seconds,
            **self._rows(reports),
        }

    def _baselines(
        self, inputs: AdapterInputs, champion: Champion, done: Climb, steps: int
    ) -> dict[str, AdapterInputs]:
        """What else can be done with less than the `steps` of a full training."""
        recipe = self.spec.adapter.model_copy(update={"epochs": None, "steps": max(1, steps // 2)})
        # as many steps as the ladder's own short trainings had, all of them on a fresh adapter
        short = max((rung.steps for rung in done.rungs if rung.rung in ("tune", "distil")), default=0)
        share = short / steps if short else self.spec.migration.tune_share

        def port(rung: Literal["copy", "tune"], begin: str, share: float) -> AdapterInputs:
            held = self.spec.migration.validation_share
            return replace(inputs, port=Port(rung, begin, champion.adapter, self.old, share, held))

        return {
            HALF: replace(inputs, spec=self.spec.model_copy(update={"adapter": recipe})),
            SAME: port("tune", SCRATCH, max(share, 1 / steps)),
            COPY: port("copy", "copy", 0.0),
        }

    def _train(self, name: str, inputs: AdapterInputs) -> Any:
        began = time.monotonic()
        trained = train_adapter(inputs, self.bench.store, self.bench.settings.home)
        say(f"{name}: {'known' if trained.reused else f'{time.monotonic() - began:.0f} s'}")
        return trained

    def _report(self, adapter: ArtifactRef, champion: Champion) -> BuiltReport:
        return build_report(
            self.spec,
            self.bench.folder,
            self.bench.store,
            self.bench.settings.home,
            adapter=adapter,
            dataset=self.dataset,
            base_model=self.new,
            champion=champion,
        )

    def _rows(self, reports: Mapping[str, BuiltReport]) -> dict[str, Any]:
        metric = metric_name(self.spec.evaluation.resolved_metrics()[0])
        scores: dict[str, dict[str, float]] = {}
        right: dict[str, dict[str, bool]] = {}
        means: dict[str, float] = {}
        for name, built in reports.items():
            text = (built.directory / "rows.jsonl").read_text(encoding="utf-8")
            for line in (json.loads(one) for one in text.split("\n") if one):
                arm = name if line["arm"] == "adapter" else line["arm"]
                if is_sampled(line):
                    scores.setdefault(arm, {})[line["row"]] = line["scores"][metric]
                    right.setdefault(arm, {})[line["row"]] = bool(line["right"])
        for arm in ("zero_shot", "few_shot"):
            if arm in scores:
                means[arm] = float(np.mean(list(scores[arm].values())))
        bare = max(means, key=means.__getitem__)
        scores[NONE], right[NONE] = scores[bare], right[bare]
        return {"metric": metric, "scores": scores, "right": right}


# -- figures -------------------------------------------------------------------------------------------


def mean(cell: Mapping[str, Any], name: str) -> float | None:
    """Mean of the deciding metric of a variant, 0 to 1."""
    found = cell["scores"].get(name)
    return float(np.mean(list(found.values()))) if found else None


def full_cost(cell: Mapping[str, Any]) -> float:
    """Device seconds of a full retrain and its evaluation: its training as it was measured, and the first
    look at the frozen rows, which pays for all arms of a report, without the ladder's own questions."""
    done = Climb.from_json(cell["climb"])
    trained = next((r.training_seconds for r in done.rungs if r.rung == "full" and r.training_seconds), None)
    looks = [rung for rung in done.rungs if rung.looks]
    evaluation = looks[0].evaluation_seconds - looks[0].screen_seconds if looks else 0.0
    return (cell["seconds"][FULL] if trained is None else trained) + evaluation


def spent(cell: Mapping[str, Any]) -> float:
    """Device seconds of all rungs that were tried and of their evaluations, failed ones included."""
    return sum(rung["training_seconds"] + rung["evaluation_seconds"] for rung in cell["climb"]["rungs"])


def saved(cell: Mapping[str, Any]) -> float:
    """S = 1 - (all rungs and their evaluations) / (a full retrain and its evaluation)."""
    return 1 - spent(cell) / full_cost(cell)


def recovered(cell: Mapping[str, Any], name: str = PORTED) -> float | None:
    """GR = (ported - new base) / (full retrain - new base); None where the full retrain gains too little, or
    there is no such variant."""
    bare, full, found = mean(cell, NONE), mean(cell, FULL), mean(cell, name)
    assert bare is not None and full is not None
    if full - bare < MIN_GAIN or found is None:
        return None
    return (found - bare) / (full - bare)


def flips(cell: Mapping[str, Any], name: str) -> int:
    """Rows that the champion had right on its own base and the variant has wrong on the new one."""
    old, new = cell["right"]["champion"], cell["right"][name]
    return sum(old[row] and not new[row] for row in new if row in old)


def equality(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Port ladder minus full retrain on the same rows, over all cells, in points: the mean and its one-sided
    95% bound from below. Seeds of a task share what is hard about it: each task and seed is a cluster where
    there are at least eight, else each row is on its own."""
    differences, clusters = [], []
    for cell in cells:
        full = cell["scores"][FULL]
        for row, score in cell["scores"][PORTED].items():
            differences.append(score - full[row])
            clusters.append(f"{cell['task']} {cell['seed']}")
    if not differences:
        return {"difference": None, "lower": None, "rows": 0}
    grouped = clusters if len(set(clusters)) >= 8 else None
    lower, _ = mean_bounds(differences, -1.0, 1.0, alpha=0.05, clusters=grouped)
    return {
        "difference": 100 * float(np.mean(differences)),
        "lower": 100 * lower,
        "rows": len(differences),
        "equal": lower > -EQUAL,
    }


def average(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return round(float(np.mean(found)), 3) if found else None


def figures(cells: Sequence[Mapping[str, Any]], gate: Mapping[str, Any]) -> dict[str, Any]:
    """The last line; what was not measured is null."""

    def of(revision: str) -> list[Mapping[str, Any]]:
        return [cell for cell in cells if cell["revision"] == revision]

    ported = sum(flips(cell, PORTED) for cell in cells)
    naive = sum(flips(cell, FULL) for cell in cells)
    return {
        "saved_minor": average(map(saved, of("minor"))),
        "gap_recovered_minor": average(map(recovered, of("minor"))),
        "saved_shapes": average(map(saved, of("shapes"))),
        "gap_recovered_shapes": average(map(recovered, of("shapes"))),
        "cost_ratio_cross_family": max(
            (round(spent(cell) / full_cost(cell), 3) for cell in of("family")), default=None
        ),
        "flips_vs_naive": round(1 - ported / naive, 3) if naive else None,
        "false_promotion": gate["false_promotion"],
        "false_promotion_cells": gate["false_promotion_cells"],
        "cells_accepted": average(
            float(Climb.from_json(cell["climb"]).accepted is not None) for cell in cells
        ),
    }


# -- the gate, simulated -------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What is simulated: `rows` evaluation rows, a champion that is right on a share `level` of them, and
    candidates of which a share `churn` of the rows changes beyond the planted difference; `looks` of them,
    one after the other, until one is promoted. `margin` is the gate's."""

    rows: int
    level: float
    churn: float
    looks: int
    margin: float
    graded: bool

    @property
    def usual(self) -> bool:
        """With the gate's default margin."""
        return self.margin == GateSpec().margin


WORLDS = tuple(
    World(rows, level, churn, looks, margin, graded)
    for graded, sizes, margins in (
        (False, (200, 800), (GateSpec().margin, PLANTED)),
        (True, (200,), (GateSpec().margin,)),
    )
    for margin in margins
    for looks in (1, 4)
    for rows in sizes
    for level, churn in ((0.9, 0.04), (0.7, 0.1))
)
"""At a margin of as much as is planted, about the gate's alpha is promoted; at a smaller one, less."""
CELL_ROWS = (200, 300)
CELL_WORLDS = tuple(
    World(rows, level, churn, 4, MARGIN, graded=False)
    for rows in CELL_ROWS
    for level, churn in ((0.9, 0.04), (0.7, 0.1))
)
"""As the cells decide, with a margin that is wider than what is planted: within it, 3 points worse are good
enough, so what is promoted here is no mistake of the gate but what the margin allows."""
RIGHT, WRONG = 0.8, 0.2
"""About what graded answers score."""


def planted_regressions(
    trials: int, simulated: Sequence[World], margin: float = GateSpec().margin
) -> dict[str, Any]:
    """How often the gate promotes a candidate that is 3 points worse, and one that is as good; and whether it
    says how many rows it needs when it can't tell. Shares of trials in each world; `false_promotion` is that
    of the worst world with `margin`."""
    worlds: list[dict[str, Any]] = []
    for number_of, world in enumerate(simulated):
        generator = np.random.default_rng(number_of)
        count = max(1, trials // 10) if world.graded else trials  # the bootstrap takes its time
        worse = [_ladder(world, -PLANTED, generator) for _ in range(count)]
        equal = [_ladder(world, 0.0, generator) for _ in range(max(1, count // 4))]
        doubts = [d for found in (worse, equal) for trial in found for d in trial if d.verdict == "undecided"]
        worlds.append(
            asdict(world)
            | {
                "trials": count,
                "promoted_worse": _promoted(worse),
                "promoted_equal": _promoted(equal),
                "undecided_says_rows": float(np.mean([d.needs_rows is not None for d in doubts]))
                if doubts
                else None,
            }
        )
    say(f"{len(worlds)} simulations of the gate")
    return {
        "false_promotion": max(found["promoted_worse"] for found in worlds if found["margin"] == margin),
        "worlds": worlds,
    }


def _promoted(trials: Sequence[Sequence[Any]]) -> float:
    return float(np.mean([trial[-1].verdict == "promote" for trial in trials]))


def _ladder(world: World, difference: float, generator: np.random.Generator) -> list[Any]:
    """The gate's decisions on candidates until one is promoted."""
    evaluation = EvaluationSpec.model_validate(
        {
            "task": "text" if world.graded else "classification",
            "metrics": ["chrf" if world.graded else "accuracy"],
            "max_rows": None,
            "gate": {"margin": world.margin, "max_negative_flips": 0.5},
        }
    )
    champion = generator.random(world.rows) < world.level
    decisions: list[Any] = []
    for look in range(1, world.looks + 1):
        candidate = _candidate(champion, world, difference, generator)
        noise = generator.normal(0, 0.1, (2, world.rows)) if world.graded else np.zeros((2, world.rows))
        lines = [
            _lines(arm, flags, noise[i], world.graded)
            for i, (arm, flags) in enumerate((("adapter", candidate), ("champion", champion)))
        ]
        decisions.append(
            decide(lines[0], lines[1], evaluation, against="champion", looks=world.looks, look=look)
        )
        if decisions[-1].verdict == "promote":
            break
    return decisions


def _candidate(
    champion: np.ndarray, world: World, difference: float, generator: np.random.Generator
) -> np.ndarray:
    """Right answers of a candidate whose expected score differs by `difference`."""
    if world.graded:
        difference /= RIGHT - WRONG
    losses = (world.churn / 2 - min(difference, 0.0)) / world.level
    gains = world.churn / 2 / (1 - world.level)
    draw = generator.random(world.rows)
    return np.where(champion, draw >= losses, draw < gains)


def _lines(arm: str, right: np.ndarray, noise: np.ndarray, graded: bool) -> list[dict[str, Any]]:
    scores = np.clip(np.where(right, RIGHT, WRONG) + noise, 0, 1) if graded else right.astype(float)
    metric = "chrf" if graded else "accuracy"
    return [
        {
            "row": f"{i:05}",
            "arm": arm,
            "expected": "",
            "answer": "",
            "scores": {metric: float(scores[i])},
            "right": bool(right[i]),
            "refused": False,
            "segments": {},
            "cluster": None,
            "must_pass": False,
            "sampled": True,
            "prompt_tokens": 1,
            "answer_tokens": 1,
        }
        for i in range(len(right))
    ]


# -- printing ------------------------------------------------------------------------------------------


def report(cells: Sequence[Mapping[str, Any]], gate: Mapping[str, Any]) -> None:
    for revision in CHANGES:
        found = [cell for cell in cells if cell["revision"] == revision]
        if found:
            _print_cells(revision, found)
    _print_gate(gate)
    print_json(figures(cells, gate))


def _print_cells(revision: str, cells: Sequence[Mapping[str, Any]]) -> None:
    def percent(value: float | None) -> str:
        return "-" if value is None else number(100 * value, 1)

    lines = []
    for cell in cells:
        done = Climb.from_json(cell["climb"])
        lines.append(
            [
                f"{cell['task']} {cell['seed']}",
                _ended(done),
                number(spent(cell), 0),
                number(full_cost(cell), 0),
                number(saved(cell)),
                percent(mean(cell, "champion")),
                percent(mean(cell, PORTED)),
                *(percent(mean(cell, name)) for name in BASELINES),
                number(recovered(cell)),
                f"{flips(cell, PORTED)}/{flips(cell, FULL)}",
            ]
        )
    header = [
        "task, seed",
        "ended at",
        "seconds",
        "full's",
        "S",
        "champion",
        PORTED,
        *BASELINES,
        "GR",
        "flips",
    ]
    print(table(f"Revision {revision}: points of the deciding metric, device seconds", header, lines))
    gaps = ", ".join(
        f"{name} {number(average(recovered(c, name) for c in cells))}" for name in (COPY, SAME, HALF)
    )
    equal = equality(cells)
    print(
        f"\nGap recovered by others: {gaps}. Port ladder minus full retrain: {number(equal['difference'])} "
        f"points, at least {number(equal['lower'])} on {equal['rows']} rows: equal quality within 2 points "
        f"is {'shown' if equal['equal'] else 'not shown'}."
    )


def _ended(done: Climb) -> str:
    accepted: RungResult | None = done.accepted
    shown = [rung for rung in done.rungs if rung.looks]
    return accepted.rung if accepted else f"none ({shown[-1].verdict})" if shown else "none"


def _print_gate(gate: Mapping[str, Any]) -> None:
    lines = [
        [
            f"{world['rows']} rows, {'graded' if world['graded'] else 'right/wrong'}",
            f"{world['level']:.0%}",
            f"{world['churn']:.0%}",
            str(world["looks"]),
            f"{world['margin']:.0%}",
            f"{world['promoted_worse']:.1%}",
            f"{world['promoted_equal']:.1%}",
            "-" if world["undecided_says_rows"] is None else f"{world['undecided_says_rows']:.0%}",
        ]
        for world in gate["worlds"]
    ]
    header = [
        "evaluation",
        "champion",
        "churn",
        "looks",
        "margin",
        "3 points worse",
        "as good",
        "undecided with rows",
    ]
    print(table("The gate on simulated candidates: share of trials promoted", header, lines))


if __name__ == "__main__":
    start(main)
