"""What a rung of the port ladder trains on and from where, all of it from what its manifest pins.

Of the training rows a part is left out of the short trainings (`split_validation`): by their loss a start is
chosen and a training is stopped. The gate's own rows take no part in any of this.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ml_assets.adapters.recipe import resolve_targets, training_examples
from ml_assets.artifacts import (
    ArtifactError,
    ArtifactRef,
    ArtifactStore,
    canonical_json,
    read_json,
    sha256_bytes,
    write_atomic,
)
from ml_assets.base_models.identity import reading
from ml_assets.datasets.failures import production_failures
from ml_assets.datasets.snapshot import load_rows
from ml_assets.engine.examples import is_prompted
from ml_assets.spec import AdapterRecipe

if TYPE_CHECKING:
    from ml_assets.adapters.train import AdapterInputs
    from ml_assets.engine.loading import Base
    from ml_assets.engine.training import Example, Soft, Stopping

Row = Mapping[str, Any]
PORT_VERSION = "2"
"""Raise when the same inputs would give other starts, rows or answers of the teacher."""

SCRATCH = "scratch"
STARTS = "adapter_starts"

MIN_VALIDATION, MAX_VALIDATION = 8, 96
COMPARED_TEXTS = 24
"""Training rows whose tokens tell how the modules of two bases correspond."""
TEXT_TOKENS = 256
SURE = math.log(2)
"""An answer with a loss (nats) below this is more probable than all others together: it is what greedy
decoding gives, so the row is one that the start has right."""
WRONG_SHARE = 2 / 3
"""Of the rows of a short tune, those that the start gets wrong, as far as there are so many."""
POOL = 1.5
"""So many times the rows of a short tune are looked at to find those that the start gets wrong."""
WARMUP = 0.2
"""Least share of the steps in which the learning rate rises: the first steps must not undo a start."""
RATE = 0.2
"""Of the recipe's learning rate. Adam's first steps have full size in every weight: at the whole rate two
steps from a good start multiplied its validation loss by four, at 0.05 to 0.4 of it five steps halved it."""
TEACHER_TOKENS = 8
TEACHER_WEIGHT = 0.5
"""Of the teacher's probabilities in the loss, where the tokenizers are the same; the rest is the row's own
answer."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Port:
    """How an adapter comes from the champion on another base. `share` is that of a full training's steps,
    `warm` an adapter on the new base to go on from (`start` names its rung then)."""

    rung: Literal["copy", "tune", "distil"]
    start: str
    parent: ArtifactRef
    parent_base: ArtifactRef
    share: float
    validation_share: float
    warm: ArtifactRef | None = None

    def identity(self) -> dict[str, Any]:
        """What goes into the input key beside the dataset, and into the manifest."""
        return {
            "rung": self.rung,
            "start": self.start,
            "parent": self.parent.digest,
            "parent_base": self.parent_base.digest,
            "share": self.share,
            "validation_share": self.validation_share,
            "warm": self.warm.digest if self.warm else None,
            "version": PORT_VERSION,
        }

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> "Port":
        """The port that gave an adapter, from its manifest."""
        port = manifest["port"]
        warm = ArtifactRef("adapter", port["warm"]) if port["warm"] else None
        return cls(
            port["rung"],
            port["start"],
            ArtifactRef("adapter", port["parent"]),
            ArtifactRef("base_model", port["parent_base"]),
            port["share"],
            port["validation_share"],
            warm,
        )


@dataclass(frozen=True)
class Prepared:
    """What a rung trains: `start` is the folder of the weights it begins with (None: fresh ones)."""

    start: Path | None
    examples: "list[Example]"
    recipe: AdapterRecipe
    stopping: "Stopping | None"


@dataclass(frozen=True)
class Starts:
    """The adapters that the champion gives on the new base before any training, as folders by name; none, and
    why, where it gives none."""

    folders: dict[str, Path] = field(default_factory=dict)
    reason: str = ""


def split_validation(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows to judge by), both in the order of `rows`: by the hash of the row, so that
    nothing else decides. At least MIN_VALIDATION where there are twice as many, at most MAX_VALIDATION."""
    count = min(MAX_VALIDATION, max(round(share * len(rows)), MIN_VALIDATION), len(rows) // 2)
    others = [row for row in rows if row.get("_origin") != "feedback"]  # what failed is to be learned
    ordered = sorted(others, key=lambda row: sha256_bytes(f"validation {row['_row']}".encode()))
    held = {row["_row"] for row in ordered[:count]}
    return [row for row in rows if row["_row"] not in held], [row for row in rows if row["_row"] in held]


def full_steps(inputs: "AdapterInputs", examples: "Sequence[Example]") -> int:
    """Optimizer steps of a full training on these examples."""
    from ml_assets.engine.training import plan_batches

    return len(plan_batches([len(example) for example in examples], inputs.spec.adapter))


# -- starts --------------------------------------------------------------------------------------------


def find_starts(
    inputs: "AdapterInputs",
    base: "Base",
    store: ArtifactStore,
    home: Path,
    parent: ArtifactRef,
    parent_base: ArtifactRef,
    reuse: bool = True,
) -> Starts:
    """Starts on `base` (without adapters on it) from the adapter `parent`; made once for the same inputs.

    Raises ArtifactError when the adapter or its base is damaged or gone.
    """
    manifest = read_json(store.open(parent) / "manifest.json")
    if reason := _misfit(inputs, manifest):
        return Starts(reason=reason)
    key = _starts_key(inputs, base, parent, parent_base)
    if reuse and (known := store.recall(STARTS, key)):
        try:
            return _opened(store.open(known[0]))
        except ArtifactError as error:
            _log.warning("copied again, because what was published is damaged: %s", error)
    with store.staging(STARTS) as staging:
        _make_starts(inputs, base, store, home, parent, parent_base, manifest, staging)
        ref = store.publish_directory(STARTS, staging)
    if reuse:
        store.remember(STARTS, key, ref, {})
    return _opened(store.open(ref))


def _opened(directory: Path) -> Starts:
    found = read_json(directory / "starts.json")
    return Starts({name: directory / folder for name, folder in found["starts"].items()}, found["reason"])


def _misfit(inputs: "AdapterInputs", parent: Mapping[str, Any]) -> str | None:
    """Why an adapter's weights are no start for this customization as it is now."""
    spec = inputs.spec
    if is_prompted(parent):
        return "the champion is a prompt without weights"
    recipe = AdapterRecipe(**parent["recipe"])
    differing = [name for name in ("rank", "alpha") if getattr(recipe, name) != getattr(spec.adapter, name)]
    if spec.adapter.kind not in ("auto", recipe.kind):
        differing.append("kind")
    if recipe.targets != spec.adapter.targets:
        differing.append("targets")
    if differing:
        return f"the champion's recipe differs in {', '.join(differing)}"
    return None


def _starts_key(inputs: "AdapterInputs", base: "Base", parent: ArtifactRef, parent_base: ArtifactRef) -> str:
    parts = {
        "version": PORT_VERSION,
        "base": base.manifest["identity"],
        "dtype": str(base.model.dtype),
        "parent": parent.digest,
        "parent_base": parent_base.digest,
        "dataset": inputs.dataset_digest,
        "prompt": inputs.spec.prompt.model_dump(),
        "recipe": inputs.spec.adapter.model_dump(),
    }
    return sha256_bytes(canonical_json(parts))


def _make_starts(
    inputs: "AdapterInputs",
    base: "Base",
    store: ArtifactStore,
    home: Path,
    parent: ArtifactRef,
    parent_base: ArtifactRef,
    manifest: Mapping[str, Any],
    staging: Path,
) -> None:
    from ml_assets.engine.copying import NoStart, fits, read_old, starts
    from ml_assets.engine.lora import IncompatibleAdapter
    from ml_assets.engine.training import save_adapter

    targets = resolve_targets(inputs.spec.adapter, inputs.base_manifest)
    names: dict[str, str] = {}
    reason = ""
    same_tokens = same_tokenizer(inputs.base_directory, store.open(parent_base))
    try:
        with teacher(store, home, parent, parent_base) as old:
            adapter = old.lora.adapters[TEACHER]
            texts: list[list[int]] = []
            if same_tokens and not fits(base, targets, old, adapter):
                rows = load_rows(inputs.dataset_directory, "train")[:COMPARED_TEXTS]
                examples = training_examples(base, inputs.spec.prompt, rows)
                # the end of a row: what comes before is often the same in all of them
                texts = [[*e.prompt, *e.target][-TEXT_TOKENS:] for e in examples]
            known = read_old(old, adapter, texts)
        for name, start in starts(base, targets, adapter, known, texts, inputs.spec.adapter.seed).items():
            names[name] = name.replace(" ", "-")
            start.dropout = inputs.spec.adapter.dropout
            save_adapter(base, start, targets, staging / names[name])
    except (NoStart, IncompatibleAdapter) as error:
        reason = str(error)
    write_atomic(staging / "starts.json", canonical_json({"starts": names, "reason": reason}) + b"\n")


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether two bases (their artifacts' folders) read the same text as the same tokens."""
    ours, theirs = (read_json(folder / "manifest.json") for folder in (one, other))
    if ours["chat_template_sha256"] != theirs["chat_template_sha256"]:
        return False
    # the hash also covers how sequences are padded and cut, which tells nothing about tokens
    return ours["tokenizer_sha256"] == theirs["tokenizer_sha256"] or reading(one) == reading(other)


TEACHER = "teacher"


@contextlib.contextmanager
def teacher(
    store: ArtifactStore, home: Path, parent: ArtifactRef, parent_base: ArtifactRef
) -> "Iterator[Base]":
    """The base of an earlier adapter, loaded, with that adapter attached as TEACHER."""
    from ml_assets.engine import hardware
    from ml_assets.engine.loading import load_base

    old = load_base(store.open(parent_base), hardware.compute_dtype(home))
    old.attach(TEACHER, store.open(parent))
    yield old


# -- rows ----------------------------------------------------------------------------------------------


def prepare(
    inputs: "AdapterInputs", port: Port, base: "Base", store: ArtifactStore, home: Path, reuse: bool = True
) -> Prepared:
    """What a rung trains on `base`, on which no adapter is.

    Raises ValueError when the start is not one that the parent gives, ArtifactError when the parent, its base
    or the adapter to go on from is damaged or gone.
    """
    from ml_assets.engine.training import Stopping

    spec = inputs.spec
    start: Path | None = None
    if port.warm is not None:
        start = store.open(port.warm)
    elif port.start != SCRATCH:
        found = find_starts(inputs, base, store, home, port.parent, port.parent_base, reuse)
        if port.start not in found.folders:
            raise ValueError(
                f"start {port.start!r}: expected one of {', '.join(found.folders) or 'none'} {found.reason}"
            )
        start = found.folders[port.start]
    if port.rung == "copy":
        return Prepared(start, [], spec.adapter, None)
    everything = load_rows(inputs.dataset_directory, "train")
    rows, held = split_validation(everything, port.validation_share)
    examples = training_examples(base, spec.prompt, rows)
    steps = max(1, math.floor(port.share * full_steps(inputs, [*examples])))
    wanted = _rows_of(steps, examples, spec.adapter)
    judged = training_examples(base, spec.prompt, held)
    failed = {row["_row"] for row in production_failures(rows, spec.feedback.must_pass)}
    remembered = [i for i, row in enumerate(rows) if row["_row"] in failed][:wanted]
    if port.rung == "tune":
        chosen = _hard_rows(base, start, examples, wanted, judged, port)
    else:
        chosen = _sample(range(len(rows)), wanted, examples, port)
    chosen = [*remembered, *(i for i in chosen if rows[i]["_row"] not in failed)][:wanted]
    if port.rung == "distil":
        examples = _taught(inputs, port, base, store, home, rows, examples, chosen)
    recipe = spec.adapter.model_copy(
        update={
            "epochs": None,
            "steps": steps,
            "warmup": max(spec.adapter.warmup, WARMUP),
            "learning_rate": spec.adapter.learning_rate * (1.0 if start is None else RATE),
        }
    )
    picked = [examples[i] for i in sorted(chosen)]
    return Prepared(start, picked, recipe, Stopping(judged) if judged else None)


def _rows_of(steps: int, examples: "Sequence[Example]", recipe: AdapterRecipe) -> int:
    """Rows that so many steps see once."""
    mean = sum(map(len, examples)) / len(examples)
    return min(len(examples), max(1, math.ceil(steps * recipe.batch_tokens / mean)))


def _sample(indices: Sequence[int], count: int, examples: "Sequence[Example]", port: Port) -> list[int]:
    """So many of the indices, by the hash of their rows."""

    def order(i: int) -> str:
        return sha256_bytes(f"{port.rung} {port.parent.digest} {examples[i].row}".encode())

    return sorted(indices, key=order)[:count]


def _hard_rows(
    base: "Base",
    start: Path | None,
    examples: "Sequence[Example]",
    wanted: int,
    judged: "Sequence[Example]",
    port: Port,
) -> list[int]:
    """Rows that the start gets wrong, and a sample of the rest, `wanted` in all. Where the start gets most of
    the validation rows wrong, a plain sample is that already."""
    pool = _sample(range(len(examples)), math.ceil(POOL * wanted), examples, port)
    losses = losses_of(base, start, judged)
    if wanted >= len(examples) or not losses or sum(x >= SURE for x in losses) >= WRONG_SHARE * len(losses):
        return pool[:wanted]
    found = dict(zip(pool, losses_of(base, start, [examples[i] for i in pool]), strict=True))
    wrong = [i for i in pool if found[i] >= SURE][: math.ceil(WRONG_SHARE * wanted)]
    rest = [i for i in pool if i not in set(wrong)]
    return [*wrong, *rest][:wanted]


def losses_of(base: "Base", start: Path | None, examples: "Sequence[Example]") -> list[float]:
    """Nats of each example's whole answer on `base` with the adapter in the folder `start`, or without."""
    from ml_assets.engine.lora import read_adapter
    from ml_assets.engine.scoring import answer_losses

    pairs = [(example.prompt, example.target) for example in examples]
    if start is None:
        return answer_losses(base, pairs)
    base.lora.add("start", read_adapter(base.model, start, base.model.dtype, base.device))
    try:
        with base.active("start"):
            return answer_losses(base, pairs)
    finally:
        base.lora.remove("start")


# -- the teacher ---------------------------------------------------------------------------------------


def _taught(
    inputs: "AdapterInputs",
    port: Port,
    base: "Base",
    store: ArtifactStore,
    home: Path,
    rows: Sequence[Row],
    examples: "list[Example]",
    chosen: Sequence[int],
) -> "list[Example]":
    """Examples with what the old champion says about those that are `chosen`: its probabilities at every
    token of the row's own answer, where the tokenizers are the same (MUSCLE: Echterhoff et al. 2024,
    arXiv 2407.09435, distils to keep what was right); else the answer that it gives, where that counts as
    right (sequence-level: Kim and Rush 2016, arXiv 1606.07947)."""
    manifest = read_json(store.open(port.parent) / "manifest.json")
    found = list(examples)
    if not is_prompted(manifest) and same_tokenizer(inputs.base_directory, store.open(port.parent_base)):
        softs = _probabilities(port, store, home, [examples[i] for i in chosen], base.vocabulary)
        for i, soft in zip(chosen, softs, strict=True):
            found[i] = replace(examples[i], soft=soft)
        return found
    answers = _right_answers(inputs, port, store, home, manifest, [rows[i] for i in chosen])
    for i, answer in zip(chosen, answers, strict=True):
        if answer is not None:
            found[i] = replace(examples[i], target=base.chat.target_ids(answer))
    return found


def _probabilities(
    port: Port, store: ArtifactStore, home: Path, examples: "Sequence[Example]", vocabulary: int
) -> "list[Soft]":
    from ml_assets.engine.scoring import top_tokens
    from ml_assets.engine.training import Soft

    pairs = [(example.prompt, example.target) for example in examples]
    with teacher(store, home, port.parent, port.parent_base) as old, old.active(TEACHER):
        found = top_tokens(old, pairs, TEACHER_TOKENS, vocabulary=vocabulary)
    return [Soft(tokens, shares, TEACHER_WEIGHT) for tokens, shares in found]


def _right_answers(
    inputs: "AdapterInputs",
    port: Port,
    store: ArtifactStore,
    home: Path,
    manifest: Mapping[str, Any],
    rows: Sequence[Row],
) -> list[str | None]:
    """The champion's answer to each row; None where it is not right, or is the row's own."""
    from ml_assets.engine import hardware
    from ml_assets.eval_reports.build import adapter_arm
    from ml_assets.eval_reports.runner import evaluate

    spec = inputs.spec
    train_rows = load_rows(inputs.dataset_directory, "train")
    arm = adapter_arm("champion", port.parent, store.open(port.parent))
    with teacher(store, home, port.parent, port.parent_base) as old:
        lines, _ = evaluate(
            old,
            spec.prompt,
            spec.evaluation,
            rows,
            train_rows,
            [replace(arm, adapter=TEACHER if arm.adapter else None)],
            store=store,
            compute=hardware.hardware_class(home),
        )
    right = {line["row"]: line["answer"] for line in lines if line["right"] and line["finished"]}
    own = {line["row"]: line["expected"] for line in lines}
    return [
        right[row["_row"]] if right.get(row["_row"], own[row["_row"]]) != own[row["_row"]] else None
        for row in rows
    ]
