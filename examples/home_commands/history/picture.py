"""The accuracy over time, with what happened."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from examples.home_commands.history.replay import Event

COLOURS = {"phase": "#555555", "decision": "#c44e00", "promotion": "#00796b"}


def draw(
    path: Path,
    points: Sequence[tuple[int, int]],
    maintained: Sequence[float],
    alone: Sequence[float],
    events: Sequence["Event"],
) -> Path:
    """Write a PNG: `points` are the requests (from, to) of each share of right answers, 0 to 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes = figure.subplots()
    middles = [(a + b) / 2 for a, b in points]
    axes.plot(middles, [100 * x for x in alone], "o--", color="#999999", label="without maintenance")
    axes.plot(middles, [100 * x for x in maintained], "o-", color="#1f5fa8", lw=2.2, label="with Evergreen")
    end = points[-1][1]
    heights = {"phase": 107.5, "decision": 103, "promotion": 98.5}
    for event in events:
        if event.after >= end:  # nobody asked afterwards
            continue
        colour = COLOURS[event.kind]
        text = (
            f"adapter {event.text[:8]} serves" if event.kind == "promotion" else event.text.replace("_", " ")
        )
        axes.axvline(event.after, color=colour, lw=1.2, ls=":" if event.kind == "phase" else "-")
        axes.annotate(
            text, (event.after, heights[event.kind]), xytext=(4, 0), textcoords="offset points",
            color=colour, fontsize=9, va="center", annotation_clip=False,
        )  # fmt: skip
    axes.set(xlim=(0, end), ylim=(0, 111), xlabel="requests", ylabel="right answers, %")
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path, dpi=130)
    return path
