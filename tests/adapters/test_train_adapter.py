"""An adapter is trained once, pinned by its manifest, resumed after SIGKILL, and reproduced byte for byte."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from small_training import STEPS, small_base, small_dataset, small_inputs, small_spec, train

from ml_assets.adapters import train as train_module
from ml_assets.adapters.fingerprint import NoEffect, make_fingerprint, matches, measure
from ml_assets.adapters.kind import resolve_kind
from ml_assets.adapters.recipe import checkpoint_folder, resolve_targets
from ml_assets.adapters.reproduce import compare, reproduce_inputs
from ml_assets.adapters.train import open_inputs, train_adapter
from ml_assets.artifacts import ArtifactError, ArtifactStore, read_json
from ml_assets.datasets.snapshot import load_rows
from ml_assets.engine.prompting import render_target
from ml_assets.spec import AdapterRecipe

PROGRAM = Path(__file__).parent / "small_training.py"


@pytest.fixture
def store(evergreen_home: Path) -> ArtifactStore:
    return ArtifactStore(str(evergreen_home / "artifacts"))


def test_trained_once_and_pinned(evergreen_home: Path, store: ArtifactStore) -> None:
    inputs = small_inputs(store)
    first = train_adapter(inputs, store, evergreen_home)
    assert not first.reused and len(first.record["losses"]) == STEPS
    steps: list[int] = []
    second = train_adapter(inputs, store, evergreen_home, on_progress=lambda p: steps.append(p.step))
    assert second.reused and second.ref == first.ref and steps == []
    assert second.record == first.record

    manifest = read_json(store.open(first.ref) / "manifest.json")
    assert manifest["base_identity"] == inputs.base_manifest["identity"]
    assert manifest["dataset"] == inputs.dataset_digest
    assert manifest["input_key"] == inputs.key
    assert manifest["libraries"]["torch"].startswith("2.")
    assert manifest["trained_tokens"] > 0
    assert not checkpoint_folder(evergreen_home, inputs.key).exists()


@pytest.mark.parametrize(
    "change", [{"rank": 2}, {"seed": 1}, {"learning_rate": 0.01}, {"targets": "attention"}]
)
def test_another_recipe_is_another_input_key(store: ArtifactStore, change: dict) -> None:
    assert small_inputs(store).key != small_inputs(store, **change).key


def test_an_activated_adapter_is_trained_pinned_and_reproduced(
    evergreen_home: Path, store: ArtifactStore
) -> None:
    inputs = small_inputs(store, kind="activated_lora")
    first = train_adapter(inputs, store, evergreen_home)
    assert read_json(store.open(first.ref) / "manifest.json")["kind"] == "activated_lora"
    config = read_json(store.open(first.ref) / "adapter_config.json")
    assert config["alora_invocation_tokens"]
    kept = list((evergreen_home / "prompt_cache").glob("*.kv"))
    assert kept
    for path in kept:
        path.unlink()
    again = train_adapter(inputs, store, evergreen_home, reuse=False)
    assert again.ref == first.ref and not list((evergreen_home / "prompt_cache").glob("*.kv"))
    plain = train_adapter(small_inputs(store), store, evergreen_home)
    assert plain.ref != first.ref


def test_auto_keeps_the_kind_that_the_evaluation_allows(
    evergreen_home: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml_assets.adapters import kind as kind_module

    monkeypatch.setattr(kind_module, "MIN_HELD_OUT", 2)
    monkeypatch.setattr(kind_module, "HELD_OUT", 3)
    inputs = small_inputs(store, kind="auto")
    resolved, choice = resolve_kind(inputs, store, evergreen_home)
    assert choice is not None and set(choice["seconds"]) == {"lora", "activated_lora"}
    assert choice["kind"] == resolved.spec.adapter.kind and choice["rows"] >= 2
    said: list[str] = []
    again, same = resolve_kind(inputs, store, evergreen_home, said.append)
    assert same == choice and again.key == resolved.key and "as found before" in said[0]
    named = small_inputs(store, kind=choice["kind"])
    assert resolve_kind(named, store, evergreen_home) == (named, None)
    assert resolved.key == named.key
    assert not list((evergreen_home / "checkpoints").glob("*"))
    for path in (evergreen_home / "artifacts" / "adapter_kind").rglob("comparison.json"):
        path.chmod(0o644)
        path.write_text("{}")
    compared, found = resolve_kind(inputs, store, evergreen_home)
    assert (
        found is not None and found["rows"] == choice["rows"] and compared.spec.adapter.kind == found["kind"]
    )

    monkeypatch.setenv("EVERGREEN_ENGINE", "vllm")
    elsewhere, reason = resolve_kind(inputs, store, evergreen_home)
    assert elsewhere.spec.adapter.kind == "lora" and reason and "vLLM" in reason["reason"]
    monkeypatch.delenv("EVERGREEN_ENGINE")
    monkeypatch.setattr(kind_module, "MIN_HELD_OUT", 10_000)
    few, reason = resolve_kind(small_inputs(store, kind="auto", rank=2), store, evergreen_home)
    assert few.spec.adapter.kind == "lora" and reason and "rows to compare on" in reason["reason"]


@pytest.mark.parametrize(("loss", "kind"), [(0.5, "lora"), (0.0, "activated_lora")])
def test_auto_falls_back_to_exact_lora_when_the_other_is_worse(
    loss: float,
    kind: str,
    evergreen_home: Path,
    store: ArtifactStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ml_assets.adapters import kind as kind_module
    from ml_assets.engine import training
    from ml_assets.eval_reports import runner

    monkeypatch.setattr(kind_module, "MIN_HELD_OUT", 2)
    monkeypatch.setattr(kind_module, "HELD_OUT", 3)
    answer, train = runner.answer, training.train_lora
    right: list[str] = []

    def answered(base, conversations, names, *args, **kwargs):
        found, seconds = answer(base, conversations, names, *args, **kwargs)
        arm = args[1]
        wrong = int(loss * len(found)) if arm.adapter == "activated_lora" else 0
        return [replace(a, text="no" if i < wrong else right[i]) for i, a in enumerate(found)], seconds

    def trained(base, examples, recipe, *args, **kwargs):
        result = train(base, examples, recipe, *args, **kwargs)
        return replace(result, seconds=1.0 if recipe.kind == "activated_lora" else 9.0)

    rows = load_rows(small_inputs(store).dataset_directory, "train")
    _, held = kind_module.split_off(rows)
    spec = small_spec()
    right += [render_target(spec.prompt, row) for row in sorted(held, key=lambda row: row["_row"])]
    monkeypatch.setattr(runner, "answer", answered)
    monkeypatch.setattr(training, "train_lora", trained)
    _, choice = resolve_kind(small_inputs(store, kind="auto"), store, evergreen_home)
    assert choice is not None and choice["kind"] == kind, choice


def test_another_base_or_dataset_is_another_input_key(store: ArtifactStore) -> None:
    spec, base, data = small_spec(), small_base(store), small_dataset(store)
    keys = {
        open_inputs(spec, store, base, data).key,
        open_inputs(spec, store, small_base(store, seed=1), data).key,
        open_inputs(spec, store, base, small_dataset(store, rows=41)).key,
    }
    assert len(keys) == 3


def test_the_fingerprint_tells_adapters_apart(evergreen_home: Path, store: ArtifactStore) -> None:
    from ml_assets.engine.loading import load_base

    one = train_adapter(small_inputs(store), store, evergreen_home)
    other = train_adapter(small_inputs(store, seed=5, learning_rate=0.05), store, evergreen_home)
    base = load_base(small_inputs(store).base_directory)
    prints = {}
    for name, adapter in (("one", one), ("other", other)):
        base.attach(name, store.open(adapter.ref))
        prints[name] = read_json(store.open(adapter.ref) / "manifest.json")["fingerprint"]
    for name, fingerprint in prints.items():
        for active in ("one", "other", None):
            with base.active(active):
                assert matches(fingerprint, measure(base, fingerprint["probes"])) == (active == name)
    assert not matches(prints["one"], [])


def test_an_adapter_that_learned_nothing_is_refused(evergreen_home: Path, store: ArtifactStore) -> None:
    with pytest.raises(NoEffect, match="learned nothing"):
        train_adapter(small_inputs(store, steps=1, learning_rate=1e-7), store, evergreen_home)
    assert not (evergreen_home / "artifacts" / "adapter").exists()
    with pytest.raises(NoEffect):
        make_fingerprint([{"answer": "a"}], [-1.0], [-1.01])


def test_reproduce_uses_what_the_manifest_pins(evergreen_home: Path, store: ArtifactStore) -> None:
    base = small_base(store)
    trained = train_adapter(small_inputs(store), store, evergreen_home)
    # since then the YAML has changed: the reproduction must not follow it
    inputs, manifest = reproduce_inputs(small_spec(rank=2, seed=9), store, trained.ref, base)
    assert inputs.key == manifest["input_key"]
    again = train_adapter(inputs, store, evergreen_home, reuse=False)
    assert not again.reused
    assert compare(store.open(trained.ref), store.open(again.ref)) == {
        "adapter_model.safetensors": True,
        "adapter_config.json": True,
    }
    other = train_adapter(small_inputs(store, seed=9), store, evergreen_home)
    assert compare(store.open(trained.ref), store.open(other.ref))["adapter_model.safetensors"] is False
    with pytest.raises(ValueError, match="was trained on base"):
        reproduce_inputs(small_spec(), store, trained.ref, small_base(store, seed=3))


def test_a_full_disk_publishes_nothing_and_the_next_run_resumes(
    evergreen_home: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = small_inputs(store)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "publish_directory", full)
        with pytest.raises(OSError, match="No space left"):
            train_adapter(inputs, store, evergreen_home, checkpoint_seconds=0)
    assert store.recall("adapter", inputs.key) is None
    resumed = train_adapter(inputs, store, evergreen_home, checkpoint_seconds=0)
    assert resumed.record["resumed_from"] == STEPS - 1
    untouched = train_adapter(inputs, store, evergreen_home, reuse=False)
    assert untouched.ref == resumed.ref


def test_a_damaged_base_or_dataset_is_named(evergreen_home: Path, store: ArtifactStore) -> None:
    base, data = small_base(store), small_dataset(store)
    weights = store.open(base) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: hash is"):
        open_inputs(small_spec(), store, base, data)


def test_a_damaged_adapter_is_trained_again(evergreen_home: Path, store: ArtifactStore) -> None:
    inputs = small_inputs(store)
    first = train_adapter(inputs, store, evergreen_home)
    (store.open(first.ref) / "adapter_config.json").write_text("{}")
    again = train_adapter(inputs, store, evergreen_home)
    assert not again.reused and again.ref == first.ref
    store.open(again.ref)


def test_unknown_targets_are_named(store: ArtifactStore) -> None:
    manifest = small_inputs(store).base_manifest
    with pytest.raises(ValueError, match=r"wq not in tiny@.* it has: q_proj, k_proj"):
        resolve_targets(AdapterRecipe(targets=["q_proj", "wq"]), manifest)
    assert resolve_targets(AdapterRecipe(targets="attention"), manifest) == sorted(
        manifest["lora_targets"]["attention"]
    )


@pytest.mark.slow
def test_sigkill_at_every_step_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Real processes: killed as soon as they print a step, sometimes inside a checkpoint, then run again."""
    whole = _run(tmp_path / "whole")
    digest = whole[-1].split()[2]
    for kill_at in range(1, STEPS, 2):
        home = tmp_path / f"killed-{kill_at}"
        lines = _run(home, kill_at)
        assert lines[-1] == f"step {kill_at}"
        again = _run(home)
        _, resumed_from, found = again[-1].split()
        assert found == digest
        assert kill_at - 1 <= int(resumed_from) <= kill_at


def _run(home: Path, kill_at: int | None = None) -> list[str]:
    """Lines that the training program printed until it ended or, at step `kill_at`, was killed."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(home), "0"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"EVERGREEN_HOME": str(home), "OMP_NUM_THREADS": "1"},
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.strip())
        if kill_at is not None and lines[-1] == f"step {kill_at}":
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    watchdog.cancel()
    assert kill_at is not None or process.returncode == 0
    return lines


def test_the_program_of_these_tests_is_the_trainer(evergreen_home: Path) -> None:
    assert train(evergreen_home).ref.kind == train_module.KIND
