"""Source to dataset artifact: read, compare with what was built before, build, publish."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_assets.artifacts import ArtifactRef, ArtifactStore, canonical_json, sha256_bytes
from ml_assets.datasets.feedback import FeedbackRows, feedback_rows
from ml_assets.datasets.snapshot import (
    CODE_VERSION,
    SHOWN,
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
from ml_assets.traffic.records import Judged

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
    judged: Sequence[Judged] = (),
) -> BuiltDataset:
    """The dataset of a customization, as its source is now, with what users said was right (`judged`).

    `accept` gets the record before anything is published, and may raise: then the dataset before this one
    stays the current one. Unchanged inputs build nothing, and changed ones that lead to the same rows give
    the same artifact.

    Raises SourceError, SnapshotError, RedactionUnavailable, ArtifactError, OSError (disk full).
    """
    source = read_source(spec.source, root, settings)
    version = source.version()
    head = store.recall(KIND, f"head-{spec.name}")
    parent = head[0] if head else None
    feedback = feedback_rows(spec, judged)
    key = _input_key(spec, version, feedback, parent)
    known = store.recall(KIND, key)
    if known is not None:
        ref, record = known
        accept(record)
        return BuiltDataset(ref, version, record, reused=True)

    directory = store.open(parent) if parent else None
    frozen = load_rows(directory, "evaluation") if directory else None
    snapshot = build_snapshot(spec, source, frozen, feedback.said)
    record = _record(snapshot, feedback)
    accept(record)
    manifest = build_manifest(spec, snapshot, version, parent.digest if parent else None)
    if parent and directory and _same(snapshot, manifest, directory):
        ref = parent
    else:
        with store.staging(KIND) as staging:
            write_snapshot(snapshot, staging, manifest)
            ref = store.publish_directory(KIND, staging)
    # with this dataset as its own parent the same source gives it again
    for known_key in (key, _input_key(spec, version, feedback, ref)):
        store.remember(KIND, known_key, ref, record)
    store.remember(KIND, f"head-{spec.name}", ref, {"source_version": version})
    return BuiltDataset(ref, version, record, reused=False)


def _input_key(
    spec: CustomizationSpec, version: str, feedback: FeedbackRows, parent: ArtifactRef | None
) -> str:
    inputs: dict[str, Any] = {
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
    if feedback.version:  # without any, the key is that of before there was feedback
        inputs["feedback"] = {"said": feedback.version, "rules": spec.feedback.model_dump()}
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


def _record(snapshot: Snapshot, feedback: FeedbackRows) -> dict[str, Any]:
    removed, examples = dict(snapshot.removed), list(snapshot.examples)
    if feedback.unusable:
        removed["feedback_unusable"] = removed.get("feedback_unusable", 0) + len(feedback.unusable)
        because = "the conversation or the right answer does not have the form of the prompt"
        examples += [
            {"reason": "feedback_unusable", "row": " ".join(text.split())[:240], "because": because}
            for text in feedback.unusable[:SHOWN]
        ]
    return {
        "rows": {"train": len(snapshot.train), "evaluation": len(snapshot.evaluation)},
        "removed": removed,
        "redacted": snapshot.redacted,
        "examples": examples,
        "measured": snapshot.measured,
        "feedback": snapshot.feedback,
    }
