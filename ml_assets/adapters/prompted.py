"""Adapters without weights: a customization's prompt, with or without examples from its dataset.

Where a base answers well enough when it is asked properly, that is all there is to carry to it. Such an
adapter is published, evaluated, released and served as any other one.
"""

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ml_assets.adapters.fingerprint import choose_probes, make_fingerprint, measure
from ml_assets.adapters.manifest import build_manifest
from ml_assets.adapters.recipe import answer_labels, example_pairs
from ml_assets.adapters.search import choose_way
from ml_assets.adapters.train import KIND, AdapterInputs, TrainedAdapter, recall_adapter
from ml_assets.artifacts import ArtifactStore, canonical_json, sha256_bytes
from ml_assets.datasets.snapshot import load_rows
from ml_assets.engine.examples import Examples, files_of
from ml_assets.engine.hosted import HostedModel

PROMPTED_VERSION = "1"
"""Raise when the same inputs would give other examples."""

HOSTED_PROBES = 2
"""A hosted base tells no log-probabilities of a given answer. What tells one prompt from another, and a model
from one that reads differently, is how many tokens it counts: each probe costs two requests."""

FITTING_ROWS = 200
"""Training rows whose prompts must fit into the context together with all examples."""

Shots = Literal["zero_shot", "few_shot"]


def publish_prompted(inputs: AdapterInputs, store: ArtifactStore, home: Path, shots: Shots) -> TrainedAdapter:
    """The adapter without weights on a local base: the prompt alone, or with the examples of the evaluation's
    few-shot arm. Made once for the same inputs.

    Raises ValueError when the training rows hold too many labels or none of them.
    """
    key = prompted_key(inputs, {"shots": shots})
    if known := recall_adapter(store, key):
        return known
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
        examples = Examples(tuple(example_pairs(spec.prompt, chosen)), answer_tokens)
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


def publish_hosted(
    inputs: AdapterInputs,
    store: ArtifactStore,
    home: Path,
    tell: Callable[[str], None] = lambda _: None,
    pay: Callable[[float], None] = lambda _: None,
) -> TrainedAdapter:
    """The adapter for a hosted base: the prompt with examples chosen as the block `examples` says. Made once
    for the same inputs; what was paid for is not asked again, also after a kill. The record holds `requests`
    and their `money`, which `pay` is told also when this fails.

    Raises HostedError where the base does not answer, ValueError when the training rows hold too many labels.
    """
    key = hosted_key(inputs)
    if known := recall_adapter(store, key):
        return known
    base = HostedModel(inputs.base_manifest, home / "cache" / "hosted")
    try:
        return _publish_hosted(inputs, store, key, base, tell)
    finally:
        pay(base.money)


def _publish_hosted(
    inputs: AdapterInputs, store: ArtifactStore, key: str, base: HostedModel, tell: Callable[[str], None]
) -> TrainedAdapter:
    from ml_assets.eval_reports.runner import default_new_tokens

    start = time.perf_counter()
    spec = inputs.spec
    rows = load_rows(inputs.dataset_directory, "train")
    labels = answer_labels(spec, rows)
    way, measured = choose_way(base, spec, rows, tell)
    answer_tokens = spec.evaluation.max_new_tokens or default_new_tokens(base, spec.prompt, rows)
    examples = way.examples(spec, rows, answer_tokens)
    probes = training_probes(inputs, rows)[:HOSTED_PROBES]
    counted = [base.count(shown_to(base, examples, probe["messages"])) for probe in probes]
    bare = [base.count(probe["messages"]) for probe in probes]
    fingerprint = make_fingerprint(probes, counted, bare, must_differ=False) | {"tolerance": 0.5}
    manifest = prompted_manifest(inputs, key, examples, fingerprint, labels, "hosted")
    manifest["search"] = {"chosen": way.name, "measured": [vars(one) for one in measured]}
    ref = store.publish(KIND, {"manifest.json": canonical_json(manifest) + b"\n", **files_of(examples)})
    record = prompted_record(time.perf_counter() - start)
    record |= {"requests": base.sent, "money": round(base.money, 6)}
    store.remember(KIND, key, ref, record)
    return TrainedAdapter(ref, record, reused=False)


def hosted_key(inputs: AdapterInputs) -> str:
    """The input key (64 hex) of the adapter for a hosted base."""
    context = inputs.base_manifest["context_length"]
    return prompted_key(inputs, inputs.spec.examples.model_dump() | {"context": context})


def shown_to(
    base: HostedModel, examples: Examples, messages: Sequence[Mapping[str, str]]
) -> list[Mapping[str, str]]:
    """A conversation with the examples that fit."""
    return examples.before(messages, base.count_prompt, base.context_length)


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
        "examples": [] if examples.nearest else [list(pair) for pair in examples.pairs],
        "retrieval": {"count": examples.count, "rows": len(examples.pairs)} if examples.nearest else None,
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
