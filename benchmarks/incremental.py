"""Incremental updates against a retrain on everything: compute saved, points lost on old rows and gained on
new ones, and what replay buys.

    python -m benchmarks.incremental --quick

A champion is trained on commands of an old release of `home-assistant-intents` in one language; then rows of
a later release come, with other wordings, new intents and a second language. Everything runs through the
functions that the assets call, in an artifact store of its own.
"""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Unavailable, cached_base, number, options, parser, print_json, say, start, table
from benchmarks.tasks import customization
from examples.home_commands.source import same_call, utterances
from ml_assets.adapters.incremental import plan_update, update_recipe
from ml_assets.adapters.train import AdapterInputs, TrainedAdapter, train_adapter
from ml_assets.artifacts import ArtifactStore, read_json
from ml_assets.datasets.build import BuiltDataset, build_dataset
from ml_assets.datasets.snapshot import load_rows
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec

OLD, NEW = "2023.9.22", "2026.10.27"
NO_REPLAY = "update, no replay"
UPDATE, RETRAIN, CHAMPION = "update, replay", "retrain on everything", "champion"


def main() -> None:
    arguments = parser(str(__doc__).split("\n\n")[0])
    arguments.add_argument("--rows", type=int, help="of the old release; default 2500, with --quick 800")
    arguments.add_argument("--new-rows", type=int, help="of the new release; default a tenth of --rows")
    arguments.add_argument("--held-out", type=int, default=150, help="more rows of the new release to judge")
    arguments.add_argument(
        "--held-out-old",
        type=int,
        help="more rows of the old release to judge; default 600, with --quick 150",
    )
    arguments.add_argument("--seed", type=int, default=0, help="of the rows and of the trainings")
    given = arguments.parse_args()
    chosen = options(given)
    rows = given.rows or (800 if chosen.quick else 2500)
    old = (150 if chosen.quick else 600) if given.held_out_old is None else given.held_out_old
    held = {"old": old, "new": given.held_out}
    base = cached_base(chosen.cache)
    with tempfile.TemporaryDirectory(dir=chosen.cache) as folder:
        run = Run(Path(folder), base, rows, given.new_rows or rows // 10, held, given.seed)
        report(run, run.measure())


class Run:
    """The champion, its successors and what they answer."""

    def __init__(
        self, folder: Path, base: Path, rows: int, new_rows: int, held_out: Mapping[str, int], seed: int
    ):
        self.folder, self.base, self.seed, self.held_out = folder, base, seed, held_out
        self.counts = {"old": rows, "new": new_rows}
        self.settings = replace(Settings.from_env(), home=folder)
        self.store = ArtifactStore(str(folder / "artifacts"), folder / "cache")
        self.spec = self._spec()
        self.seconds: dict[str, float] = {}
        self.trained_rows: dict[str, int] = {}

    def _spec(self) -> CustomizationSpec:
        declared = customization("home_commands")
        source = {"kind": "jsonl", "path": str(self.folder / "rows.jsonl")}
        content = declared.model_dump(mode="json") | {"source": source}
        recipe = declared.adapter.model_copy(update={"seed": self.seed})
        evaluation = content["evaluation"] | {"max_rows": None}
        return CustomizationSpec.model_validate(
            content | {"adapter": recipe.model_dump(exclude_none=True), "evaluation": evaluation}
        )

    def dataset(self, rows: Sequence[Mapping[str, str]]) -> BuiltDataset:
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        (self.folder / "rows.jsonl").write_text(text, encoding="utf-8")
        return build_dataset(self.spec, self.folder, self.settings, self.store)

    def measure(self) -> dict[str, Any]:
        """Train, in turn: the champion, the update, the update without replay, the retrain. Then evaluate."""
        held, counts = self.held_out, self.counts
        said = utterances(OLD, counts["old"] + held["old"] + counts["new"], self.seed, languages=["en"])
        languages = {"en": 0.5, "de": 0.5}
        found = utterances(NEW, counts["new"] + 2 * held["new"], self.seed + 1, languages=languages)
        old, new = said[: counts["old"]], found[: counts["new"]]
        judged_old = unknown(said[counts["old"] :], new, held["old"])
        judged_new = unknown(found[counts["new"] :], [*old, *judged_old], held["new"])
        self.judged = [*_named("old", judged_old), *_named("new", judged_new)]
        before, after = self.dataset(old), self.dataset([*old, *new])
        champion_inputs, inputs = self._inputs(before), self._inputs(after)
        champion = self._train(CHAMPION, champion_inputs)
        policy = self.spec.maintenance
        adapters = {CHAMPION: champion}
        for name, replay in ((UPDATE, policy.replay), (NO_REPLAY, 0.0)):
            slow = replace(inputs, spec=update_recipe(self.spec))
            shape = policy.update_layers, policy.update_weight
            update = plan_update(slow, self.store, champion.ref, replay, *shape)
            adapters[name] = self._train(name, update)
        adapters[RETRAIN] = self._train(RETRAIN, inputs)
        return self._answers(adapters, before, after)

    def _inputs(self, dataset: BuiltDataset) -> AdapterInputs:
        manifest = read_json(self.base / "manifest.json")
        directory = self.store.open(dataset.ref)
        return AdapterInputs(self.spec, self.base, manifest, directory, dataset.ref.digest)

    def _train(self, name: str, inputs: AdapterInputs) -> TrainedAdapter:
        rows = inputs.update.rows if inputs.update else load_rows(inputs.dataset_directory, "train")
        self.trained_rows[name] = len(rows)
        start = time.monotonic()
        trained = train_adapter(inputs, self.store, self.settings.home)
        self.seconds[name] = trained.record["seconds"]
        say(f"{name}: {len(rows)} rows in {time.monotonic() - start:.0f} s")
        return trained

    def _answers(
        self, adapters: Mapping[str, TrainedAdapter], before: BuiltDataset, after: BuiltDataset
    ) -> dict[str, Any]:
        """{variant: {"old"|"changed"|"new": {row: score}}} by the deciding metric, on the evaluation rows
        that the champion's dataset had and on those that came later, and on the rows of both releases that
        nobody trains on. *changed* are old ones that the later release gives another call: an update is to
        answer them otherwise."""
        from ml_assets.engine import hardware
        from ml_assets.engine.loading import load_base
        from ml_assets.eval_reports.runner import Arm, evaluate

        known = [
            *load_rows(self.store.open(before.ref), "evaluation"),
            *(row for row in self.judged if row["_row"].startswith("old")),
        ]
        ages = {
            row["_row"]: "changed" if same is False else "old"
            for row, same in zip(known, same_call(known, NEW), strict=True)
        }
        directory = self.store.open(after.ref)
        rows: list[Any] = [*load_rows(directory, "evaluation"), *self.judged]
        train = load_rows(directory, "train")
        base = load_base(self.base, hardware.compute_dtype(self.settings.home))
        metric = str(self.spec.evaluation.resolved_metrics()[0])
        found: dict[str, Any] = {}
        for name, adapter in adapters.items():
            base.attach(name, self.store.open(adapter.ref))
            start = time.monotonic()
            arms = [Arm("adapter", name)]
            lines, _ = evaluate(base, self.spec.prompt, self.spec.evaluation, rows, train, arms)
            say(f"{name}: {len(lines)} answers in {time.monotonic() - start:.0f} s")
            found[name] = {"old": {}, "changed": {}, "new": {}}
            for line in lines:
                age = ages.get(line["row"], "new")
                found[name][age][line["row"]] = line["scores"][metric]
        return found


def _named(age: str, rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [row | {"_row": f"{age} held-out {i:04}"} for i, row in enumerate(rows)]


def unknown(
    rows: Sequence[dict[str, str]], known: Sequence[Mapping[str, str]], count: int
) -> list[dict[str, str]]:
    """The first `count` rows whose utterance nobody trains on: releases share some sentences."""
    seen = {row["utterance"].casefold() for row in known}
    found = [row for row in rows if row["utterance"].casefold() not in seen]
    if len(found) < count:
        raise Unavailable(f"{count} rows that nobody trains on asked for, but there are {len(found)}")
    return found[:count]


def points(found: Mapping[str, Any], name: str, age: str) -> float:
    """Mean of the deciding metric, in points of 100; of no rows 0."""
    scores = list(found[name][age].values())
    return 100 * float(np.mean(scores)) if scores else 0.0


def change(found: Mapping[str, Any], name: str, age: str) -> tuple[float, float]:
    """Points that a variant is above the champion on the same rows, and the standard error of that."""
    rows = found[CHAMPION][age]
    differences = 100 * np.array([found[name][age][row] - score for row, score in rows.items()])
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))


def report(run: Run, found: Mapping[str, Any]) -> None:
    policy = run.spec.maintenance
    lines = []
    for name in found:
        cells = [name, str(run.trained_rows[name]), number(run.seconds[name], 1)]
        cells.append("-" if name == CHAMPION else number(1 - run.seconds[name] / run.seconds[RETRAIN]))
        for age in ("old", "new"):
            cells.append(number(points(found, name, age), 1))
            moved, error = change(found, name, age)
            cells.append("-" if name == CHAMPION else f"{moved:+.1f} ± {error:.1f}")
        lines.append(cells)
    counts = {age: len(found[CHAMPION][age]) for age in ("old", "new")}
    print(
        table(
            f"Incremental updates: {run.counts['old']} rows of {OLD} (en), then {run.counts['new']} of {NEW} "
            f"(en, de); {policy.replay:.0%} replay, {policy.update_epochs:g} epochs, learning rate × "
            f"{policy.update_rate:g}, last {policy.update_layers:.0%} of the layers, weight "
            f"{policy.update_weight:g}; "
            f"judged on {counts['old']} old and {counts['new']} new rows",
            ["variant", "rows", "seconds", "saved", "old rows", "change", "new rows", "change"],
            lines,
        )
    )
    gone = ", ".join(f"{name} {points(found, name, 'changed'):.0f}%" for name in found)
    print(
        f"\n{len(found[CHAMPION]['changed'])} more old rows have another call in {NEW}, so they count "
        f"nowhere; answered as in {OLD}: {gone}."
    )
    print_json(
        {
            "compute_saved": round(1 - run.seconds[UPDATE] / run.seconds[RETRAIN], 3),
            "points_lost_old": round(-change(found, UPDATE, "old")[0], 2),
            "points_gained_new": round(change(found, UPDATE, "new")[0], 2),
            "points_lost_old_no_replay": round(-change(found, NO_REPLAY, "old")[0], 2),
            "points_gained_new_no_replay": round(change(found, NO_REPLAY, "new")[0], 2),
            "points_gained_new_retrain": round(change(found, RETRAIN, "new")[0], 2),
            "points_lost_old_retrain": round(-change(found, RETRAIN, "old")[0], 2),
        }
    )


if __name__ == "__main__":
    start(main)
