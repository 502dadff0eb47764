"""The newest traffic in numbers, rows and a picture."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.records import FeedbackRecord, TrafficRecord
from ml_assets.traffic.rows import invert

RECENT = 5000
"""Requests that are looked at: the newest ones."""
BINS = 24


@dataclass(frozen=True)
class Summary:
    """`numbers` over the newest `requests` requests (shares 0..1, times in ms, None where nothing is known),
    `rows` the newest of them first, as text, and what the picture shows: by bin of time the requests, the
    failed or malformed ones, and the median latency in ms."""

    requests: int
    numbers: dict[str, float | int | None] = field(default_factory=dict)
    rows: list[dict[str, str]] = field(default_factory=list)
    times: list[datetime] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    medians: list[float | None] = field(default_factory=list)


def malformed(spec: CustomizationSpec, answer: str) -> bool:
    """Whether an answer does not even have the form of `prompt.target`, or is no JSON where it should be."""
    if spec.evaluation.task == "json":
        try:
            json.loads(answer)
        except (ValueError, RecursionError):
            return True
    return invert(spec.prompt.target, answer) is None


def summarize(
    spec: CustomizationSpec, newest: Sequence[TrafficRecord], judged: Mapping[str, FeedbackRecord]
) -> Summary:
    """`newest` by seq; `judged` has the feedback by request id."""
    if not newest:
        return Summary(0)
    import numpy as np

    answered = [record for record in newest if record.status == 200]
    broken = {record.id for record in answered if malformed(spec, record.answer)}
    failed = {record.id for record in newest if record.status >= 500}
    latencies = [record.latency_ms for record in answered]
    starts = [datetime.fromisoformat(record.at) for record in newest]
    span = max((max(starts) - min(starts)).total_seconds(), 1.0)
    ratings = [one.rating for one in judged.values() if one.rating is not None]
    logprobs = [record.mean_logprob for record in answered if record.mean_logprob is not None]
    numbers: dict[str, float | int | None] = {
        "requests_looked_at": len(newest),
        # of a few minutes one can't tell what a day brings
        "requests_per_day": len(newest) / span * 86400 if span >= 3600 else None,
        "failed_share": len(failed) / len(newest),
        "cancelled_share": sum(record.status == 499 for record in newest) / len(newest),
        "malformed_share": len(broken) / len(answered) if answered else None,
        "latency_p50_ms": float(np.percentile(latencies, 50)) if latencies else None,
        "latency_p99_ms": float(np.percentile(latencies, 99)) if latencies else None,
        "mean_logprob": float(np.mean(logprobs)) if logprobs else None,
        "rated": len(ratings),
        "rated_up_share": sum(rating > 0 for rating in ratings) / len(ratings) if ratings else None,
        "right_answers": sum(one.right_answer is not None for one in judged.values()),
    }
    first, width = min(starts), timedelta(seconds=span / BINS)
    bins = [min(BINS - 1, int((start - first) / width)) for start in starts]
    members = [[record for record, at in zip(newest, bins, strict=True) if at == n] for n in range(BINS)]
    medians = [[record.latency_ms for record in some if record.status == 200] for some in members]
    return Summary(
        requests=len(newest),
        numbers=numbers,
        rows=[_shown(record, judged.get(record.id), record.id in broken) for record in reversed(newest)],
        times=[(first + width * (n + 0.5)).astimezone(UTC) for n in range(BINS)],
        counts=[len(some) for some in members],
        bad=[sum(record.id in broken | failed for record in some) for some in members],
        medians=[float(np.median(values)) if values else None for values in medians],
    )


def _shown(record: TrafficRecord, said: FeedbackRecord | None, broken: bool) -> dict[str, str]:
    asked = next((m["content"] for m in reversed(record.messages) if m["role"] == "user"), "")
    rating = {1: "up", -1: "down", None: ""}[said.rating if said else None]
    status = f"{record.status}{' malformed' if broken else ''}"
    return {
        "at": record.at[:19].replace("T", " "),
        "asked": _short(asked),
        "answered": _short(record.answer),
        "status": status,
        "ms": f"{record.latency_ms:.0f}",
        "rating": rating,
        "right_answer": _short((said and said.right_answer) or ""),
        "adapter": record.adapter_digest[:12],
    }


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:159]}…"


def time_series(summary: Summary) -> str:
    """Markdown with the requests over time and their latency, as an embedded PNG under 60 kB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    width = (summary.times[1] - summary.times[0]) * 0.9
    top.bar(summary.times, summary.counts, width=width, color="#2f7d5b", label="requests")  # type: ignore[arg-type]
    top.bar(summary.times, summary.bad, width=width, color="#b5483a", label="failed or malformed")  # type: ignore[arg-type]
    top.set(ylabel="requests")
    top.legend(frameon=False, fontsize=8)
    known = [
        (at, value) for at, value in zip(summary.times, summary.medians, strict=True) if value is not None
    ]
    bottom.plot([at for at, _ in known], [value for _, value in known], marker=".", color="#35507d")  # type: ignore[arg-type]
    bottom.set(ylabel="median latency, ms", ylim=(0, None))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.autofmt_xdate()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    picture = base64.b64encode(buffer.getvalue()).decode()
    return f"![requests over time](data:image/png;base64,{picture})"
