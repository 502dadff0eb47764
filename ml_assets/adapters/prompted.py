"""Adapters without weights: a customization's prompt, with or without examples from its dataset.

Where a base answers well enough when it is asked properly, that is all there is to carry to it. Such an
adapter is published, evaluated, released and served as any other one.
"""

import datetime
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ml_assets.adapters.fingerprint import choose_probes, make_fingerprint, measure
from ml_assets.adapters.manifest import build_manifest
from ml_assets.adapters.recipe import answer_labels
from ml_assets.adapters.train import KIND, AdapterInputs, TrainedAdapter
from ml_assets.artifacts import ArtifactStore, canonical_json, sha256_bytes
from ml_assets.datasets.snapshot import load_rows
from ml_assets.engine.examples import Examples

PROMPTED_VERSION = "1"
"""Raise when the same inputs would give other examples."""

FITTING_ROWS = 200
"""Training rows whose prompts must fit into the context together with all examples."""

Shots = Literal["zero_shot", "few_shot"]


def publish_prompted(inputs: AdapterInputs, store: ArtifactStore, home: Path, shots: Shots) -> TrainedAdapter:
    """The adapter without weights on a local base: the prompt alone, or with the examples of the evaluation's
    few-shot arm. Made once for the same inputs.

    Raises ValueError when the training rows hold too many labels or none of them.
    """
    key = prompted_key(inputs, {"shots": shots})
    if known := store.recall(KIND, key):
        return TrainedAdapter(known[0], known[1], reused=True)
    from ml_assets.engine import hardware
    from ml_assets.engine.loading import load_base
    from ml_assets.eval_reports.runner import choose_examples, default_new_tokens, fitting_examples

    start = time.perf_counter()
    hardware.prepare_process()
    spec = inputs.spec
    rows = load_rows(inputs.dataset_directory, "train")
    with hardware.computing(home):
        base = load_base(inputs.base_directory, hardware.compute_dtype(home))
        answer_tokens = spec.evaluation.max_new_tokens or default_new_tokens(base, spec.prompt, rows)
        chosen: Sequence[Mapping[str, Any]] = []
        if shots == "few_shot":
            chosen = choose_examples(rows, spec.prompt, spec.evaluation, spec.adapter.seed)
            chosen = fitting_examples(base, spec.prompt, rows[:FITTING_ROWS], chosen, answer_tokens)
        examples = Examples(tuple(example_pairs(inputs, chosen)), answer_tokens)
        probes = training_probes(inputs, rows)
        asked = [
            probe
            | {
                "messages": examples.before(
                    probe["messages"],
                    lambda messages: len(base.chat.prompt_ids(messages)),
                    base.context_length,
                )
            }
            for probe in probes
        ]
        fingerprint = make_fingerprint(probes, measure(base, asked), measure(base, probes), must_differ=False)
        hardware_class = hardware.hardware_class(home)
    manifest = prompted_manifest(
        inputs, key, examples, fingerprint, answer_labels(spec, rows), hardware_class
    )
    ref = store.publish(KIND, {"manifest.json": canonical_json(manifest) + b"\n"})
    record = prompted_record(time.perf_counter() - start)
    store.remember(KIND, key, ref, record)
    return TrainedAdapter(ref, record, reused=False)


def prompted_key(inputs: AdapterInputs, choice: Mapping[str, Any]) -> str:
    """64 hex: the hash of all that goes into a prompt-only adapter; `choice` says how examples are chosen."""
    spec = inputs.spec
    evaluation = spec.evaluation
    parts = {
        "kind": "prompt",
        "customization": spec.name,
        "base_identity": inputs.base_manifest["identity"],
        "dataset": inputs.dataset_digest,
        "prompt": spec.prompt.model_dump(),
        "examples": [evaluation.task, evaluation.few_shot, evaluation.segments, spec.adapter.seed],
        "answers": [evaluation.answer_by, evaluation.max_new_tokens],
        "choice": dict(choice),
        "code": PROMPTED_VERSION,
    }
    return sha256_bytes(canonical_json(parts))


def example_pairs(inputs: AdapterInputs, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(what the user says, the answer) of dataset rows."""
    from ml_assets.engine.prompting import render_messages, render_target

    prompt = inputs.spec.prompt
    return [(render_messages(prompt, row)[-1]["content"], render_target(prompt, row)) for row in rows]


def training_probes(inputs: AdapterInputs, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The fingerprint's probes: the same as those of an adapter with weights."""
    from ml_assets.engine.prompting import render_messages, render_target

    prompt = inputs.spec.prompt
    return choose_probes([(render_messages(prompt, row), render_target(prompt, row)) for row in rows[:8]])


def prompted_manifest(
    inputs: AdapterInputs,
    key: str,
    examples: Examples,
    fingerprint: Mapping[str, Any],
    labels: list[str],
    hardware_class: str,
) -> dict[str, Any]:
    """The manifest of an adapter, without what only training has."""
    manifest = build_manifest(
        spec=inputs.spec,
        base_manifest=inputs.base_manifest,
        dataset_digest=inputs.dataset_digest,
        key=key,
        targets=[],
        training_version=PROMPTED_VERSION,
        hardware_class=hardware_class,
        steps=0,
        trained_tokens=0,
        fingerprint=fingerprint,
        labels=labels,
    )
    return manifest | {
        "kind": "prompt",
        "rung": "bare",
        "examples": [list(pair) for pair in examples.pairs],
        "answer_tokens": examples.answer_tokens,
    }


def prompted_record(seconds: float) -> dict[str, Any]:
    """What a training notes, for one that has no steps."""
    return {
        "trained_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "tokens_per_second": 0.0,
        "resumed_from": 0,
        "losses": [],
    }
