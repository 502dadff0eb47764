"""Worker: what the main job computes, by the same functions, one after another in one plain process."""

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import declared_base
from benchmarks.worker import serve
from ml_assets.adapters.train import open_inputs, train_adapter
from ml_assets.artifacts import ArtifactRef, ArtifactStore
from ml_assets.base_models.build import build_base
from ml_assets.base_models.register import current_revision
from ml_assets.datasets.build import build_dataset
from ml_assets.endpoints.ledger import Ledger, Release
from ml_assets.endpoints.release import release
from ml_assets.eval_reports.build import build_report
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from resources.gateway import GatewayResource

Answer = dict[str, Any]


def read_spec(folder: str) -> CustomizationSpec:
    content = yaml.safe_load((Path(folder) / "defs.yaml").read_text(encoding="utf-8"))
    return CustomizationSpec.model_validate(content["attributes"])


def _base() -> tuple[ArtifactRef, str]:
    settings = Settings.from_env()
    families, root = declared_base()
    revision = current_revision(families.families[0], root, settings)
    store = ArtifactStore(settings.artifacts_url)
    return build_base(revision, families.families, root, settings, store).ref, revision


def run(folder: str) -> Answer:
    """Everything for the customization of `folder`: `steps` holds [start, end] of each asset's computation,
    `first_step` the end of the first training step, in seconds of the epoch."""
    settings = Settings.from_env()
    store, spec, root = ArtifactStore(settings.artifacts_url), read_spec(folder), Path(folder)
    base_model, revision = _base()
    steps: dict[str, list[float]] = {}
    first: list[float] = []

    def done(name: str, start: float) -> None:
        steps[name] = [start, time.time()]

    start = time.time()
    dataset = build_dataset(spec, root, settings, store).ref
    done("dataset", start)

    start = time.time()
    inputs = open_inputs(spec, store, base_model, dataset)
    adapter = train_adapter(
        inputs, store, settings.home, on_progress=lambda _: None if first else first.append(time.time())
    ).ref
    done("adapter", start)

    start = time.time()
    report = build_report(
        spec,
        root,
        store,
        settings.home,
        adapter=adapter,
        dataset=dataset,
        base_model=base_model,
        champion=None,
    )
    done("eval_report", start)

    start = time.time()
    candidate = Release(
        customization=spec.name,
        base_revision=revision,
        base_digest=base_model.digest,
        adapter_digest=adapter.digest,
        report_digest=report.ref.digest,
        mlflow_version="1",
        max_new_tokens=spec.endpoint.max_new_tokens,
        run_id="benchmark",
        actor="benchmark",
        reason="benchmark",
    )
    with GatewayResource().client() as gateway, closing(Ledger(settings.ledger_url)) as ledger:
        release(candidate, ledger=ledger, store=store, gateway=gateway, move_alias=lambda _: None)
    done("endpoint", start)
    return {"steps": steps, "first_step": first[0]}


def adapter(folder: str) -> Answer:
    """The adapter of the customization of `folder` alone, as its release says: what a gateway needs."""
    settings = Settings.from_env()
    store, spec = ArtifactStore(settings.artifacts_url), read_spec(folder)
    base_model, revision = _base()
    dataset = build_dataset(spec, Path(folder), settings, store).ref
    made = train_adapter(open_inputs(spec, store, base_model, dataset), store, settings.home).ref
    candidate = Release(
        customization=spec.name,
        base_revision=revision,
        base_digest=base_model.digest,
        adapter_digest=made.digest,
        report_digest="",
        mlflow_version="1",
        max_new_tokens=spec.endpoint.max_new_tokens,
        run_id="benchmark",
        actor="benchmark",
        reason="benchmark",
    )
    with closing(Ledger(settings.ledger_url)) as ledger:
        current = ledger.current(spec.name)
        if current is None or current.adapter_digest != made.digest:
            with ledger.release_transaction(spec.name, candidate.run_id) as transaction:
                transaction.record(candidate)
    return {"name": spec.name, "folder": str(store.open(made)), "base": str(store.open(base_model))}


if __name__ == "__main__":
    serve({"run": run, "adapter": adapter})
