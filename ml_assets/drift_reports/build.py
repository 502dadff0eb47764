"""One look at the traffic: from the state of the last one to a published report with the next state.

State and the number of the last request that is in it are one artifact, and the note that names the
artifact is replaced at once: a look that is killed at any moment leaves the one before, and no request is
counted twice."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from ml_assets.artifacts import ArtifactRef, ArtifactStore, canonical_json, sha256_bytes
from ml_assets.drift_reports.findings import DriftFindings, Look, Outcome
from ml_assets.drift_reports.observe import observe
from ml_assets.drift_reports.reference import Champion, Models, find_reference, reference_key
from ml_assets.drift_reports.report import draw, render_html
from ml_assets.drift_reports.signals import failed, outcome_of, signals_of, unlabelled_of
from ml_assets.drift_reports.watch import Watch
from ml_assets.endpoints.ledger import Release
from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.records import Judged, TrafficRecord

KIND = "drift_report"
LOOKS = 50
"""Looks that a report remembers."""
UNLABELLED = 500
CHUNK = 1000
"""Requests read at a time."""


class Traffic(Protocol):
    """What a look reads; `ml_assets.traffic.store.TrafficLog` has it."""

    def requests(
        self, customization: str, after_seq: int = 0, until_seq: int | None = None, limit: int | None = None
    ) -> list[TrafficRecord]: ...

    def feedback(self, customization: str, after_seq: int = 0) -> list[Judged]: ...


@dataclass(frozen=True)
class BuiltLook:
    """A published report. `pictures` are data URIs by name; `reused` when there was nothing new to look
    at."""

    ref: ArtifactRef
    findings: DriftFindings
    pictures: dict[str, str | None]
    reused: bool


def champion_of(history: Sequence[Release]) -> Champion | None:
    """What serves, from the ledger's rows, newest first; None when nothing does. New limits of an endpoint
    are no new champion."""
    if not history or history[0].action == "withdraw":
        return None
    first = now = history[0]
    for row in history[1:]:
        if row.action == "withdraw" or row.adapter_digest != now.adapter_digest:
            break
        first = row
    return Champion(now.adapter_digest, now.base_digest, now.base_revision, now.report_digest, first.id)


def look(
    spec: CustomizationSpec,
    store: ArtifactStore,
    home: Path,
    champion: Champion | None,
    traffic: Traffic,
    at: datetime | None = None,
) -> BuiltLook:
    """Look at what came since the last look, and publish the report.

    Raises ArtifactError when the champion's adapter, dataset or eval report is gone or damaged.
    """
    at = at or datetime.now(UTC)
    if champion is None:
        return _nothing(spec, store, at)
    if spec.drift.embedding == "hashing":
        return _look(spec, store, home, champion, traffic, at)
    from ml_assets.engine import hardware

    with hardware.computing(home):
        return _look(spec, store, home, champion, traffic, at)


def _look(
    spec: CustomizationSpec,
    store: ArtifactStore,
    home: Path,
    champion: Champion,
    traffic: Traffic,
    at: datetime,
) -> BuiltLook:
    models = Models(spec, store, home, champion)
    reference = find_reference(spec, store, champion, models)
    watch = Watch(spec, reference, float(spec.drift.one_false_alarm_in.removesuffix("d")))
    key, newest = reference_key(spec, champion), _newest_key(spec)
    known = store.recall(KIND, key)
    before: DriftFindings | None = None
    if known:
        directory = store.open(known[0])
        watch.load({name: (directory / name).read_bytes() for name in ("state.safetensors", "state.json")})
        before = read_findings(store, known[0])
    elif last := store.recall(
        KIND, newest
    ):  # another champion: what came before it was looked at with that one
        watch.progress.to_seq = int(last[1]["to_seq"])
    read = watch.progress.to_seq, watch.progress.feedback_seq
    while records := traffic.requests(spec.name, after_seq=watch.progress.to_seq, limit=CHUNK):
        ours = [r for r in records if r.adapter_digest == champion.adapter_digest and r.status == 200]
        template = reference.about["template"]
        watch.add([(observe(spec, reference.rule, r, template), r.answer or "") for r in ours], models.embed)
        watch.progress.to_seq = max(watch.progress.to_seq, *(r.seq or 0 for r in records))
    judged = traffic.feedback(spec.name, after_seq=watch.progress.feedback_seq)
    watch.judge([j for j in judged if j.request.adapter_digest == champion.adapter_digest])
    watch.progress.feedback_seq = max([watch.progress.feedback_seq, *(j.feedback.seq or 0 for j in judged)])
    drawn = draw(watch)
    if before and known and read == (watch.progress.to_seq, watch.progress.feedback_seq):
        return BuiltLook(known[0], before, drawn, reused=True)

    outcome = outcome_of(watch)
    signals = signals_of(watch, outcome)
    bad = failed(signals, outcome, spec.evaluation.gate.margin)
    p = watch.progress
    this = Look(p.to_seq, at.isoformat(timespec="microseconds"), bad, [s.name for s in signals if s.alarm])
    findings = DriftFindings(
        customization=spec.name,
        adapter_digest=champion.adapter_digest,
        base_revision=champion.base_revision,
        dataset_digest=reference.about["dataset_digest"],
        from_seq=p.from_seq,
        to_seq=p.to_seq,
        requests=p.read,
        requests_per_day=_per_day(p.read, p.first_at, p.last_at),
        at=this.at,
        signals=signals,
        outcome=outcome,
        looks=[*(before.looks if before else []), this][-LOOKS:],
        unlabelled=unlabelled_of(watch, max(UNLABELLED, spec.maintenance.ask_for_labels)),
        feedback_seq=p.feedback_seq,
    )
    report = json.dumps(findings.to_json(), sort_keys=True, ensure_ascii=True).encode()
    files = {
        "report.json": report,
        "report.html": render_html(watch, findings, drawn).encode(),
        "reference.json": canonical_json({"kind": reference.ref.kind, "digest": reference.ref.digest}),
        **watch.save(),
    }
    ref = store.publish(KIND, files)
    store.remember(KIND, newest, ref, {"to_seq": p.to_seq})
    store.remember(KIND, key, ref, {"to_seq": p.to_seq})
    return BuiltLook(ref, findings, drawn, reused=False)


def _nothing(spec: CustomizationSpec, store: ArtifactStore, at: datetime) -> BuiltLook:
    """The report of an endpoint without a champion: without signals and looks."""
    findings = DriftFindings(
        customization=spec.name,
        adapter_digest="",
        base_revision="",
        dataset_digest="",
        from_seq=0,
        to_seq=0,
        requests=0,
        requests_per_day=0.0,
        at=at.isoformat(timespec="microseconds"),
        signals=[],
        outcome=Outcome(0, None, None, None, None, None, None, None),
        looks=[],
    )
    ref = store.publish(KIND, {"report.json": json.dumps(findings.to_json(), sort_keys=True).encode()})
    return BuiltLook(ref, findings, {}, reused=False)


def read_findings(store: ArtifactStore, ref: ArtifactRef) -> DriftFindings:
    """The findings of a published report. Raises ArtifactError when it is damaged."""
    return DriftFindings.from_json(json.loads((store.open(ref) / "report.json").read_bytes()))


def _newest_key(spec: CustomizationSpec) -> str:
    return sha256_bytes(canonical_json({"newest": spec.name}))


def _per_day(requests: int, first: str, last: str) -> float:
    """Requests a day; what came within an hour counts as an hour's."""
    try:
        passed = datetime.fromisoformat(last) - datetime.fromisoformat(first)
    except ValueError:
        return 0.0
    return requests / (max(passed, timedelta(hours=1)) / timedelta(days=1))
