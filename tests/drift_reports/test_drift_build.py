"""Looks at a real traffic database: each request once, states that follow one another, a new start with a new
champion, and a page."""

import dataclasses
import json
from pathlib import Path

import dagster as dg
import pytest
from drift_world import START, World, specification
from tiny_models import tiny_model

from ml_assets.artifacts import ArtifactError, ArtifactStore
from ml_assets.drift_reports import build
from ml_assets.drift_reports.asset import build_drift_report_asset
from ml_assets.drift_reports.build import champion_of, look, read_findings
from ml_assets.drift_reports.checks import TEXTS
from ml_assets.drift_reports.findings import DriftFindings
from ml_assets.endpoints.ledger import Ledger, Release
from ml_assets.traffic.store import TrafficLog
from resources.artifact_store import ArtifactRefIOManager, ArtifactStoreResource
from resources.ledger import LedgerResource
from resources.traffic_log import TrafficLogResource


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def log(tmp_path: Path):
    log = TrafficLog(f"sqlite:///{tmp_path / 'traffic.db'}")
    yield log
    log.close()


def release(world: World, adapter: str | None = None, action: str = "release", number: int = 1) -> Release:
    c = world.champion
    return Release(
        customization=world.spec.name,
        base_revision=c.base_revision,
        base_digest=c.base_digest,
        adapter_digest=adapter or c.adapter_digest,
        report_digest=c.report_digest,
        mlflow_version="1",
        run_id="run",
        actor="test",
        reason="test",
        action=action,  # type: ignore[arg-type]
        id=number,
    )


def test_who_is_champion_and_since_when(world: World) -> None:
    a, b = world.champion.adapter_digest, "b" * 64
    assert champion_of([]) is None
    assert champion_of([release(world, action="withdraw", number=2), release(world)]) is None
    limits = [release(world, number=3), release(world, number=2), release(world, b, number=1)]
    champion = champion_of(limits)
    assert champion is not None and (champion.adapter_digest, champion.since) == (a, 2)
    back = champion_of([release(world, action="rollback", number=4), release(world, b, number=3), *limits])
    assert back is not None and back.since == 4


def test_looks_follow_one_another_and_a_shift_with_harm_fails(world: World, log: TrafficLog) -> None:
    def see() -> build.BuiltLook:
        return look(world.spec, world.store, world.home, world.champion, log, START)

    log.append(world.quiet(200))
    first = see()
    assert first.findings.requests == first.findings.to_seq == 200
    assert not first.findings.looks[-1].failed
    assert not any(s.alarm for s in first.findings.signals)
    again = see()
    assert again.reused and again.ref == first.ref

    log.append(world.moved(200, 200))
    second = see()
    assert second.findings.requests == 400
    assert "inputs_classifier" in second.findings.looks[-1].signals
    assert not second.findings.looks[-1].failed  # a change without known harm
    assert len(second.findings.looks) == 2
    assert len(second.findings.unlabelled) == len(set(second.findings.unlabelled)) > 50
    by_id = {r.id: r for r in log.requests(world.spec.name)}
    assert all("upstairs" in by_id[i].messages[0]["content"] for i in second.findings.unlabelled[:20])

    for record in world.moved(40, 200):
        log.give_feedback(record.id, "key1", None, "heater")
    third = see()
    assert third.findings.looks[-1].failed
    assert third.findings.outcome.labelled == 40
    assert third.findings.outcome.loss is not None and third.findings.outcome.loss > 0.8
    assert not {f"chatcmpl-{200 + i}" for i in range(40)} & set(third.findings.unlabelled)
    assert read_findings(world.store, third.ref) == third.findings
    assert DriftFindings.from_json(json.loads(json.dumps(third.findings.to_json()))) == third.findings

    page = (world.store.open(third.ref) / "report.html").read_text()
    assert "inputs_classifier" in page and "upstairs" in page and "Failed" in page
    assert "http" not in page and "<script" not in page


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["publish", "first note", "second note"])
def test_a_killed_look_is_made_again_and_counts_nothing_twice(
    world: World, log: TrafficLog, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append(world.quiet(130))
    look(world.spec, world.store, world.home, world.champion, log, START)
    log.append(world.moved(130, 130))
    publish, remember, notes = ArtifactStore.publish, ArtifactStore.remember, []

    def dying_publish(self, kind, files):
        ref = publish(self, kind, files)
        if kind == build.KIND and moment == "publish":
            raise Killed
        return ref

    def dying_remember(self, kind, key, ref, record):
        remember(self, kind, key, ref, record)
        notes.append(key)
        if kind == build.KIND and len(notes) == {"first note": 1, "second note": 2}.get(moment):
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(ArtifactStore, "publish", dying_publish)
        patched.setattr(ArtifactStore, "remember", dying_remember)
        look(world.spec, world.store, world.home, world.champion, log, START)
    after = look(world.spec, world.store, world.home, world.champion, log, START)
    assert after.findings.requests == 260

    other = World(world.home / "other")
    whole = look(other.spec, other.store, other.home, other.champion, log, START)
    state = "state.safetensors"
    mine, theirs = world.store.open(after.ref) / state, other.store.open(whole.ref) / state
    assert mine.read_bytes() == theirs.read_bytes()


def test_a_new_champion_begins_anew(world: World, log: TrafficLog) -> None:
    log.append([*world.quiet(100), *world.moved(200, 100)])
    before = look(world.spec, world.store, world.home, world.champion, log, START)
    assert any(s.alarm for s in before.findings.signals)
    later = dataclasses.replace(world.champion, since=9)
    after = look(world.spec, world.store, world.home, later, log, START)
    assert after.findings.requests == 0 and not any(s.alarm for s in after.findings.signals)
    log.append(world.quiet(60, 400))
    after = look(world.spec, world.store, world.home, later, log, START)
    assert (after.findings.from_seq, after.findings.requests) == (301, 60)


def test_what_another_adapter_answered_is_not_looked_at(world: World, log: TrafficLog) -> None:
    mine = world.quiet(40)
    others = [dataclasses.replace(r, adapter_digest="c" * 64) for r in world.moved(100, 40)]
    failed = [dataclasses.replace(r, status=500) for r in world.moved(100, 140)]
    log.append([*mine, *others, *failed])
    findings = look(world.spec, world.store, world.home, world.champion, log, START).findings
    assert (findings.requests, findings.to_seq) == (40, 240)


def test_a_damaged_reference_is_named(world: World, log: TrafficLog) -> None:
    world.store.delete(world.dataset)
    with pytest.raises(ArtifactError, match="dataset"):
        look(world.spec, world.store, world.home, world.champion, log, START)


def materialize(world: World, tmp_path: Path, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [build_drift_report_asset(world.spec)],
        instance=instance,
        resources={
            "artifact_store": ArtifactStoreResource(
                url=str(tmp_path / "artifacts"), cache=str(tmp_path / "cache")
            ),
            "io_manager": ArtifactRefIOManager(root=str(tmp_path / "refs")),
            "ledger": LedgerResource(url=f"sqlite:///{tmp_path / 'ledger.db'}"),
            "traffic_log": TrafficLogResource(url=f"sqlite:///{tmp_path / 'traffic.db'}"),
        },
    )


def test_the_asset_tells_in_its_checks_what_moved(
    world: World, log: TrafficLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path))
    with dg.instance_for_test() as instance:
        nothing = materialize(world, tmp_path, instance)
        checks = nothing.get_asset_check_evaluations()
        assert {c.check_name for c in checks} == set(TEXTS)
        assert all(c.passed and c.description == "nothing to look at yet" for c in checks)

        ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
        with ledger.release_transaction(world.spec.name, "run") as transaction:
            transaction.record(release(world))
        ledger.close()
        log.append([*world.quiet(200), *world.moved(200, 200)])
        result = materialize(world, tmp_path, instance)
        found = {c.check_name: c for c in result.get_asset_check_evaluations()}
        assert not found["inputs_classifier"].passed
        assert found["inputs_classifier"].severity == dg.AssetCheckSeverity.WARN
        assert found["outputs_malformed"].passed
        metadata = found["inputs_classifier"].metadata
        assert {"statistic", "evidence", "p_value", "effect", "rows", "over_time"} <= set(metadata)
        assert "data:image/png;base64" in str(metadata["over_time"].value)
        (event,) = result.get_asset_materialization_events()
        assert event.materialization.metadata["requests"].value == 400


def test_the_early_layer_of_a_base_is_computed_packed_and_no_further(tmp_path: Path) -> None:
    import torch

    from ml_assets.drift_reports.embeddings import base_layer
    from ml_assets.engine.loading import load_base

    directory = tiny_model("llama", tmp_path / "base")
    manifest = {"revision": "tiny@1", "identity": "i", "context_length": 512, "eos_token_ids": []}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    base = load_base(directory, torch.float32)
    texts = ["turn on the light", "", "what is the temperature in the living room?", "שלום"]
    packed = base_layer(base)(texts)
    assert packed.shape == (4, 64)
    base.packs = False
    alone = base_layer(base)(texts)
    assert torch.allclose(torch.tensor(packed), torch.tensor(alone), atol=1e-4)
    ids = torch.tensor([base.tokenizer(texts[0], add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        layer = base.model(ids, output_hidden_states=True).hidden_states[1][0].mean(dim=0)
    expected = torch.nn.functional.normalize(layer, dim=-1)
    assert torch.allclose(torch.tensor(packed[0]), expected, atol=1e-4)


def test_the_smallest_reference_still_gives_a_report(tmp_path: Path, log: TrafficLog) -> None:
    """Few rows, no labels: what can't be compared is left out and said so."""
    spec = specification("text", prompt={"user": "{text}", "target": "{colour}"})
    world = World(tmp_path, spec)
    log.append(world.quiet(45))
    built = look(spec, world.store, world.home, world.champion, log, START)
    assert "outputs_mix" not in {s.name for s in built.findings.signals}
    assert built.pictures["mix"] is None
