"""From lines and a decision to what people read: numbers with intervals, plots, a page, a short summary."""

import base64
import io
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ml_assets.eval_reports.gate import Decision, is_sampled
from ml_assets.eval_reports.metrics import CORPUS, macro_f1, metric_name
from ml_assets.eval_reports.statistics import mean_bounds
from ml_assets.eval_reports.value import row_values, token_cost, value_range
from ml_assets.spec import EvaluationSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
ARM_TITLES = {
    "zero_shot": "Base model, asked",
    "few_shot": "Base model, shown examples",
    "adapter": "Candidate",
    "champion": "Champion",
}
COLORS = {"zero_shot": "#a8a29e", "few_shot": "#78716c", "adapter": "#0f766e", "champion": "#b45309"}
VERDICTS = {"promote": "Promote", "reject": "Reject", "undecided": "Undecided"}
TAIL = 0.025  # of each side of a 95 % interval
MOST_SEGMENTS = 24
MOST_FLIPS = 200
WORST = 12


def arm_title(arm: str) -> str:
    return ARM_TITLES.get(arm, arm)


# -- numbers -------------------------------------------------------------------------------------------


def summarize(
    lines: Sequence[Row],
    evaluation: EvaluationSpec,
    decision: Decision,
    about: Mapping[str, Any],
    known_to_champion: Collection[str] = (),
) -> dict[str, Any]:
    """The content of summary.json: per arm and segment, means with 95 % intervals; all from the lines.

    `about` names what was evaluated: customization, base_revision, adapter, champion, dataset, ...;
    `known_to_champion` the evaluation rows of the dataset that the champion was trained on.
    """
    by_arm: dict[str, list[Row]] = defaultdict(list)
    for line in lines:
        by_arm[line["arm"]].append(line)
    names = [metric_name(metric) for metric in evaluation.resolved_metrics()]
    sampled = {arm: [row for row in rows if is_sampled(row)] for arm, rows in by_arm.items()}
    value_rows = [row for rows in sampled.values() for row in rows]
    low, high = value_range(value_rows, evaluation.value)
    return {
        "about": dict(about),
        "metric": names[0],
        "metrics": names,
        "currency": evaluation.value.currency,
        "rows": max(map(len, sampled.values()), default=0),
        "must_pass": sum(row["must_pass"] for row in by_arm.get("adapter", [])),
        "arms": {
            arm: {
                "rows": len(rows),
                "metrics": {name: _interval(rows, name) for name in names},
                "value": _value_interval(rows, evaluation, low, high),
                "cost_per_1000": _mean([1000 * token_cost(row, evaluation.value) for row in rows]),
                "prompt_tokens": _mean([row["prompt_tokens"] for row in rows]),
                "answer_tokens": _mean([row["answer_tokens"] for row in rows]),
                "cut_off": sum(not row.get("finished", True) for row in rows),
                "refused": sum(row["refused"] for row in rows),
            }
            for arm, rows in sampled.items()
        },
        "segments": _segments(sampled, evaluation, names[0]),
        "transfer": _transfer(sampled, evaluation, names[0], known_to_champion),
        "flips": negative_flips(lines, decision.reference),
        "decision": decision.as_json(),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _clusters(rows: Sequence[Row]) -> list[str] | None:
    found = [row.get("cluster") for row in rows]
    return None if any(cluster is None for cluster in found) else [str(cluster) for cluster in found]


def _interval(rows: Sequence[Row], name: str) -> dict[str, float] | None:
    """Mean and 95 % interval of one metric; None without rows."""
    if not rows:
        return None
    if name not in CORPUS:
        scores = [row["scores"][name] for row in rows]
        lower, upper = mean_bounds(scores, 0, 1, alpha=TAIL, clusters=_clusters(rows), draws=4000)
        return {"mean": float(np.mean(scores)), "lower": lower, "upper": upper}
    expected, answers = [row["expected"] for row in rows], [row["answer"] for row in rows]
    clusters = _clusters(rows) or [str(i) for i in range(len(rows))]
    _, member = np.unique(clusters, return_inverse=True)
    weights = np.random.default_rng(0).standard_exponential((1000, int(member.max()) + 1))[:, member]
    drawn = macro_f1(expected, answers, weights)
    mean = float(macro_f1(expected, answers)[0])
    lower, upper = np.quantile(drawn, [TAIL, 1 - TAIL])
    return {"mean": mean, "lower": min(mean, float(lower)), "upper": max(mean, float(upper))}


def _value_interval(
    rows: Sequence[Row], evaluation: EvaluationSpec, low: float, high: float
) -> dict[str, float] | None:
    """Value per 1,000 requests with a 95 % interval."""
    if not rows:
        return None
    values = row_values(rows, evaluation.value)
    lower, upper = mean_bounds(values, low, high, alpha=TAIL, clusters=_clusters(rows), draws=4000)
    return {"mean": 1000 * float(values.mean()), "lower": 1000 * lower, "upper": 1000 * upper}


def _segments(
    sampled: Mapping[str, Sequence[Row]], evaluation: EvaluationSpec, metric: str
) -> list[dict[str, Any]]:
    """One entry per segment value, the largest first, with the deciding metric of every arm."""
    found = []
    for column in evaluation.segments:
        values = sorted({row["segments"][column] for rows in sampled.values() for row in rows})
        for value in values:
            members = {
                arm: [row for row in rows if row["segments"][column] == value]
                for arm, rows in sampled.items()
            }
            found.append(
                {
                    "column": column,
                    "value": value,
                    "rows": max(map(len, members.values())),
                    "arms": {arm: _interval(rows, metric) for arm, rows in members.items()},
                }
            )
    return sorted(found, key=lambda s: (evaluation.segments.index(s["column"]), -s["rows"], s["value"]))


def _transfer(
    sampled: Mapping[str, Sequence[Row]], evaluation: EvaluationSpec, metric: str, known: Collection[str]
) -> list[dict[str, Any]]:
    """What the candidate changes against the champion: on rows of the champion's own dataset (`old`: backward
    transfer, Lopez-Paz & Ranzato 2017, arXiv 1706.08840) and on rows that came later (`new`), in all and for
    every segment. Empty without a champion."""
    if "champion" not in sampled:
        return []
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    champion = {row["row"]: row["scores"][metric] for row in sampled["champion"] if metric not in CORPUS}
    for row in sampled["adapter"]:
        if row["row"] not in champion:
            continue
        age = "old" if row["row"] in known else "new"
        names = ["all", *(f"{column} = {value}" for column, value in row["segments"].items())]
        for name in names:
            found = groups.setdefault((age, name), {"before": [], "after": []})
            found["before"].append(champion[row["row"]])
            found["after"].append(row["scores"][metric])
    return [
        {
            "rows_are": age,
            "segment": name,
            "rows": len(found["before"]),
            "before": float(np.mean(found["before"])),
            "after": float(np.mean(found["after"])),
            "change": float(np.mean(found["after"]) - np.mean(found["before"])),
        }
        for (age, name), found in sorted(
            groups.items(), key=lambda item: (item[0][0] == "new", item[0][1] != "all", item[0][1])
        )
    ]


def negative_flips(lines: Sequence[Row], reference: str) -> list[dict[str, Any]]:
    """Every row that the reference had right and the candidate has wrong, in the order of segments: what was
    asked and expected, and both answers."""
    before = {row["row"]: row for row in lines if row["arm"] == reference and row["right"]}
    lost = [
        row
        for row in lines
        if row["arm"] == "adapter" and not row["right"] and is_sampled(row) and row["row"] in before
    ]
    return [
        {
            "row": row["row"],
            "segments": row["segments"],
            "prompt": row["prompt"],
            "expected": row["expected"],
            "before": before[row["row"]]["answer"],
            "now": row["answer"],
        }
        for row in sorted(lost, key=lambda row: ([*row["segments"].values()], row["row"]))
    ]


def worst_examples(
    lines: Sequence[Row], metric: str, reference: str, count: int = WORST
) -> list[dict[str, Any]]:
    """Rows to look at: first those that the reference had right and the candidate has wrong, then the
    candidate's lowest scores; each with the reference's answer."""
    before = {row["row"]: row for row in lines if row["arm"] == reference}
    wrong = [row for row in lines if row["arm"] == "adapter" and not row["right"]]

    def order(row: Row) -> tuple[bool, float, str]:
        lost = row["row"] in before and before[row["row"]]["right"]
        return (not lost, row["scores"][metric], row["row"])

    return [
        {
            **row,
            "lost": row["row"] in before and before[row["row"]]["right"],
            "reference_answer": before[row["row"]]["answer"] if row["row"] in before else None,
        }
        for row in sorted(wrong, key=order)[:count]
    ]


# -- plots ---------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: "Figure", dpi: int = 110) -> str:
    """A PNG data URI; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _clean(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e7e5e4", linewidth=0.8)
    axes.set_axisbelow(True)


def arms_plot(summary: Mapping[str, Any], dpi: int = 110) -> str:
    """Deciding metric of every arm with its interval."""
    arms = list(summary["arms"])
    figure = _figure(7.2, 0.55 * len(arms) + 0.8)
    axes = figure.subplots()
    for y, arm in enumerate(reversed(arms)):
        found = summary["arms"][arm]["metrics"][summary["metric"]]
        if found is None:
            continue
        axes.barh(y, found["mean"], color=COLORS[arm], height=0.55)
        axes.plot([found["lower"], found["upper"]], [y, y], color="#1c1917", linewidth=1.6)
        axes.text(
            min(found["upper"] + 0.015, 1.02),
            y,
            f"{found['mean']:.3f}",
            va="center",
            fontsize=9.5,
            color="#1c1917",
        )
    axes.set_yticks(range(len(arms)), [ARM_TITLES[arm] for arm in reversed(arms)])
    axes.set_xlim(0, 1.09)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel(f"{summary['metric']}, bars: mean, lines: 95 % interval", fontsize=9)
    _clean(axes)
    return _png(figure, dpi)


def segments_plot(summary: Mapping[str, Any]) -> str | None:
    """Deciding metric of every arm in the largest segments; None without segments."""
    shown = summary["segments"][:MOST_SEGMENTS]
    if not shown:
        return None
    arms = list(summary["arms"])
    figure = _figure(7.8, 0.36 * len(shown) + 1.1)
    axes = figure.subplots()
    step = 0.6 / len(arms)
    for y, segment in enumerate(reversed(shown)):
        for k, arm in enumerate(arms):
            found = segment["arms"].get(arm)
            if found is None:
                continue
            at = y + 0.3 - step * (k + 0.5)
            axes.plot(
                [found["lower"], found["upper"]], [at, at], color=COLORS[arm], linewidth=1.2, alpha=0.55
            )
            axes.plot(
                [found["mean"]],
                [at],
                "o",
                color=COLORS[arm],
                markersize=4.5,
                label=ARM_TITLES[arm] if y == 0 else None,
            )
    axes.set_yticks(
        range(len(shown)),
        # what stands between two dollars would be read as mathematics
        [
            f"{s['column']} = {_cut(s['value'], 28)}  ({s['rows']})".replace("$", r"\$")
            for s in reversed(shown)
        ],
        fontsize=8.5,
    )
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel(f"{summary['metric']} (rows in brackets), lines: 95 % interval", fontsize=9)
    figure.legend(loc="outside upper center", ncols=len(arms), frameon=False, fontsize=8.5)
    _clean(axes)
    return _png(figure)


def decision_plot(summary: Mapping[str, Any]) -> str | None:
    """The measured difference, its bounds, and the line that a candidate has to clear."""
    decision = summary["decision"]
    found = decision["difference"]
    if found is None:
        return None
    threshold = decision["threshold"]
    figure = _figure(7.2, 1.55)
    axes = figure.subplots()
    reach = 1.25 * max(abs(found["lower"]), abs(found["upper"]), abs(threshold), 0.01)
    left = -min(1.0, reach)
    right = min(1.0, reach)
    axes.axvspan(left, threshold, color="#fee2e2", linewidth=0)
    axes.axvspan(threshold, right, color="#ecfdf5", linewidth=0)
    axes.axvline(threshold, color="#b91c1c", linewidth=1.5)
    axes.axvline(0, color="#78716c", linewidth=0.8, linestyle=":")
    axes.plot([found["lower"], found["upper"]], [0, 0], color="#1c1917", linewidth=2.2)
    axes.plot([found["estimate"]], [0], "o", color="#0f766e", markersize=8)
    axes.set_xlim(left, right)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:+.3g}")
    axes.set_xlabel(
        f"candidate minus {_lower(arm_title(decision['reference']))}, percentage points of "
        f"{summary['metric']}; must be shown above the red line, {100 * threshold:+.3g}",
        fontsize=8.5,
    )
    _clean(axes)
    return _png(figure)


# -- text ----------------------------------------------------------------------------------------------


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def headline(decision: Mapping[str, Any]) -> str:
    """One sentence for someone who reads nothing else."""
    the = f"the {_lower(arm_title(decision['reference']))}"
    if decision["verdict"] == "promote":
        how = "better than" if decision["claim"] == "better" else "as good as"
        return f"The candidate may serve: it is shown to be {how} {the}."
    if decision["verdict"] == "reject":
        return f"The candidate must not serve: it fails against {the}."
    more = decision["more_rows"]
    wanted = f"; about {more:,} more evaluation rows would settle it" if more else ""
    return f"Not decided: the evidence against {the} is not enough{wanted}."


def render_html(summary: Mapping[str, Any], lines: Sequence[Row]) -> str:
    """The report as one self-contained page: no scripts, no links to anything outside."""
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        titles=ARM_TITLES,
        score=lambda v: "–" if v is None else f"{v['mean']:.3f}",
        span=lambda v, digits=3: "" if v is None else f"{v['lower']:,.{digits}f} to {v['upper']:,.{digits}f}",
        money=lambda v: "–" if v is None else f"{v['mean']:,.2f}",
        percent=lambda v: f"{100 * v:.1f} %",
        cut=_cut,
    )
    decision = summary["decision"]
    of_candidate = [row for row in lines if row["arm"] == "adapter"]
    required = [row for row in of_candidate if row["must_pass"]]
    failed = [row for row in of_candidate if row.get("failed")]
    return environment.from_string(template).render(
        summary=summary,
        decision=decision,
        verdict=VERDICTS[decision["verdict"]],
        headline=headline(decision),
        arms_png=arms_plot(summary),
        segments_png=segments_plot(summary),
        decision_png=decision_plot(summary),
        worst=worst_examples(lines, summary["metric"], decision["reference"]),
        must_pass=sorted(required, key=lambda row: (row["right"], row["row"])),
        failed=sorted(failed, key=lambda row: (row["right"], row["row"])),
        most_segments=MOST_SEGMENTS,
        most_flips=MOST_FLIPS,
        climb=summary.get("climb"),
    )


def render_markdown(summary: Mapping[str, Any]) -> str:
    """The report in short for Dagster metadata, with one plot (below 80 kB)."""
    decision = summary["decision"]
    out = [f"### {VERDICTS[decision['verdict']]}", "", headline(decision), ""]
    out += [f"- {_escape(reason)}" for reason in [*decision["reasons"], *decision["notes"]]]
    head = [summary["metric"], *[m for m in summary["metrics"] if m != summary["metric"]]]
    out += ["", f"| arm | {' | '.join(map(_escape, head))} | {summary['currency']} per 1,000 requests |"]
    out.append("| --- |" + " ---: |" * (len(head) + 1))
    for arm, found in summary["arms"].items():
        cells = [_cell(found["metrics"][name], 3) for name in head]
        few = f", {found['rows']} rows" if found["rows"] < summary["rows"] else ""
        out.append(f"| {ARM_TITLES[arm]}{few} | {' | '.join(cells)} | {_cell(found['value'], 2)} |")
    out += ["", f"{summary['rows']} evaluation rows, 95 % intervals in brackets.", ""]
    if climb := summary.get("climb"):
        out += _climb_lines(climb)
    out.append(f"![{summary['metric']} by arm]({arms_plot(summary, dpi=80)})")
    return "\n".join(out)


def _climb_lines(climb: Mapping[str, Any]) -> list[str]:
    """The rungs of the port ladder, and what they cost."""
    out = ["| rung | start | verdict | candidate | champion | flips | training s | evaluation s | because |"]
    out.append("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for rung in climb["rungs"]:
        scores = ["–" if rung[name] is None else f"{rung[name]:.3f}" for name in ("candidate", "reference")]
        flips = "–" if rung["negative_flips"] is None else str(rung["negative_flips"])
        seconds = [f"{rung[name]:.1f}" for name in ("training_seconds", "evaluation_seconds")]
        cells = [rung["rung"], rung["start"] or "–", rung["verdict"], *scores, flips, *seconds]
        out.append(f"| {' | '.join(cells)} | {_escape(_cut(rung['reason'], 200))} |")
    spent = f"{climb['seconds']:.1f} s of computing"
    if climb["saved"] is not None:
        spent += f", {climb['saved']:.0%} less than the {climb['full_seconds']:.1f} s of a full training and "
        spent += f"its evaluation ({_escape(climb['full_from'])})"
    return [*out, "", f"{spent}.", ""]


def _cell(found: Mapping[str, float] | None, digits: int) -> str:
    if found is None:
        return "–"
    return f"{found['mean']:,.{digits}f} ({found['lower']:,.{digits}f} to {found['upper']:,.{digits}f})"


def _escape(text: str) -> str:
    """Answers of models are quoted in reasons: they must not become markup."""
    for mark in "\\`*_{}[]<>|#":
        text = text.replace(mark, f"\\{mark}" if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return text
