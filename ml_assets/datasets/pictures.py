"""Pictures of a dataset."""

import base64
import io
import re
from collections.abc import Mapping, Sequence


def count_words(text: str) -> int:
    """Words, numbers and punctuation marks. The base's tokenizer is not known to a dataset; most have one to
    two tokens for each of these in English."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def length_histogram(lengths: Mapping[str, Sequence[int]]) -> str:
    """Markdown with histograms of lengths in words, a panel for each name, as an embedded PNG under 60 kB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(lengths), 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, values) in zip(
        figure.subplots(1, len(lengths), squeeze=False)[0], lengths.items(), strict=True
    ):
        longest = max(values, default=1)
        width = max(1, -(-longest // 30))
        axes.hist(values, bins=range(0, longest + 2 * width, width), color="#2f7d5b", edgecolor="white")
        axes.set(xlabel=f"{name}: words and marks", ylabel="rows")
        axes.margins(x=0)
        axes.locator_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    picture = base64.b64encode(buffer.getvalue()).decode()
    return f"![lengths in words](data:image/png;base64,{picture})"
