"""Failure memory: rows that were answered wrong in production, which later candidates must get right."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

DRILL = 2
"""Times more, in each pass, that a training sees a row which it will be held to: of 17 that were seen as
often as all others, a model of 135M parameters got 2 wrong after a few passes, and would not be promoted."""


def production_failures(rows: Sequence[Row], most: int) -> list[Row]:
    """Of a dataset's rows those that came from feedback whose right answer is not what was served, the newest
    `most`, newest first. What may be feedback was decided when the dataset was built
    (`ml_assets.datasets.admission`), and a row that the source has by now is the source's."""
    failed = [row for row in rows if row.get("_origin") == "feedback"]
    return sorted(failed, key=lambda row: (-int(row.get("_said") or 0), row["_row"]))[:most]


def drilled(rows: Sequence[Row], most: int) -> list[Row]:
    """What is trained on beside a dataset's training rows: DRILL times each of their production failures."""
    return [row for row in production_failures(rows, most) for _ in range(DRILL)]
