"""The gate: may a candidate replace what serves? A pure function of rows, so that anyone can decide again.

`promote` needs evidence, and so does `reject`; everything between is `undecided`, with the rows that would
settle it. Against a champion the question is non-inferiority by a margin, against a base that only has to be
prompted it is superiority: an adapter that is merely as good as doing nothing is not worth serving.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from ml_assets.eval_reports.metrics import metric_name
from ml_assets.eval_reports.statistics import (
    critical_value,
    design_effect,
    mean_bounds,
    rows_needed,
    tango_bounds,
)
from ml_assets.eval_reports.value import row_values, value_range
from ml_assets.spec import EvaluationSpec

Row = Mapping[str, Any]
Verdict = Literal["promote", "reject", "undecided"]
ALL = "all rows"
DISPUTED = 3
"""Rows that failed in production, were trained on and are wrong again, from which the rows are in doubt."""


@dataclass(frozen=True)
class Difference:
    """Candidate minus reference on the deciding metric, with one-sided bounds of error alpha each."""

    metric: str
    rows: int
    effective_rows: float
    candidate: float
    reference: float
    estimate: float
    lower: float
    upper: float
    gains: int
    losses: int


@dataclass(frozen=True)
class SegmentFlips:
    """Rows of one segment that were right before and are wrong now; bounds of their share."""

    segment: str
    rows: int
    losses: int
    gains: int
    share: float
    lower: float
    upper: float
    status: Literal["within", "above", "perhaps above", "too few rows"]


@dataclass(frozen=True)
class ValueDifference:
    """Value per 1,000 requests, candidate minus reference, with one-sided bounds of error alpha each."""

    currency: str
    candidate: float
    reference: float
    estimate: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Decision:
    """What the gate says and why. `needs_rows`: evaluation rows in all; `more_rows`: beyond these."""

    verdict: Verdict
    against: Literal["champion", "base"]
    reference: str
    claim: Literal["better", "as good as"] | None
    reasons: list[str]
    notes: list[str]
    threshold: float
    alpha: float
    power: float
    needs_rows: int | None
    more_rows: int | None
    difference: Difference | None
    flips: list[SegmentFlips]
    value: ValueDifference | None
    must_pass: dict[str, Any]
    forgetting: float | None
    labels_from_champion: bool
    common_rows: int
    looks: int = 1
    look: int = 1
    left_out: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def is_sampled(row: Row) -> bool:
    """Whether a row is part of the random sample behind the means: must-pass rows are chosen by hand."""
    return bool(row.get("sampled", not row["must_pass"]))


def decide(
    candidate_rows: Sequence[Row],
    reference_rows: Sequence[Row],
    spec: EvaluationSpec,
    *,
    against: Literal["champion", "base"],
    forgetting: float | None = None,
    labels_from_champion: bool = False,
    looks: int = 1,
    look: int = 1,
) -> Decision:
    """Compare evaluated rows (the dicts of rows.jsonl) of two arms on the rows that both have.

    `forgetting`: rise of the negative log-likelihood of neutral text, nats per token; None: not measured.
    `labels_from_champion`: the expected answers came from the champion, so that nothing can be shown better.
    `looks`: how many candidates may be compared on these rows until one is promoted; this is number `look` of
    them. Each has its share of alpha (`share_alpha`), so that the chance of promoting one that is worse by
    the margin is alpha in all.
    Raises ValueError when an arm has a row twice, or a row lacks the deciding metric.
    """
    candidate, reference = _by_row(candidate_rows, "candidate"), _by_row(reference_rows, "reference")
    common = sorted(row for row in candidate if row in reference and is_sampled(candidate[row]))
    pairs = [(candidate[row], reference[row]) for row in common]
    arm = str(reference_rows[0]["arm"]) if reference_rows else against
    whole, spec = spec, share_alpha(spec, looks, look)
    gate = spec.gate
    threshold = -gate.margin if against == "champion" else gate.min_gain
    rejections: list[str] = []
    doubts: list[str] = []
    notes: list[str] = []

    must_pass = _must_pass(candidate_rows, reference, against, rejections, notes)
    difference = _difference(pairs, spec, threshold) if pairs else None
    needs = None
    if difference is None:
        doubts.append("candidate and reference have no evaluated row in common")
    else:
        needs = _judge(difference, against, arm, spec, threshold, rejections, doubts)
    # these can only refuse: they keep the whole of alpha
    flips = _flips(pairs, whole, rejections, doubts, notes) if pairs else []
    value = _value(pairs, whole, against, arm, rejections) if pairs else None
    if forgetting is not None and not forgetting <= gate.max_forgetting:  # NaN is too much, too
        rejections.append(
            f"forgetting: the negative log-likelihood of neutral text rises by {forgetting:.3f} nats per "
            f"token, allowed are {gate.max_forgetting:g}"
        )
    for part in flips:
        if difference is not None and part.status == "perhaps above":
            more = _rows_for_share(part.share, gate.max_negative_flips, whole.gate.alpha, gate.power)
            if more is not None:
                needs = max(needs or 0, math.ceil(more * difference.rows / part.rows))

    verdict: Verdict = "reject" if rejections else "undecided" if doubts else "promote"
    claim: Literal["better", "as good as"] | None = None
    if verdict == "promote" and difference is not None:
        better = difference.lower > 0 and not labels_from_champion
        claim = "better" if better else "as good as"
    reasons = rejections or doubts
    if verdict == "promote" and difference is not None:
        reasons = [_promotion(difference, against, arm, spec, claim)]
    if looks > 1:
        notes.append(
            f"look {look} of {looks} at these rows that were planned: it may promote a candidate that is "
            f"worse by the margin with a probability of at most {gate.alpha:.2%}"
        )
    if labels_from_champion:
        notes.append(
            "the expected answers came from the champion: 'as good as' is the most that they can show"
        )
    return Decision(
        verdict=verdict,
        against=against,
        reference=arm,
        claim=claim,
        reasons=reasons,
        notes=notes,
        threshold=threshold,
        alpha=gate.alpha,
        power=gate.power,
        needs_rows=needs if verdict == "undecided" else None,
        more_rows=max(1, needs - len(pairs)) if verdict == "undecided" and needs is not None else None,
        difference=difference,
        flips=flips,
        value=value,
        must_pass=must_pass,
        forgetting=forgetting,
        labels_from_champion=labels_from_champion,
        common_rows=len(pairs),
        looks=looks,
        look=look,
        left_out={
            "candidate": sum(map(is_sampled, candidate.values())) - len(pairs),
            "reference": sum(map(is_sampled, reference.values())) - len(pairs),
        },
    )


def share_alpha(spec: EvaluationSpec, looks: int, look: int = 1) -> EvaluationSpec:
    """The evaluation with the part of the gate's alpha that look number `look` of `looks` has: half of what
    those before it left, and the last two the same, so that all together have all of it. Candidates come
    cheapest first, and a needless 'undecided' costs most at the first (weighted Bonferroni: Holm 1979, Scand
    J Statist 6). Raises ValueError when there is no such look."""
    if looks < 1:
        raise ValueError(f"looks: expected at least 1, found {looks}")
    if not 1 <= look <= looks:
        raise ValueError(f"look: expected one of the {looks} that were planned, found number {look}")
    gate = spec.gate.model_copy(update={"alpha": spec.gate.alpha * 0.5 ** min(look, looks - 1)})
    return spec if looks == 1 else spec.model_copy(update={"gate": gate})


def better_arm(arms: Mapping[str, Sequence[Row]], spec: EvaluationSpec) -> str:
    """The arm with the highest mean of the deciding metric on its sampled rows; at a tie the first."""
    metric = metric_name(spec.resolved_metrics()[0])

    def mean(rows: Sequence[Row]) -> float:
        scores = [row["scores"][metric] for row in rows if is_sampled(row)]
        return float(np.mean(scores)) if scores else 0.0

    return max(arms, key=lambda name: mean(arms[name]))


def _by_row(rows: Sequence[Row], which: str) -> dict[str, Row]:
    found = {str(row["row"]): row for row in rows}
    if len(found) != len(rows):
        seen: set[str] = set()
        twice = next(r["row"] for r in rows if r["row"] in seen or seen.add(r["row"]))
        raise ValueError(f"{which} rows: row {twice} is there twice, expected one line per row")
    return found


def _must_pass(
    rows: Sequence[Row],
    reference: Mapping[str, Row],
    against: str,
    rejections: list[str],
    notes: list[str],
) -> dict[str, Any]:
    """Must-pass rows: those of the YAML's file, and those that were wrong in production (`failed`), as far as
    a candidate can be held to them. It can where the champion has such a row right by now, and where it was
    there to be trained on. Where candidates get DISPUTED or more of the latter wrong, and at least half of
    them, something is wrong with the rows: they are listed, and stop nobody."""
    failed = [row for row in rows if row.get("failed")]
    fixed = [r for r in failed if against == "champion" and reference.get(str(r["row"]), {}).get("right")]
    names = {row["row"] for row in fixed}
    open_ = [row for row in failed if row["row"] not in names]
    taught = [row for row in open_ if row["failed"] == "trained"]
    missed = sum(not row["right"] for row in taught)
    disputed = missed >= DISPUTED and 2 * missed >= len(taught)
    names |= {row["row"] for row in taught if not disputed}
    if disputed:
        notes.append(
            f"failures in production: {missed} of {len(taught)} rows that were to be learned are answered "
            "in another way; so many are hardly the candidate's mistakes, so they do not count as must-pass "
            "rows: look at the feedback that they came from"
        )
    waiting = sorted(str(row["row"]) for row in open_ if row["row"] not in names and not row["right"])
    chosen = [row for row in rows if row["must_pass"] or row["row"] in names]
    wrong = sorted(str(row["row"]) for row in chosen if not row["right"])
    if wrong:
        first = next(row for row in chosen if row["row"] == wrong[0])
        rejections.append(
            f"must-pass: {len(wrong)} of {len(chosen)} rows are wrong, allowed are none; row {wrong[0][:12]} "
            f"expected {_short(first['expected'])}, got {_short(first['answer'])}"
        )
    return {"rows": len(chosen), "wrong": wrong, "failures": len(failed), "open": waiting}


def _short(text: str, length: int = 80) -> str:
    return repr(text if len(text) <= length else text[: length - 1] + "…")


def _clusters(pairs: Sequence[tuple[Row, Row]]) -> list[str] | None:
    clusters = [row.get("cluster") for row, _ in pairs]
    if all(cluster is None for cluster in clusters):
        return None
    return [f"row {i}" if cluster is None else str(cluster) for i, cluster in enumerate(clusters)]


def _difference(pairs: Sequence[tuple[Row, Row]], spec: EvaluationSpec, threshold: float) -> Difference:
    """Bounds of the difference, such that `lower > threshold` has a probability of at most alpha when
    the true difference is `threshold`, and `upper < threshold` likewise."""
    from scipy import stats

    metric = metric_name(spec.resolved_metrics()[0])
    try:
        new, old = (np.array([pair[i]["scores"][metric] for pair in pairs], dtype=float) for i in (0, 1))
    except KeyError as error:
        raise ValueError(f"rows lack the score of the deciding metric {metric!r}") from error
    clusters, n, alpha = _clusters(pairs), len(pairs), spec.gate.alpha
    delta = new - old
    gains = sum(bool(a["right"]) and not b["right"] for a, b in pairs)
    losses = sum(bool(b["right"]) and not a["right"] for a, b in pairs)
    effective = float(n)
    if np.all(np.isin(new, (0.0, 1.0))) and np.all(np.isin(old, (0.0, 1.0))):
        wider = 1.0
        if clusters is not None:
            effective = n / design_effect(delta, clusters)
            groups = len(set(clusters))
            wider = float(stats.t.isf(alpha, max(groups - 1, 1)) / stats.norm.isf(alpha))
        up, down = (float(np.sum(delta == sign)) * effective / n for sign in (1, -1))
        whole = max(1, math.floor(effective))
        z_lower = min(critical_value(whole, threshold, alpha) * wider, 1e6)
        z_upper = min(critical_value(whole, -threshold, alpha) * wider, 1e6)
        lower, upper = tango_bounds(up, down, effective, z_lower, z_upper)
    else:
        lower, upper = mean_bounds(delta, -1.0, 1.0, alpha=alpha, clusters=clusters)
    return Difference(
        metric=metric,
        rows=n,
        effective_rows=round(effective, 2),
        candidate=float(new.mean()),
        reference=float(old.mean()),
        estimate=float(delta.mean()),
        lower=lower,
        upper=upper,
        gains=gains,
        losses=losses,
    )


def _judge(
    found: Difference,
    against: str,
    arm: str,
    spec: EvaluationSpec,
    threshold: float,
    rejections: list[str],
    doubts: list[str],
) -> int | None:
    """Append why the difference rejects or leaves doubts; the rows that would settle a doubt."""
    gate = spec.gate
    measured = (
        f"{found.metric} {found.candidate:.3f} against {found.reference:.3f} of {arm} on {found.rows} rows "
        f"({found.gains} gained, {found.losses} lost); difference {_pp(found.estimate)}"
    )
    if found.lower > threshold:
        return None
    if found.upper < threshold:
        shown = (
            f"worse than {arm} by more than the margin of {_pp(gate.margin)}"
            if against == "champion"
            else f"not better than {arm} by more than {_pp(gate.min_gain)}"
        )
        rejections.append(f"shown to be {shown}: {measured}, at most {_pp(found.upper)}")
        return None
    flips = _flip_share(found)
    if against == "champion":
        needs = _needs(found, spec, flips, gate.margin, 0.0)
        doubts.append(
            f"not shown to be within the margin of {_pp(gate.margin)}: {measured}, "
            f"at least {_pp(found.lower)}; "
            + (
                f"a candidate that is as good would be promoted with a probability of {gate.power:.0%} "
                f"on {needs} rows"
                if needs
                else "no number of rows up to a million would settle it"
            )
        )
        return needs
    needs = (
        _needs(found, spec, flips, -gate.min_gain, found.estimate) if found.estimate > gate.min_gain else None
    )
    doubts.append(
        f"not shown to be better than {arm} by more than {_pp(gate.min_gain)}: {measured}, "
        f"at least {_pp(found.lower)}; "
        + (
            f"a gain of {_pp(found.estimate)} would show with a probability of {gate.power:.0%} "
            f"on {needs} rows"
            if needs
            else "as measured there is no such gain that more rows could show"
        )
    )
    return needs


def rows_for_equal(found: Difference, spec: EvaluationSpec, power: float) -> int | None:
    """Rows on which a candidate that is as good as the champion, and flips as many answers as the one in
    `found`, is shown to be with this probability; None when no number up to a million does."""
    needs = rows_needed(round(_flip_share(found), 6), spec.gate.margin, spec.gate.alpha, power)
    return None if needs is None else math.ceil(needs * found.rows / found.effective_rows)


def _flip_share(found: Difference) -> float:
    return (found.gains + found.losses + 0.5) / (found.rows + 1)


def _needs(
    found: Difference, spec: EvaluationSpec, flips: float, margin: float, difference: float
) -> int | None:
    """Rows for the deciding test; of graded scores those for the flips of right/wrong that they imply."""
    needs = rows_needed(round(flips, 6), margin, spec.gate.alpha, spec.gate.power, round(difference, 6))
    if needs is None:
        return None
    return max(found.rows + 1, math.ceil(needs * found.rows / found.effective_rows))


def _pp(share: float) -> str:
    return f"{100 * share:+.1f} pp" if share < 0 else f"{100 * share:.1f} pp"


def _promotion(found: Difference, against: str, arm: str, spec: EvaluationSpec, claim: str | None) -> str:
    shown = (
        f"not worse than {arm} by more than {_pp(spec.gate.margin)}"
        if against == "champion"
        else f"better than {arm} by more than {_pp(spec.gate.min_gain)}"
    )
    return (
        f"shown to be {shown} (claim: {claim}): {found.metric} {found.candidate:.3f} against "
        f"{found.reference:.3f} on {found.rows} rows ({found.gains} gained, {found.losses} lost); "
        f"difference {_pp(found.estimate)}, at least {_pp(found.lower)}"
    )


def _flips(
    pairs: Sequence[tuple[Row, Row]],
    spec: EvaluationSpec,
    rejections: list[str],
    doubts: list[str],
    notes: list[str],
) -> list[SegmentFlips]:
    """Share of rows right before and wrong now, in all and per segment, against the budget. All segments
    together reject a candidate within the budget with a probability of at most alpha (Bonferroni)."""
    budget, alpha = spec.gate.max_negative_flips, spec.gate.alpha
    groups: dict[str, list[tuple[Row, Row]]] = defaultdict(list)
    for pair in pairs:
        groups[ALL].append(pair)
        for column, value in pair[0].get("segments", {}).items():
            groups[f"{column}={value}"].append(pair)
    least = 1 if budget in (0, 1) else math.ceil(math.log(alpha) / math.log(1 - budget))
    found = []
    for name, members in sorted(groups.items(), key=lambda g: (g[0] != ALL, g[0])):
        lost = np.array([bool(b["right"]) and not a["right"] for a, b in members], dtype=float)
        gains = sum(bool(a["right"]) and not b["right"] for a, b in members)
        share, n = float(lost.mean()), len(members)
        lower, upper = mean_bounds(lost, 0, 1, alpha=alpha / len(groups), clusters=_clusters(members))
        losses = int(lost.sum())
        counted = f"{losses} of {n} rows were right and are wrong now ({share:.1%}), budget {budget:.1%}"
        if lower > budget:
            status = "above"
            rejections.append(f"negative flips in {name}: {counted}, at least {lower:.1%}")
        elif n < least:
            status = "too few rows"
            notes.append(f"segment {name}: {n} rows can't tell whether flips keep the budget, {least} could")
        elif share > budget:
            status = "perhaps above"
            doubts.append(f"negative flips in {name}: {counted}, not shown to be above or within")
        else:
            status = "within"
        found.append(SegmentFlips(name, n, losses, gains, share, lower, upper, status))
    return found


def _rows_for_share(share: float, budget: float, alpha: float, power: float) -> int | None:
    """Rows at which a true share of flips above the budget would be shown to be above it."""
    from scipy import stats

    if share <= budget:
        return None
    spread = stats.norm.isf(alpha) * math.sqrt(budget * (1 - budget))
    spread += stats.norm.isf(1 - power) * math.sqrt(share * (1 - share))
    return math.ceil((spread / (share - budget)) ** 2)


def _value(
    pairs: Sequence[tuple[Row, Row]], spec: EvaluationSpec, against: str, arm: str, rejections: list[str]
) -> ValueDifference:
    """The difference in value; it rejects when it is shown to be below what the gate accepts: against a
    champion what right answers are worth on as many rows as the margin allows to lose, else nothing."""
    new, old = ([pair[i] for pair in pairs] for i in (0, 1))
    low, high = value_range([*new, *old], spec.value)
    new_values, old_values = row_values(new, spec.value), row_values(old, spec.value)
    lower, upper = mean_bounds(
        new_values - old_values,
        min(low - high, -1e-12),
        max(high - low, 1e-12),
        alpha=spec.gate.alpha,
        clusters=_clusters(pairs),
    )
    found = ValueDifference(
        currency=spec.value.currency,
        candidate=1000 * float(new_values.mean()),
        reference=1000 * float(old_values.mean()),
        estimate=1000 * float((new_values - old_values).mean()),
        lower=1000 * lower,
        upper=1000 * upper,
    )
    worth = spec.value.right - spec.value.wrong
    accepted = 1000 * spec.gate.margin * worth if against == "champion" else 0.0
    if found.upper < -accepted:
        rejections.append(
            f"value: {found.candidate:.2f} {found.currency} per 1,000 requests against "
            f"{found.reference:.2f} of {arm}, shown lower by at least {-found.upper:.2f}"
            + (f"; the margin accepts {accepted:.2f}" if accepted else "")
        )
    return found
