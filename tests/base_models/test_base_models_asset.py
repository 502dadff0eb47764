"""The base_model asset in Dagster: materialized, memoized, checked, and what happens to bad input."""

import shutil
from pathlib import Path

import dagster as dg
import pytest
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from ml_assets.artifacts import ArtifactError, ArtifactRef
from ml_assets.base_models import conversion
from ml_assets.base_models.asset import build_base_model_asset
from ml_assets.base_models.identity import identify, revision_key
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.spec import BaseFamily, DirectoryBase
from resources.artifact_store import ArtifactRefIOManager, ArtifactStoreResource
from resources.base_model_hub import BaseModelHub

KEY = dg.AssetKey("base_model")


def resources() -> dict[str, object]:
    return {
        "artifact_store": ArtifactStoreResource(),
        "base_model_hub": BaseModelHub(),
        "io_manager": ArtifactRefIOManager(),
    }


class Deployment:
    """A Dagster instance with one declared family `tiny` whose source is the directory `source`."""

    def __init__(
        self, root: Path, instance: dg.DagsterInstance, architecture: str = "llama", **options: bool
    ):
        self.instance = instance
        self.source = tiny_model(architecture, root / "source", **options)
        self.families = [
            BaseFamily(
                name="tiny", source=DirectoryBase(kind="directory", path="source"), description="small"
            )
        ]
        self.asset = build_base_model_asset(self.families, root)
        self.store = ArtifactStoreResource().store()

    def revision(self) -> str:
        return revision_key("tiny", identify(self.source))

    def materialize(self, revision: str | None = None) -> dg.ExecuteInProcessResult:
        revision = revision or self.revision()
        self.instance.add_dynamic_partitions(str(BASE_MODELS.name), [revision])
        return dg.materialize(
            [self.asset],
            partition_key=revision,
            instance=self.instance,
            raise_on_error=False,
            resources=resources(),
        )

    def failure(self, revision: str | None = None) -> str:
        result = self.materialize(revision)
        assert not result.success
        events = [event for event in result.all_events if event.is_step_failure]
        assert len(events) == 1 and not [event for event in result.all_events if event.is_step_up_for_retry]
        error = events[0].step_failure_data.error
        assert error is not None
        data = events[0].step_failure_data.user_failure_data
        return data.description if data else error.message


@pytest.fixture(scope="module")
def one_instance():
    with dg.instance_for_test() as instance:
        yield instance


@pytest.fixture
def instance(one_instance: dg.DagsterInstance) -> dg.DagsterInstance:
    """Shared, since making one takes seconds; each test has an artifact store of its own."""
    return one_instance


def materialization(result: dg.ExecuteInProcessResult) -> dg.AssetMaterialization:
    [event] = result.asset_materializations_for_node("base_model")
    return event


def test_a_revision_is_materialized_and_shown(tmp_path: Path, instance: dg.DagsterInstance):
    deployment = Deployment(tmp_path, instance)
    result = deployment.materialize()
    assert result.success
    ref = result.output_for_node("base_model")
    assert isinstance(ref, ArtifactRef) and ref.kind == "base_model"
    event = materialization(result)
    assert event.partition == deployment.revision()
    assert event.tags is not None and event.tags["dagster/data_version"] == ref.digest

    metadata = event.metadata
    facts = {r.data["fact"]: r.data["value"] for r in metadata["facts"].records}
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["content hash"] == identify(deployment.source)
    assert {r.data["targets"] for r in metadata["lora_targets"].records} == {"all-linear", "attention"}
    assert "<|im_start|>user\nIs the light on?" in str(metadata["chat_template_example"].value)
    assert metadata["parameters"].value == 99648 and metadata["context_length"].value == 512
    assert metadata["digest"].value == ref.digest
    assert Path(str(metadata["dagster/uri"].value)).is_dir()

    checks = {e.check_name: e for e in result.get_asset_check_evaluations()}
    assert set(checks) == {"finite_logits", "better_than_chance", "tokenizer_round_trip", "chat_template"}
    assert checks["finite_logits"].passed and checks["tokenizer_round_trip"].passed
    assert {check.partition for check in checks.values()} == {deployment.revision()}

    @dg.asset(partitions_def=BASE_MODELS, ins={"base": dg.AssetIn(key=KEY)}, io_manager_key="none")
    def downstream(base: ArtifactRef) -> dg.MaterializeResult:
        return dg.MaterializeResult(metadata={"base": base.digest})

    handed_on = dg.materialize(
        [deployment.asset, downstream],
        selection=[downstream],
        partition_key=deployment.revision(),
        instance=instance,
        resources=resources() | {"none": dg.mem_io_manager},
    )
    [event] = handed_on.asset_materializations_for_node("downstream")
    assert event.metadata["base"].value == ref.digest

    directory = deployment.store.open(ref)
    model, tokenizer = conversion.load(directory)
    assert model.num_parameters() == 99648 and len(tokenizer) == 400


def test_the_engine_loads_it(tmp_path: Path, instance: dg.DagsterInstance):
    from ml_assets.engine.loading import load_base

    deployment = Deployment(tmp_path, instance, "gpt2", chat_template=False)
    base = load_base(deployment.store.open(deployment.materialize().output_for_node("base_model")))
    assert base.chat.plain and base.context_length == 512
    assert base.manifest["revision"] == deployment.revision()
    assert base.manifest["chat_template"] == "plain"


def test_made_once(tmp_path: Path, instance: dg.DagsterInstance):
    deployment = Deployment(tmp_path, instance)
    revision = deployment.revision()
    first = deployment.materialize()
    shutil.rmtree(deployment.source)  # the artifact is enough from now on
    again = deployment.materialize(revision)
    assert again.success
    assert again.output_for_node("base_model") == first.output_for_node("base_model")
    before, after = materialization(first).metadata, materialization(again).metadata
    assert (before["reused"].value, after["reused"].value) == (False, True)
    assert len(again.get_asset_check_evaluations()) == 4


def test_another_copy_of_the_base_gives_the_same_artifact(tmp_path: Path, instance: dg.DagsterInstance):
    refs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        deployment = Deployment(tmp_path / name, instance)
        result = deployment.materialize()
        refs.append(result.output_for_node("base_model"))
        shutil.rmtree(Path(deployment.store.root) / "index")  # forget, so that it is made again
    assert refs[0] == refs[1]


def test_undeclared_family(tmp_path: Path, instance: dg.DagsterInstance):
    deployment = Deployment(tmp_path, instance)
    message = deployment.failure("other@0123456789ab")
    assert "no base model 'other' is declared; declared: tiny" in message
    assert "expected a family, '@' and 12 hex digits" in deployment.failure("tiny")


def test_corrupted_source_names_both_hashes(tmp_path: Path, instance: dg.DagsterInstance):
    deployment = Deployment(tmp_path, instance)
    revision = deployment.revision()
    path = deployment.source / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    message = deployment.failure(revision)
    assert "hash mismatch" in message and revision in message and deployment.revision() in message
    path.write_bytes(data[:-5])
    assert "model.safetensors" in deployment.failure(revision)
    assert "truncated" in deployment.failure(revision)


def test_corrupted_artifact_is_named_and_made_again(tmp_path: Path, instance: dg.DagsterInstance):
    deployment = Deployment(tmp_path, instance)
    ref = deployment.materialize().output_for_node("base_model")
    path = deployment.store.open(ref) / "model.safetensors"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ArtifactError, match=r"model\.safetensors: hash is [0-9a-f]{64}, expected [0-9a-f]{64}"
    ):
        deployment.store.open(ref)

    result = deployment.materialize()
    assert result.success and result.output_for_node("base_model") == ref
    assert deployment.store.open(ref) == path.parent
    logged = [record.user_message for record in instance.all_logs(result.run_id)]
    assert any("damaged artifact" in text and "model.safetensors: hash is" in text for text in logged)


def test_corrupted_artifact_whose_source_is_gone(tmp_path: Path, instance: dg.DagsterInstance):
    deployment = Deployment(tmp_path, instance)
    revision = deployment.revision()
    ref = deployment.materialize().output_for_node("base_model")
    (Path(deployment.store.location(ref)) / "tokenizer.json").unlink()
    shutil.rmtree(deployment.source)
    assert "source: no such directory" in deployment.failure(revision)


def test_nothing_of_a_broken_base_is_published(tmp_path: Path, instance: dg.DagsterInstance):
    deployment = Deployment(tmp_path, instance)
    path = deployment.source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    assert "NaN or infinity in tensor 'model.norm.weight'" in deployment.failure()
    root = Path(deployment.store.root)
    assert not [p for p in root.rglob("*") if p.is_file()]


def test_full_disk_publishes_nothing(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
):
    deployment = Deployment(tmp_path, instance)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ml_assets.artifacts.os.fsync", full)
        result = deployment.materialize()
    assert not result.success
    assert not list(Path(deployment.store.root).glob("base_model/*"))
    assert deployment.materialize().success


def test_loading_the_asset_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, ml_assets.base_models.asset, sensors.base_updates, resources.base_model_hub;"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'safetensors') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
