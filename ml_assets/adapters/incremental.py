"""Incremental updates: from the champion's weights, on rows that it has not seen, with some of the old ones
again so that those are not forgotten (rehearsal: Robins 1995, Connection Science 7; with a sample of all that
came before: Rolnick et al. 2019, arXiv 1811.11682)."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_assets.adapters.recipe import resolve_targets
from ml_assets.adapters.train import AdapterInputs
from ml_assets.artifacts import ArtifactRef, ArtifactStore, read_json, sha256_bytes
from ml_assets.datasets.failures import drilled
from ml_assets.datasets.snapshot import load_rows
from ml_assets.engine.examples import is_prompted
from ml_assets.spec import AdapterRecipe, CustomizationSpec, PromptSpec

Row = Mapping[str, Any]

UPDATE_VERSION = "4"
"""Raise when the same inputs would give other rows."""
CHOICES = 16
"""A field of the answers with at most so many different values is a choice that tells kinds of rows apart."""
WARMUP = 0.3
"""Least share of an update's steps in which the learning rate rises."""


class NoUpdate(ValueError):
    """The champion can't be updated on this dataset; the message says why, and what would do instead."""


@dataclass(frozen=True)
class Update:
    """An incremental update. `generation` counts the updates since the last training from scratch; `drilled`
    are failures in production, once more for each time that they are seen again."""

    parent: ArtifactRef
    parent_directory: Path
    generation: int
    replay: float
    layers: float
    weight: float
    new: Sequence[Row]
    replayed: Sequence[Row]
    drilled: Sequence[Row] = ()

    @property
    def rows(self) -> list[Row]:
        """What is trained on, sorted by `_row`."""
        return sorted([*self.new, *self.replayed, *self.drilled], key=lambda row: row["_row"])

    def identity(self) -> dict[str, Any]:
        """What goes into the input key beside the dataset."""
        return {
            "parent": self.parent.digest,
            "replay": self.replay,
            "layers": self.layers,
            "weight": self.weight,
            "version": UPDATE_VERSION,
        }


def plan_update(
    inputs: AdapterInputs,
    store: ArtifactStore,
    parent: ArtifactRef,
    replay: float,
    layers: float,
    weight: float = 1.0,
) -> AdapterInputs:
    """Inputs of an update of `parent` to the dataset of `inputs`: its training rows that the parent was not
    trained on, a share `replay` of those that it was (`sample_old`), and again those that failed in
    production, which the gate holds it to. Of the layers only a share, from the last, changes: less is
    forgotten, and a pass is cheaper (Lee et al. 2019, arXiv 1911.03090). What is given is a mean of the
    champion's weights and of the trained ones, which have this `weight` (Wortsman et al. 2022, arXiv
    2109.01903). The recipe is taken as it is: see `update_recipe`.

    Raises NoUpdate: the parent sits on another base or was trained with another prompt or LoRA shape, or the
    dataset holds no row that is new to it. ArtifactError: an artifact is damaged.
    """
    directory = store.open(parent)
    manifest = read_json(directory / "manifest.json")
    if is_prompted(manifest):
        raise NoUpdate(f"{inputs.spec.name}: the champion is a prompt without weights: train from scratch")
    spec, recipe = inputs.spec, AdapterRecipe(**manifest["recipe"])
    _check_fits(inputs, manifest, recipe)
    before = store.open(ArtifactRef("dataset", manifest["dataset"]))
    seen = {row["_row"] for row in load_rows(before, "train")}
    rows = load_rows(inputs.dataset_directory, "train")
    new = [row for row in rows if row["_row"] not in seen]
    if not new:
        raise NoUpdate(
            f"{spec.name}: dataset {inputs.dataset_digest[:12]} has no training row that adapter "
            f"{parent.digest[:12]} was not trained on: nothing to update"
        )
    old = [row for row in rows if row["_row"] in seen]
    replayed = sample_old(old, spec.evaluation.segments, spec.prompt.target, replay, seed=parent.digest)
    generation = (manifest.get("update") or {}).get("generation", 0) + 1
    spec = spec.model_copy(update={"adapter": spec.adapter.model_copy(update={"kind": recipe.kind})})
    again = drilled(rows, inputs.must_pass)
    update = Update(parent, directory, generation, replay, layers, weight, new, replayed, again)
    return replace(inputs, spec=spec, update=update)


def update_recipe(spec: CustomizationSpec) -> CustomizationSpec:
    """The customization with the recipe of its updates: `maintenance.update_epochs` passes, a lower learning
    rate, and a long warm-up. Adam begins with steps of full size in every weight, and an update has few:
    without the warm-up the first ones undo more of the old adapter than the rest repairs."""
    recipe, policy = spec.adapter, spec.maintenance
    changed = recipe.model_copy(
        update={
            "epochs": policy.update_epochs,
            "steps": None,
            "learning_rate": recipe.learning_rate * policy.update_rate,
            "warmup": max(recipe.warmup, WARMUP),
        }
    )
    return spec.model_copy(update={"adapter": changed})


def _check_fits(inputs: AdapterInputs, parent: Mapping[str, Any], recipe: AdapterRecipe) -> None:
    """A champion's weights are a start only for what it was trained to do, in the shape it has."""
    spec = inputs.spec
    shape = ("rank", "alpha", "dropout")
    differing = [name for name in shape if getattr(recipe, name) != getattr(spec.adapter, name)]
    if spec.adapter.kind not in ("auto", recipe.kind):
        differing.append("kind")
    if sorted(parent["targets"]) != resolve_targets(spec.adapter, inputs.base_manifest):
        differing.append("targets")
    reason = None
    if parent["base_identity"] != inputs.base_manifest["identity"]:
        reason = f"it sits on base {parent['base_revision']}"
    elif PromptSpec(**parent["prompt"]) != spec.prompt:
        reason = "its prompt is another one"
    elif differing:
        reason = f"its recipe differs in {', '.join(differing)}"
    if reason:
        raise NoUpdate(f"{spec.name}: the champion can't be updated, because {reason}: train from scratch")


def sample_old(
    rows: Sequence[Row], segments: Sequence[str], target: str, share: float, seed: str
) -> list[Row]:
    """A share of the rows, the same ones for the same seed. Every kind of row (its values in the segment
    columns and the kind of its answer, `target` filled in) gives rows in proportion to the square root of its
    size (Mahajan et al. 2018, arXiv 1805.00932): what is common is not forgotten soon, what is rare is."""
    kinds = answer_kinds([target.format_map(row) for row in rows])
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row, kind in zip(rows, kinds, strict=True):
        groups[(*(str(row.get(column, "")) for column in segments), kind)].append(row)
    members = [groups[name] for name in sorted(groups)]
    chosen: list[Row] = []
    for group, count in zip(members, _counts([len(group) for group in members], share), strict=True):
        chosen += sorted(group, key=lambda row: sha256_bytes(f"{seed}{row['_row']}".encode()))[:count]
    return chosen


def _counts(sizes: Sequence[int], share: float) -> list[int]:
    """How many of each group: in proportion to the square root of its size, and at most all."""
    if not sizes:
        return []
    left, weight = share * sum(sizes), sum(math.sqrt(size) for size in sizes)
    taken = [0.0] * len(sizes)
    # from the smallest: one that would give more than it has gives all, and the others the rest
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        root = math.sqrt(sizes[i])
        taken[i] = min(float(sizes[i]), left * root / weight)
        left, weight = left - taken[i], weight - root
    counts, owed = [], 0.0
    for size, many in zip(sizes, taken, strict=True):
        owed += many
        counts.append(min(size, round(owed)))
        owed -= counts[-1]
    return counts


def answer_kinds(answers: Sequence[str]) -> list[str]:
    """What kind of answer each is: the answer itself where there are at most CHOICES different ones (labels);
    of a JSON object its fields, with the values of those that have at most CHOICES; "" for any other text."""
    if len(set(answers)) <= CHOICES:
        return list(answers)
    objects = [_object(answer) for answer in answers]
    values: dict[str, set[str]] = defaultdict(set)
    for fields in objects:
        for name, value in fields.items():
            values[name].add(value)
    chosen = {name for name, found in values.items() if len(found) <= CHOICES}
    return [
        json.dumps({name: value if name in chosen else None for name, value in sorted(fields.items())})
        if fields
        else ""
        for fields in objects
    ]


def _object(answer: str) -> dict[str, str]:
    """The fields of a JSON object with their values as JSON; none for another text."""
    try:
        found = json.loads(answer)
    except ValueError:
        return {}
    return (
        {name: json.dumps(found[name], sort_keys=True) for name in found} if isinstance(found, dict) else {}
    )
