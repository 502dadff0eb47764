"""The page of a drift report, and what it says in a sentence."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ml_assets.drift_reports import pictures
from ml_assets.drift_reports.findings import DriftFindings
from ml_assets.drift_reports.signals import NOW, moved_words
from ml_assets.drift_reports.watch import Watch

NOTHING = "Nothing to look at yet"


def headline(findings: DriftFindings) -> str:
    """One sentence for someone who reads nothing else."""
    if not findings.signals or not findings.requests:
        return f"{NOTHING}: {'no requests were answered' if findings.adapter_digest else 'nothing serves'}."
    alarms = [s.name for s in findings.signals if s.alarm]
    count = f"{findings.requests:,} requests"
    if not alarms:
        return f"Nothing has changed that {count} would show."
    loss, outcome = findings.outcome.loss, findings.outcome
    how = "measured" if outcome.measured else "estimated"
    harm = (
        ""
        if loss is None
        else f" Accuracy is {100 * abs(loss):.1f} points {'lower' if loss >= 0 else 'higher'} ({how})."
    )
    return f"{count}: in alarm {', '.join(alarms)}.{harm}"


def draw(watch: Watch) -> dict[str, str | None]:
    """`evidence`, `series` and `mix` as PNG data URIs, None for what there is nothing to draw of."""
    detectors, arrays, p = watch.detectors, watch.reference.arrays, watch.progress
    threshold = next(iter(detectors.values())).threshold if detectors else 1.0
    before: dict[str, float | None] = {}
    if len(arrays["wrong"]):
        known = arrays["confidence"].astype(float)
        known = known[~np.isnan(known)]
        before = {
            "malformed": float(arrays["malformed"].astype(float).mean()),
            "refused": float(arrays["refused"].astype(float).mean()),
            "characters": float(arrays["length"].astype(float).mean()),
            "confidence": float(known.mean()) if len(known) else None,
        }
    return {
        "evidence": pictures.evidence({name: d.trail for name, d in detectors.items()}, threshold),
        "series": pictures.series(p.series, before),
        "mix": _mix(watch),
    }


def _mix(watch: Watch) -> str | None:
    labels = watch.reference.rule.labels
    now, then = watch.progress.recent[-NOW:], watch.reference.arrays["label"]
    if not labels or not now or not len(then):
        return None
    names = [*labels, "(none of these)"]
    counts, before = Counter(r.label for r in now), Counter(int(v) for v in then)  # type: ignore[arg-type]
    return pictures.mix(
        names,
        [before[i] / len(then) for i in range(len(names))],
        [counts[i] / len(now) for i in range(len(names))],
    )


def render_html(watch: Watch, findings: DriftFindings, drawn: dict[str, str | None]) -> str:
    """The report as one self-contained page: no scripts, no links to anything outside."""
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        percent=lambda v: "–" if v is None else f"{v:.1%}",
        money=lambda v: "–" if v is None else f"{v:,.2f}",
    )
    failed = bool(findings.looks and findings.looks[-1].failed)
    alarm = any(s.alarm for s in findings.signals)
    values: dict[str, Any] = {
        "findings": findings,
        "state": "failed" if failed else "moved" if alarm else "quiet",
        "title": "Failed" if failed else "The traffic has moved" if alarm else "Quiet",
        "headline": headline(findings),
        "pictures": drawn,
        "repeated": watch.progress.repeated,
        "currency": watch.spec.evaluation.value.currency,
        "days": watch.spec.drift.one_false_alarm_in.removesuffix("d"),
        "words": moved_words(watch) if alarm and watch.progress.recent else [],
    }
    return environment.from_string(template).render(**values).encode("utf-8", "replace").decode("utf-8")
