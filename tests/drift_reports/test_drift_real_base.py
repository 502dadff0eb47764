"""The whole way with a base model: its own layer as embedding, and the confidence of a trained champion."""

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from drift_world import World, specification
from tiny_models import tiny_model

from ml_assets.adapters.train import open_inputs, train_adapter
from ml_assets.artifacts import ArtifactRef, ArtifactStore, sha256_bytes
from ml_assets.drift_reports.build import look
from ml_assets.drift_reports.reference import Champion, Models, champion_lines, find_reference
from ml_assets.eval_reports.build import build_report
from ml_assets.traffic.store import TrafficLog

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_base(store: ArtifactStore) -> ArtifactRef:
    with store.staging("base_model") as directory:
        tiny_model("llama", directory)
        manifest = {
            "family": "tiny",
            "revision": "tiny@1",
            "identity": sha256_bytes(b"tiny"),
            "tokenizer_sha256": "t",
            "chat_template_sha256": "c",
            "chat_template": "model",
            "weights_sha256": "w",
            "architecture": "LlamaForCausalLM",
            "context_length": 512,
            "eos_token_ids": [],
            "lora_targets": {"all-linear": TARGETS},
        }
        (directory / "manifest.json").write_text(json.dumps(manifest))
        return store.publish_directory("base_model", directory)


def test_a_champion_on_a_base_is_watched_with_its_confidence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = specification(
        adapter={"rank": 8, "steps": 60, "batch_tokens": 512, "learning_rate": 0.01},
        drift={"embedding": "base"},
        evaluation={"task": "classification", "few_shot": 0, "max_rows": 150},
    )
    world = World(tmp_path, spec)
    base = tiny_base(world.store)
    adapter = train_adapter(open_inputs(spec, world.store, base, world.dataset), world.store, tmp_path).ref
    report = build_report(
        spec,
        tmp_path,
        world.store,
        tmp_path,
        adapter=adapter,
        dataset=world.dataset,
        base_model=base,
        champion=None,
    )
    world.champion = Champion(adapter.digest, base.digest, "tiny@1", report.ref.digest, since=1)
    models = Models(spec, world.store, tmp_path, world.champion)
    reference = find_reference(spec, world.store, world.champion, models)
    confidence = reference.arrays["confidence"].astype(float)
    assert len(confidence) == 150
    assert np.isfinite(confidence).all() and (confidence <= 0).all()
    assert reference.about["accuracy"] == pytest.approx(
        report.summary["arms"]["adapter"]["metrics"]["accuracy"]["mean"]
    )

    log = TrafficLog(f"sqlite:///{tmp_path / 'traffic.db'}")
    unsure = float(confidence.min()) - 2.0
    # as the champion answers, and as sure
    answers = [line["answer"] for line in champion_lines(world.store, world.champion)]
    drawn = np.random.default_rng(0).integers(150, size=120)
    log.append(
        [
            dataclasses.replace(record, answer=answers[i], mean_logprob=float(confidence[i]))
            for record, i in zip(world.quiet(120), drawn, strict=True)
        ]
    )
    at = datetime(2026, 3, 2, tzinfo=UTC)
    before = look(spec, world.store, tmp_path, world.champion, log, at).findings
    assert "outcome_estimated" in {s.name for s in before.signals}
    assert [s.name for s in before.signals if s.alarm] == []
    assert before.outcome.estimated_accuracy == pytest.approx(reference.about["accuracy"], abs=0.15)

    moved = [
        world.record(120 + i, r.messages[0]["content"], r.answer, mean_logprob=unsure)
        for i, r in enumerate(world.moved(120, 0))
    ]
    log.append(moved)
    after = look(spec, world.store, tmp_path, world.champion, log, at).findings
    log.close()
    signals = {s.name: s for s in after.signals}
    assert signals["outcome_estimated"].alarm and signals["inputs_classifier"].alarm
    assert signals["outcome_estimated"].rows[0]["why"].startswith("mean log-probability")
    assert after.outcome.estimated_accuracy is not None and before.outcome.estimated_accuracy is not None
    assert after.outcome.estimated_accuracy <= before.outcome.estimated_accuracy
