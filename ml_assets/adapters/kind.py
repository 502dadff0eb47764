"""Which kind of adapter does for a customization: `adapter.kind: auto`, decided by evaluation.

One row in ten of the training split is kept out of both trainings and judged by the customization's own
metric. The cheaper kind is chosen unless it is worse than exact LoRA by more than the gate's margin. What was
found holds until prompt, recipe or metric change: new data and new base revisions do not ask again, and the
gate still judges every adapter.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ml_assets.adapters.recipe import resolve_targets, training_examples
from ml_assets.adapters.train import AdapterInputs
from ml_assets.artifacts import ArtifactError, ArtifactStore, canonical_json, read_json, sha256_bytes
from ml_assets.datasets.snapshot import load_rows
from ml_assets.spec import AdapterRecipe

Kind = Literal["lora", "activated_lora"]
KIND = "adapter_kind"
KIND_VERSION = "1"
HELD_OUT = 10
"""One training row in so many is held out, at most MAX_HELD_OUT, for the comparison."""
MAX_HELD_OUT = 200
MIN_HELD_OUT = 20
"""With fewer rows to compare on, exact LoRA is trained."""

_log = logging.getLogger(__name__)


def resolve_kind(
    inputs: AdapterInputs, store: ArtifactStore, home: Path, tell: Callable[[str], None] = _log.info
) -> tuple[AdapterInputs, dict[str, Any] | None]:
    """Inputs whose recipe names a kind, and what the choice was based on (None where the recipe names one
    already): `kind`, `reason` and, if both kinds were trained, `seconds` of each, `difference` and `rows`.

    Raises what `train_lora` raises when exact LoRA can't be trained.
    """
    recipe = inputs.spec.adapter
    if recipe.kind != "auto":
        return inputs, None
    if inputs.spec.engine() == "vllm":
        return _with_kind(inputs, "lora"), {"kind": "lora", "reason": "vLLM serves exact LoRA only"}
    key = _key(inputs)
    if known := store.recall(KIND, key):
        try:
            found = read_json(store.open(known[0]) / "comparison.json")
            tell(f"adapter.kind auto: {found['kind']}, as found before: {found['reason']}")
            return _with_kind(inputs, found["kind"]), found
        except ArtifactError as error:
            _log.warning("compared again, because what was published is damaged: %s", error)
    found = _compare(inputs, store, home, tell)
    ref = store.publish(KIND, {"comparison.json": canonical_json(found) + b"\n"})
    store.remember(KIND, key, ref, {})
    tell(f"adapter.kind auto: {found['kind']}: {found['reason']}")
    return _with_kind(inputs, found["kind"]), found


def _key(inputs: AdapterInputs) -> str:
    spec = inputs.spec
    parts = {
        "version": KIND_VERSION,
        "customization": spec.name,
        "family": str(inputs.base_manifest["revision"]).rpartition("@")[0],
        "prompt": spec.prompt.model_dump(),
        "recipe": spec.adapter.model_dump(),
        "metric": spec.evaluation.model_dump(include={"task", "metrics", "answer_by"}),
        "margin": spec.evaluation.gate.margin,
    }
    return sha256_bytes(canonical_json(parts))


def _with_kind(inputs: AdapterInputs, kind: str) -> AdapterInputs:
    adapter = AdapterRecipe(**{**inputs.spec.adapter.model_dump(), "kind": kind})
    return replace(inputs, spec=inputs.spec.model_copy(update={"adapter": adapter}))


def split_off(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """(rows to train on, rows to judge by): by the hash of the row, so that it stays on its side."""
    held = [row for row in rows if int(row["_row"][:8], 16) % HELD_OUT == 0][:MAX_HELD_OUT]
    names = {row["_row"] for row in held}
    return [row for row in rows if row["_row"] not in names], held


def _compare(
    inputs: AdapterInputs, store: ArtifactStore, home: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    from ml_assets.engine import hardware
    from ml_assets.engine.loading import ADAPTER_PINS, load_base
    from ml_assets.engine.training import train_lora
    from ml_assets.eval_reports.gate import decide
    from ml_assets.eval_reports.runner import Arm, evaluate

    spec = inputs.spec
    rows, held = split_off(load_rows(inputs.dataset_directory, "train"))
    if len(held) < MIN_HELD_OUT:
        reason = f"{len(held)} training rows to compare on, of {MIN_HELD_OUT} needed"
        return {"kind": "lora", "reason": reason}
    hardware.prepare_process()
    base = load_base(inputs.base_directory, hardware.compute_dtype(home))
    try:
        if not base.packs:
            raise ValueError("the architecture can't keep keys and values")
        base.chat.invocation_ids()
    except ValueError as error:
        return {"kind": "lora", "reason": str(error)}
    examples = training_examples(base, spec.prompt, rows)
    targets = resolve_targets(spec.adapter, inputs.base_manifest)
    pins = {f: base.manifest["identity" if f == "base_identity" else f] for f in ADAPTER_PINS}
    seconds: dict[str, float] = {}
    kinds: tuple[Kind, ...] = ("activated_lora", "lora")
    folders = {kind: home / "checkpoints" / f"{_key(inputs)}-{kind}" for kind in kinds}
    with hardware.computing(home), store.staging(KIND) as staging:
        for kind in kinds:
            tell(f"adapter.kind auto: training {kind} on {len(rows)} rows to compare on {len(held)}")
            result = train_lora(
                base,
                examples,
                _with_kind(inputs, kind).spec.adapter,
                targets,
                staging / kind,
                checkpoints=folders[kind],
                prompt_cache=home / "prompt_cache",
            )
            seconds[kind] = round(result.seconds + result.earlier_seconds, 1)
            (staging / kind / "manifest.json").write_bytes(canonical_json(pins))
        for kind in kinds:
            base.attach(kind, staging / kind)
        arms = [Arm("adapter", "activated_lora"), Arm("champion", "lora")]
        lines, _ = evaluate(base, spec.prompt, spec.evaluation, held, rows, arms)
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    arm_lines = {arm.name: [line for line in lines if line["arm"] == arm.name] for arm in arms}
    decision = decide(arm_lines["adapter"], arm_lines["champion"], spec.evaluation, against="champion")
    difference = decision.difference
    assert difference is not None
    margin = spec.evaluation.gate.margin
    measured = (
        f"{difference.metric} {difference.candidate:.3f} with activated_lora and {difference.reference:.3f} "
        f"with lora on {difference.rows} held-out rows, trained in {seconds['activated_lora']:.0f} s and "
        f"{seconds['lora']:.0f} s"
    )
    kind = "activated_lora"
    if difference.estimate < -margin:
        kind, measured = "lora", f"{measured}: worse by more than the margin of {margin}"
    elif seconds["activated_lora"] >= seconds["lora"]:
        kind, measured = "lora", f"{measured}: not cheaper here"
    return {
        "kind": kind,
        "reason": measured,
        "seconds": seconds,
        "difference": difference.estimate,
        "rows": difference.rows,
    }
