"""Pictures of a training."""

import base64
import io
from collections.abc import Sequence


def loss_curve(losses: Sequence[float]) -> str:
    """Markdown with the loss curve (nats per target token over steps) as an embedded PNG, under 60 kB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9ec7b0", linewidth=1, label="each step")
    window = max(1, len(losses) // 20)
    smooth = [
        sum(losses[max(0, i - window) : i + 1]) / (i + 1 - max(0, i - window)) for i in range(len(losses))
    ]
    axes.plot(steps, smooth, color="#14532d", linewidth=2, label=f"mean of {window + 1}")
    axes.set(xlabel="step", ylabel="loss (nats per target token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return f"![loss curve](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})"
