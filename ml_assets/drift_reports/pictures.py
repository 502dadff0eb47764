"""Pictures of a drift report, as PNG data URIs."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "inputs_classifier": "#0f766e",
    "inputs_mmd": "#0369a1",
    "outputs_mix": "#7c3aed",
    "outputs_length": "#a8a29e",
    "outputs_malformed": "#b91c1c",
    "outputs_refusals": "#be185d",
    "outcome_feedback": "#b45309",
    "outcome_estimated": "#ca8a04",
}
LOWEST, HIGHEST = 1e-3, 1e9
"""Evidence beyond which a picture is cut, so that the limit can be seen."""
MOST_LABELS = 16
POINTS = 600


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: "Figure") -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def evidence(trails: Mapping[str, Sequence[tuple[float, float]]], threshold: float) -> str | None:
    """Evidence of each signal over the requests, with the threshold; None before the first block."""
    figure = _figure(7.6, 3.2)
    axes = figure.subplots()
    drawn = False
    for name, trail in trails.items():
        some = trail[:: max(1, len(trail) // POINTS)]
        if len(trail) and some[-1] != trail[-1]:
            some = [*some, trail[-1]]
        points = [(seq, math.exp(min(max(log, math.log(LOWEST)), math.log(HIGHEST)))) for seq, log in some]
        if points:
            drawn = True
            axes.plot(
                *zip(*points, strict=True),
                color=COLORS[name],
                linewidth=1.4,
                label=name,
                marker=None if len(points) > 1 else ".",
            )
    if not drawn:
        return None
    axes.axhline(threshold, color="#1c1917", linewidth=1, linestyle="--")
    axes.text(0.005, threshold * 1.3, "alarm", transform=axes.get_yaxis_transform(), fontsize=8.5)
    axes.set_yscale("log")
    axes.set_ylim(LOWEST, 2 * HIGHEST)
    axes.set(xlabel="request", ylabel="evidence")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    return _png(figure)


def series(points: Sequence[Sequence[float]], before: Mapping[str, float | None]) -> str | None:
    """Means over time of malformed and refused answers, their length and confidence; dashed: on the frozen
    rows. None without points."""
    if not points:
        return None
    values = np.array(points, dtype=float)
    columns = [("malformed", 1), ("refused", 2), ("characters", 3), ("confidence", 4)]
    columns = [(name, i) for name, i in columns if not np.isnan(values[:, i]).all()]
    figure = _figure(2.6 * len(columns), 2.3)
    for axes, (name, i) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        change: Any = np.expm1 if name == "characters" else lambda x: x
        axes.plot(
            values[:, 0],
            change(values[:, i]),
            color="#0f766e",
            linewidth=1.4,
            marker="." if len(values) < 3 else None,
        )
        if (was := before.get(name)) is not None and not math.isnan(was):
            axes.axhline(change(was), color="#78716c", linewidth=1, linestyle="--")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("request", fontsize=8.5)
        axes.tick_params(labelsize=8)
        if name in ("malformed", "refused"):
            axes.set_ylim(0, max(0.05, float(np.nanmax(values[:, i])) * 1.1))
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def mix(names: Sequence[str], before: Sequence[float], now: Sequence[float]) -> str | None:
    """Shares of the labels on the frozen rows and in the newest answers; None without labels."""
    if not names:
        return None
    shown = sorted(range(len(names)), key=lambda i: -max(before[i], now[i]))[:MOST_LABELS][::-1]
    figure = _figure(7.2, 0.32 * len(shown) + 1.0)
    axes = figure.subplots()
    at = np.arange(len(shown))
    axes.barh(at + 0.2, [before[i] for i in shown], height=0.36, color="#a8a29e", label="frozen rows")
    axes.barh(at - 0.2, [now[i] for i in shown], height=0.36, color="#0f766e", label="newest answers")
    # what stands between two dollars would be read as mathematics
    axes.set_yticks(at, [names[i][:36].replace("$", r"\$") for i in shown], fontsize=8.5)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.legend(frameon=False, fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)
