"""From the detectors' state to what people and the decision read: signals, outcome, severity.

Severity follows from harm. An alarm of the inputs, of the label mix or of the answers' lengths says that the
world moved, which is no harm by itself: a warning. More malformed or refused answers than `gate.margin`
allows are harm, and so is an accuracy that fell by more than the margin, measured or estimated: errors. A
look fails on an error, and on any alarm of inputs or outputs that comes together with a loss above the
margin."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ml_assets.drift_reports.detectors import ClassifierDetector, Detector, ScoreDetector
from ml_assets.drift_reports.findings import Group, Outcome, Severity, Signal
from ml_assets.drift_reports.mmd import MmdDetector
from ml_assets.drift_reports.reference import words_of
from ml_assets.drift_reports.watch import FEW_LABELS, Recent, Watch

NAMES: dict[str, Group] = {
    "inputs_classifier": "inputs",
    "inputs_mmd": "inputs",
    "outputs_mix": "outputs",
    "outputs_length": "outputs",
    "outputs_malformed": "outputs",
    "outputs_refusals": "outputs",
    "outcome_feedback": "outcome",
    "outcome_estimated": "outcome",
}
"""Every signal of a report and its group; one asset check each."""
SHOWN = 8
CALIBRATED = 50
"""Rows with confidence and right answer from which confidence can be read."""
NOW = 200
"""Newest requests that an effect is measured on."""


def signals_of(watch: Watch, outcome: Outcome) -> list[Signal]:
    """One signal for each detector that this customization has, in the order of NAMES."""
    return [_signal(watch, name, group, outcome) for name, group in NAMES.items() if name in watch.detectors]


def failed(signals: Sequence[Signal], outcome: Outcome, margin: float) -> bool:
    """Whether this look failed."""
    harm = outcome.loss is not None and outcome.loss > margin
    return any(s.alarm and (s.severity == "error" or (harm and s.group != "outcome")) for s in signals)


def _signal(watch: Watch, name: str, group: Group, outcome: Outcome) -> Signal:
    detector, p = watch.detectors[name], watch.progress
    now = p.recent[-NOW:]
    effect, unit, interval = _effect(watch, name, now, outcome)
    margin = watch.spec.evaluation.gate.margin
    severity: Severity = "warn"
    harmful = name in ("outputs_malformed", "outputs_refusals", "outcome_feedback", "outcome_estimated")
    if detector.alarm and harmful and effect is not None and effect > margin:
        severity = "error"
    return Signal(
        name=name,
        group=group,
        alarm=detector.alarm,
        severity=severity,
        statistic=_statistic(detector),
        e_value=detector.e_value,
        threshold=detector.threshold,
        description=_description(name, detector, effect, unit),
        p_value=detector.p_value,
        effect=effect,
        effect_unit=unit,
        effect_interval=interval,
        alarmed_at=detector.alarmed_at,
        rows=_rows(watch, name) if p.recent or p.labels else [],
    )


def _statistic(detector: Detector) -> float:
    """How far apart reference and requests are in the comparison with the most evidence: the largest
    difference of their distribution functions, or the discrepancy of the longest window."""
    if isinstance(detector, MmdDetector):
        return float(math.sqrt(detector.distances[-1])) if len(detector.distances) else 0.0
    assert isinstance(detector, (ScoreDetector, ClassifierDetector))
    runs = detector.runs
    if not len(runs.ends):
        return 0.0
    counts = runs.counts[int(np.argmax(runs.log_weights + detector.bets.log_evidence(runs.counts)))]
    if not counts.sum():
        return 0.0
    expected = np.cumsum(detector.gaps) / detector.gaps.sum()
    return float(np.abs(np.cumsum(counts) / counts.sum() - expected).max())


def _effect(
    watch: Watch, name: str, now: Sequence[Recent], outcome: Outcome
) -> tuple[float | None, str, tuple[float, float] | None]:
    arrays = watch.reference.arrays
    if name in ("outputs_malformed", "outputs_refusals"):
        column = "malformed" if name == "outputs_malformed" else "refused"
        hits = [getattr(r, column) for r in now]
        effect, interval = _difference(sum(hits), len(hits), arrays[column])
        return effect, "more of the answers", interval
    if name == "outputs_length":
        if not now:
            return None, "", None
        before = float(np.mean(arrays["length"]))  # type: ignore[arg-type]
        return (
            float(np.exp(np.mean([r.length for r in now]) - before) - 1),
            "longer than on the frozen rows",
            None,
        )
    if name == "outputs_mix":
        if not now:
            return None, "", None
        labels = np.array([r.label for r in now])
        size = int(max(labels.max(), arrays["label"].max())) + 1  # type: ignore[type-var]
        shares = np.bincount(labels, minlength=size) / len(labels)
        before = np.bincount(arrays["label"].astype(int), minlength=size) / len(arrays["label"])
        return float(np.abs(shares - before).sum() / 2), "of the answers have another label", None
    if name == "outcome_feedback":
        return (
            (outcome.loss, "accuracy lost, measured", outcome.loss_interval)
            if outcome.measured
            else (None, "", None)
        )
    if name == "outcome_estimated":
        if outcome.estimated_accuracy is None or outcome.reference_accuracy is None:
            return None, "", None
        return outcome.reference_accuracy - outcome.estimated_accuracy, "accuracy lost, estimated", None
    return (
        _statistic(watch.detectors[name]),
        {
            "inputs_classifier": "of the requests, at least, are unlike the reference",
            "inputs_mmd": "mean discrepancy",
        }[name],
        None,
    )


def _difference(
    hits: int, n: int, before: NDArray[np.generic]
) -> tuple[float | None, tuple[float, float] | None]:
    """Difference of two shares with Newcombe's interval (Statistics in Medicine 17, 1998:873-890)."""
    if not n or not len(before):
        return None, None
    p1, p2 = hits / n, float(np.mean(before.astype(float)))
    l1, u1 = wilson(p1, n)
    l2, u2 = wilson(p2, len(before))
    return p1 - p2, (
        p1 - p2 - math.hypot(p1 - l1, u2 - p2),
        p1 - p2 + math.hypot(u1 - p1, p2 - l2),
    )


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927)."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


# -- outcome -------------------------------------------------------------------------------------------


def outcome_of(watch: Watch) -> Outcome:
    """Accuracy and value on the newest labelled requests, and the accuracy that confidence speaks of."""
    about, p = watch.reference.about, watch.progress
    labels = p.labels
    n = len(labels)
    accuracy = sum(x.right for x in labels) / n if n else None
    reference, rows = about["accuracy"], about["frozen_rows"]
    estimated = estimated_accuracy(watch)
    loss = interval = None
    measured = reference is not None and n >= FEW_LABELS
    if measured:
        wrong = watch.reference.arrays["wrong"]
        loss, interval = _difference(sum(not x.right for x in labels), n, wrong)
    elif reference is not None and estimated is not None and rows:
        loss = reference - estimated
    return Outcome(
        labelled=p.labelled,
        accuracy=accuracy,
        accuracy_interval=wilson(accuracy, n) if accuracy is not None else None,
        estimated_accuracy=estimated,
        reference_accuracy=reference,
        value_per_1000=1000 * sum(x.value for x in labels) / n if n else None,
        reference_value_per_1000=about["value_per_1000"],
        loss=loss,
        loss_interval=interval,
        measured=measured,
        measured_on=n,
        usable=watch.usable(),
    )


def estimated_accuracy(watch: Watch) -> float | None:
    """Mean, over the newest requests, of the chance to be right that their confidence had where the right
    answer is known: on the frozen rows and on labelled requests (isotonic regression, Zadrozny and Elkan
    2002; the estimate is that of confidence-based performance estimation). Assumes that an answer of some
    confidence is right as often as before: a changed meaning of the labels stays unseen."""
    arrays, p = watch.reference.arrays, watch.progress
    confidence, wrong = arrays["confidence"].astype(float), arrays["wrong"].astype(float)
    known = ~np.isnan(confidence)
    x = [*confidence[known], *(e.confidence for e in p.labels if e.confidence is not None)]
    y = [*(1 - wrong[known]), *(float(e.right) for e in p.labels if e.confidence is not None)]
    now = [r.confidence for r in p.recent[-NOW:] if r.confidence is not None]
    if len(x) < CALIBRATED or not now:
        return None
    from sklearn.isotonic import IsotonicRegression

    calibration = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(x, y)
    return float(np.mean(calibration.predict(now)))


def unlabelled_of(watch: Watch, most: int) -> list[str]:
    """Ids of recent requests without a right answer: those least like the reference and those that the
    champion was least sure of, by turns."""
    recent, known = watch.progress.recent, set(watch.judged)
    score = dict(zip((r.id for r in recent), watch.strangeness() or [0.0] * len(recent), strict=True))
    open_ = [r for r in recent if r.id not in known and r.prompt]
    strange = sorted(open_, key=lambda r: (-score[r.id], r.seq)) if any(score.values()) else []
    measured = (r for r in open_ if r.confidence is not None)
    unsure = sorted(measured, key=lambda r: (r.confidence or 0.0, -score[r.id], r.seq))
    newest = sorted(open_, key=lambda r: -r.seq)
    chosen: dict[str, None] = {}
    for i in range(len(open_)):
        for some in (strange, unsure) if strange or unsure else (newest,):
            if i < len(some):
                chosen[some[i].id] = None
    return list(chosen)[:most]


# -- rows and words ------------------------------------------------------------------------------------


def _rows(watch: Watch, name: str) -> list[dict[str, str]]:
    """The requests that show a signal best."""
    p = watch.progress
    recent = p.recent
    chosen: list[tuple[Recent, str]] = []
    if name in ("inputs_classifier", "inputs_mmd"):
        strangeness = watch.strangeness() or []
        scored = sorted(zip(strangeness, recent, strict=False), key=lambda pair: -pair[0])
        words = moved_words(watch)
        for score, r in scored[:SHOWN]:
            said = ", ".join(word for word in words if word in words_of(r.prompt)) or "by its meaning"
            chosen.append((r, f"score {score:.1f}; {said}"))
    elif name == "outputs_mix":
        chosen = _other_labels(watch)
    elif name == "outputs_length":
        usual = float(np.mean(watch.reference.arrays["length"]))  # type: ignore[arg-type]
        odd = sorted(recent, key=lambda r: -abs(r.length - usual))[:SHOWN]
        chosen = [(r, f"{math.expm1(r.length):.0f} characters") for r in odd]
    elif name == "outputs_malformed":
        chosen = [(r, "malformed") for r in reversed(recent) if r.malformed][:SHOWN]
    elif name == "outputs_refusals":
        chosen = [(r, "refused") for r in reversed(recent) if r.refused][:SHOWN]
    elif name == "outcome_estimated":
        unsure = sorted((r for r in recent if r.confidence is not None), key=lambda r: r.confidence or 0.0)
        chosen = [(r, f"mean log-probability {r.confidence:.2f}") for r in unsure[:SHOWN]]
    else:
        wrong = [x for x in reversed(p.labels) if not x.right][:SHOWN]
        return [
            {"request": x.id, "prompt": x.prompt, "answer": x.answer, "why": f"right would be: {x.expected}"}
            for x in wrong
        ]
    return [{"request": r.id, "prompt": r.prompt, "answer": r.answer, "why": why} for r, why in chosen]


def _other_labels(watch: Watch) -> list[tuple[Recent, str]]:
    """Answers with the labels that became more frequent."""
    now = watch.progress.recent[-NOW:]
    if not now:
        return []
    counts = Counter(r.label for r in now)
    before = Counter(int(v) for v in watch.reference.arrays["label"])  # type: ignore[arg-type]
    total = max(1, sum(before.values()))
    more = sorted(counts, key=lambda label: -(counts[label] / len(now) - before[label] / total))[:3]
    found = []
    for label in more:
        share, was = counts[label] / len(now), before[label] / total
        why = f"{label_name(watch, label)}: {share:.0%} of the answers, was {was:.0%}"
        found += [(r, why) for r in reversed(now) if r.label == label][:3]
    return found[:SHOWN]


def label_name(watch: Watch, label: int) -> str:
    labels = watch.reference.rule.labels
    return labels[label] if label < len(labels) else "(no known label)"


def moved_words(watch: Watch, most: int = 12) -> list[str]:
    """Words of the newest requests that the reference hardly has: by the z-score of their log-odds with the
    reference as prior (Monroe, Colaresi and Quinn, Political Analysis 16, 2008)."""
    before: dict[str, int] = watch.reference.about["words"]
    texts = [r.prompt for r in watch.progress.recent[-NOW:]]
    n, m = len(texts), max(1, before.get("", 1))
    now = Counter(word for text in texts for word in words_of(text))
    scores: dict[str, float] = {}
    for word, count in now.items():
        prior = before.get(word, 0) + 0.5
        a = math.log((count + 0.5) / (n - count + 0.5))
        b = math.log(prior / (m - prior + 1.5))
        scores[word] = (a - b) / math.sqrt(1 / (count + 0.5) + 1 / prior)
    return [word for word in sorted(scores, key=lambda w: (-scores[w], w)) if scores[word] > 2][:most]


def _description(name: str, detector: Detector, effect: float | None, unit: str) -> str:
    texts = {
        "inputs_classifier": "a classifier tells new requests from the rows that the champion was trained on",
        "inputs_mmd": "windows of requests against those rows, by mean discrepancy",
        "outputs_mix": "the labels of the answers, against those on the frozen rows",
        "outputs_length": "the lengths of the answers, against those on the frozen rows",
        "outputs_malformed": "answers that can't be used, against those on the frozen rows",
        "outputs_refusals": "refused answers, against those on the frozen rows",
        "outcome_feedback": "wrong answers by what users said was right, against those on the frozen rows",
        "outcome_estimated": "the confidence of the answers, against that on the frozen rows",
    }
    if not detector.blocks:
        return f"{texts[name]}: not enough to look at yet"
    said = f"alarm at request {detector.alarmed_at}" if detector.alarm else "no alarm"
    size = (
        ""
        if effect is None
        else f"; {effect:+.3f} {unit}"
        if name == "inputs_mmd"
        else f"; {effect:+.1%} {unit}"
    )
    return f"{texts[name]}: {said}, evidence {detector.e_value:,.3g} of {detector.threshold:,.0f}{size}"
