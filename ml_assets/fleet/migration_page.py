"""The page of the migration plan: every customization on every base revision, and what to do about it.

What is known of a pair comes from its newest eval report, the ledger, the climb of the port ladder and the
decision to migrate; nothing is computed by a model here.
"""

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ml_assets.adapters.rungs import Climb
from ml_assets.decisions.book import History
from ml_assets.decisions.diagnosis import duration
from ml_assets.decisions.records import NOTHING, Spent
from ml_assets.endpoints.ledger import Release
from ml_assets.eval_reports.report import VERDICTS
from ml_assets.fleet.migration_plan import plan_row, predicted_seconds
from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.records import TrafficRecord

PAGE_VERSION = "1"


@dataclass(frozen=True)
class Evaluated:
    """The newest eval report of a customization on a base revision: `summary` is its summary.json, `seconds`
    the median of its adapter's answers, None where they were not timed."""

    summary: Mapping[str, Any]
    digest: str
    seconds: float | None = None

    @classmethod
    def of(cls, summary: Mapping[str, Any], digest: str, record: Mapping[str, Any]) -> "Evaluated":
        """`record`: what the artifact store remembers of making the report."""
        answers = (record.get("seconds") or {}).get("adapter")
        return cls(summary, digest, round(median(answers), 4) if answers else None)


@dataclass(frozen=True)
class Line:
    """One customization on one base revision. Costs are device seconds, money is `currency`; None: not
    known. `quality` is the mean of the deciding metric with its 95 % interval."""

    customization: str
    base_revision: str
    recommendation: str
    """`move`, `stay`, `undecided: needs n rows`, `serves`, or why there is none."""
    verdict: str
    why: str
    metric: str = ""
    quality: float | None = None
    quality_lower: float | None = None
    quality_upper: float | None = None
    champion: float | None = None
    """The same of what served when it was evaluated."""
    bare: float | None = None
    value_per_1000: float | None = None
    serving_per_1000: float | None = None
    """What 1,000 answers cost."""
    currency: str = ""
    latency_seconds: float | None = None
    """Median of the newest requests to the endpoint."""
    seconds_per_answer: float | None = None
    """Median of the evaluation, which answers in full batches."""
    predicted_seconds: float | None = None
    actual_seconds: float | None = None
    actual_money: float | None = None
    rung: str = ""
    saved: float | None = None
    """S = 1 - (all rungs tried and their evaluations) / (a full training and its evaluation)."""
    negative_flips: int | None = None
    rows: int = 0
    state: str = ""
    """Of the decision to migrate."""


@dataclass(frozen=True)
class Page:
    """All customizations x base revisions, and the decisions that are open."""

    lines: tuple[Line, ...]
    plan: tuple[Mapping[str, str | float], ...]
    predicted_seconds: float
    """Of what is to be done or under way."""
    saved: float | None
    """S over all climbs whose full training is known."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def build_page(
    specs: Sequence[CustomizationSpec],
    revisions: Sequence[str],
    evaluated: Callable[[str, str], Evaluated | None],
    histories: Sequence[History],
    climbs: Sequence[Climb],
    spent: Mapping[str, Spent],
    releases: Callable[[str], Sequence[Release]],
    latencies: Callable[[str], Mapping[str, float]],
    now: str,
) -> Page:
    """`revisions`: the partitions, oldest first; `evaluated(customization, revision)`; `histories`: decisions
    to migrate, newest first; `climbs`, oldest first; `spent`: by decision; `releases(customization)`: its
    rows of the ledger, newest first; `latencies(customization)`: seconds by base revision."""
    decided: dict[tuple[str, str], History] = {}
    costs: dict[tuple[str, str], Spent] = {}
    for history in histories:
        pair = (history.decision.customization, str(history.decision.base_revision))
        decided.setdefault(pair, history)
        if cost := spent.get(history.decision.id):  # attempts that failed cost as well
            costs[pair] = costs.get(pair, NOTHING) + cost
    climbed = {(climb.customization, climb.base_revision): climb for climb in climbs}
    lines = []
    for spec in specs:
        rows, seconds = releases(spec.name), latencies(spec.name)
        for revision in revisions:
            if revision.rpartition("@")[0] in spec.base_models:
                pair = (spec.name, revision)
                history = decided.get(pair)
                found = evaluated(*pair)
                line = _line(spec, revision, found, history, climbed.get(pair), costs.get(pair), rows, now)
                lines.append(replace(line, latency_seconds=seconds.get(revision)))
    current = [history for history in decided.values() if not (history.end and history.end.step == "dropped")]
    known = [climb for climb in climbs if climb.full_seconds]
    full = sum(climb.full_seconds or 0.0 for climb in known)
    return Page(
        lines=tuple(lines),
        plan=tuple(plan_row(history.decision, history.state) for history in current),
        predicted_seconds=predicted_seconds([h.decision for h in current if h.is_open]),
        saved=round(1 - sum(climb.seconds for climb in known) / full, 4) if full else None,
    )


def _line(
    spec: CustomizationSpec,
    revision: str,
    found: Evaluated | None,
    history: History | None,
    climb: Climb | None,
    cost: Spent | None,
    releases: Sequence[Release],
    now: str,
) -> Line:
    recommendation, why = _recommend(spec, revision, found, history, releases, now)
    accepted = climb.accepted if climb else None
    facts: dict[str, Any] = {
        "state": history.state if history else "",
        "predicted_seconds": history.decision.device_seconds if history else None,
        "rung": accepted.rung if accepted else "none was accepted" if climb else "",
        "saved": None if climb is None or climb.saved is None else round(climb.saved, 4),
        # a climb by hand has no decision, and is written down all the same
        "actual_seconds": round(cost.device_seconds, 2) if cost else climb and round(climb.seconds, 2),
        "actual_money": round(cost.money, 4) if cost else None,
    }
    if found is not None:
        facts |= _measured(found)
    verdict = found.summary["decision"]["verdict"] if found else ""
    return Line(spec.name, revision, recommendation, verdict, why, **facts)


def _measured(found: Evaluated) -> dict[str, Any]:
    arms, metric = found.summary["arms"], found.summary["metric"]
    quality = {arm: entry["metrics"][metric] for arm, entry in arms.items() if entry["metrics"][metric]}
    mean = {arm: round(interval["mean"], 4) for arm, interval in quality.items()}
    adapter, mine = arms.get("adapter", {}), quality.get("adapter")
    cost = adapter.get("cost_per_1000")
    difference = found.summary["decision"]["difference"]
    return {
        "metric": metric,
        "quality": mean.get("adapter"),
        "quality_lower": round(mine["lower"], 4) if mine else None,
        "quality_upper": round(mine["upper"], 4) if mine else None,
        "champion": mean.get("champion"),
        "bare": max((mean[arm] for arm in ("zero_shot", "few_shot") if arm in mean), default=None),
        "value_per_1000": round(adapter["value"]["mean"], 4) if adapter.get("value") else None,
        "serving_per_1000": None if cost is None else round(cost, 4),
        "currency": found.summary["currency"],
        "seconds_per_answer": found.seconds,
        "negative_flips": difference["losses"] if difference else None,
        "rows": found.summary["rows"],
    }


def _recommend(
    spec: CustomizationSpec,
    revision: str,
    found: Evaluated | None,
    history: History | None,
    releases: Sequence[Release],
    now: str,
) -> tuple[str, str]:
    """(what to do, why)."""
    newest = releases[0] if releases else None
    serves = newest if newest and newest.action != "withdraw" else None
    if serves and serves.base_revision == revision:
        return "serves", f"since {serves.at[:16].replace('T', ' ')}: {serves.reason}"
    until = _served_until(revision, releases)
    if until is not None:
        kept = datetime.datetime.fromisoformat(until) + duration(spec.migration.retention)
        what = "can be served again" if kept.isoformat() > now else "its retention ended"
        return "stay", f"served until {until[:16].replace('T', ' ')}; {what}, {kept.date()}"
    if found is None:
        if history is None:
            return "not tried", "nobody decided about it"
        return "not tried", f"{history.state}: {history.decision.reason}"
    decision = found.summary["decision"]
    reasons = " ".join(decision["reasons"])
    if decision["verdict"] == "promote":
        if serves and found.summary["about"].get("champion") != serves.adapter_digest:
            return "undecided: evaluate again", "another version serves since it was compared"
        if spec.migration.move == "manual":
            return "move", f"waits for a person who materializes {spec.name}/endpoint. {reasons}"
        return "move", reasons
    if decision["verdict"] == "reject":
        return "stay", reasons
    rows = decision["needs_rows"]
    return f"undecided: needs {rows:,} rows" if rows else "undecided", reasons


def _served_until(revision: str, releases: Sequence[Release]) -> str | None:
    """When something else took over from a base revision last; None when it never served."""
    for index, release in enumerate(releases):
        if release.base_revision == revision and release.action != "withdraw":
            return releases[index - 1].at if index else None
    return None


def median_latencies(requests: Iterable[TrafficRecord]) -> dict[str, float]:
    """{base revision: median seconds} of requests that were answered."""
    found: dict[str, list[float]] = {}
    for request in requests:
        if request.status == 200:
            found.setdefault(request.base_revision, []).append(request.latency_ms / 1000)
    return {revision: round(median(seconds), 4) for revision, seconds in found.items()}


def render_html(page: Page, now: str) -> str:
    """The page, self-contained: no scripts, no links to anything outside."""
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_name("migration_page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        number=lambda v, digits=3: "–" if v is None else f"{v:,.{digits}f}",
        seconds=lambda v: "–" if v is None else f"{v:,.1f} s" if v < 100 else f"{v:,.0f} s",
        percent=lambda v: "–" if v is None else f"{100 * v:.0f} %",
        verdicts=VERDICTS,
    )
    families: dict[str, list[Line]] = {}
    for line in page.lines:
        families.setdefault(line.base_revision.rpartition("@")[0], []).append(line)
    counts = {
        name: sum(line.recommendation.split(":")[0] == name for line in page.lines)
        for name in ("serves", "move", "stay", "undecided", "not tried")
    }
    return environment.from_string(template).render(page=page, families=families, counts=counts, now=now)


def table_rows(page: Page) -> list[dict[str, str | float]]:
    """The lines for a table in metadata, which takes no empty cells of numbers."""

    def cell(value: float | None) -> str | float:
        return "" if value is None else value

    return [
        {
            "customization": line.customization,
            "base revision": line.base_revision,
            "recommendation": line.recommendation,
            "verdict": line.verdict,
            "quality": cell(line.quality),
            "champion": cell(line.champion),
            "value per 1,000": cell(line.value_per_1000),
            "cost to serve 1,000": cell(line.serving_per_1000),
            "latency, s": cell(line.latency_seconds),
            "seconds per answer in a full batch": cell(line.seconds_per_answer),
            "cost to move, predicted s": cell(line.predicted_seconds),
            "cost to move, actual s": cell(line.actual_seconds),
            "rung": line.rung,
            "saving S": cell(line.saved),
            "negative flips": cell(line.negative_flips),
            "why": line.why if len(line.why) <= 120 else f"{line.why[:117]}...",
        }
        for line in page.lines
    ]
