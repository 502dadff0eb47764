"""Source to dataset artifact: read, compare with what was built before, build, publish."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_assets.artifacts import ArtifactRef, ArtifactStore, canonical_json, sha256_bytes
from ml_assets.datasets.snapshot import (
    CODE_VERSION,
    Snapshot,
    build_manifest,
    build_snapshot,
    load_manifest,
    load_rows,
    write_snapshot,
)
from ml_assets.datasets.sources import read_source
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec

KIND = "dataset"


@dataclass(frozen=True)
class BuiltDataset:
    """A dataset, what the build found out (`record`: examples of removed rows, what the checks judge), and
    whether nothing had to be built."""

    ref: ArtifactRef
    source_version: str
    record: dict[str, Any]
    reused: bool


def build_dataset(
    spec: CustomizationSpec,
    root: Path,
    settings: Settings,
    store: ArtifactStore,
    accept: Callable[[dict[str, Any]], None] = lambda record: None,
) -> BuiltDataset:
    """The dataset of a customization, as its source is now.

    `accept` gets the record before anything is published, and may raise: then the dataset before this one
    stays the current one. Unchanged inputs build nothing, and changed ones that lead to the same rows give
    the same artifact.

    Raises SourceError, SnapshotError, RedactionUnavailable, ArtifactError, OSError (disk full).
    """
    source = read_source(spec.source, root, settings)
    version = source.version()
    head = store.recall(KIND, f"head-{spec.name}")
    parent = head[0] if head else None
    key = _input_key(spec, version, parent)
    known = store.recall(KIND, key)
    if known is not None:
        ref, record = known
        accept(record)
        return BuiltDataset(ref, version, record, reused=True)

    directory = store.open(parent) if parent else None
    frozen = load_rows(directory, "evaluation") if directory else None
    snapshot = build_snapshot(spec, source, frozen)
    record = _record(snapshot)
    accept(record)
    manifest = build_manifest(spec, snapshot, version, parent.digest if parent else None)
    if parent and directory and _same(snapshot, manifest, directory):
        ref = parent
    else:
        with store.staging(KIND) as staging:
            write_snapshot(snapshot, staging, manifest)
            ref = store.publish_directory(KIND, staging)
    # with this dataset as its own parent the same source gives it again
    for known_key in (key, _input_key(spec, version, ref)):
        store.remember(KIND, known_key, ref, record)
    store.remember(KIND, f"head-{spec.name}", ref, {"source_version": version})
    return BuiltDataset(ref, version, record, reused=False)


def _input_key(spec: CustomizationSpec, version: str, parent: ArtifactRef | None) -> str:
    inputs = {
        "code": CODE_VERSION,
        "customization": spec.name,
        "source": version,
        "dataset": spec.dataset.model_dump(),
        "prompt": spec.prompt.model_dump(),
        "columns": spec.columns(),
        "segments": spec.evaluation.segments,
        "task": spec.evaluation.task,
        "max_length": spec.adapter.max_length,
        "parent": parent.digest if parent else None,
    }
    return sha256_bytes(canonical_json(inputs))


def _same(snapshot: Snapshot, manifest: dict[str, Any], parent: Path) -> bool:
    """Whether the parent has these rows and was made by the same rules."""
    before = load_manifest(parent)
    return (
        before["spec"]["dataset"] == manifest["spec"]["dataset"]
        and before["spec"]["prompt"] == manifest["spec"]["prompt"]
        and before["columns"] == manifest["columns"]
        and load_rows(parent, "train") == snapshot.train
        and load_rows(parent, "evaluation") == snapshot.evaluation
    )


def _record(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "rows": {"train": len(snapshot.train), "evaluation": len(snapshot.evaluation)},
        "removed": snapshot.removed,
        "redacted": snapshot.redacted,
        "examples": snapshot.examples,
        "measured": snapshot.measured,
    }
