"""Money: what answers are worth to the business, minus the tokens they cost."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_assets.spec import ValueSpec

Row = Mapping[str, Any]


def is_refused(answer: str, spec: ValueSpec) -> bool:
    """Whether an answer matches the `refusal` pattern (anywhere in it)."""
    return spec.refusal is not None and re.search(spec.refusal, answer) is not None


def token_cost(row: Row, spec: ValueSpec) -> float:
    """What prompt and answer tokens of one row cost, in `currency`: the price of a hosted base where it
    answered, else `per_1000_tokens`."""
    if (price := row.get("token_cost")) is not None:
        return price
    return (row["prompt_tokens"] + row["answer_tokens"]) * spec.per_1000_tokens / 1000


def row_values(rows: Sequence[Row], spec: ValueSpec) -> NDArray[np.float64]:
    """Value of each evaluated row in `currency` per request. Right wins over refused."""
    worth = (spec.right if r["right"] else spec.refused if r["refused"] else spec.wrong for r in rows)
    return np.array([value - token_cost(row, spec) for value, row in zip(worth, rows, strict=True)])


def value_range(rows: Sequence[Row], spec: ValueSpec) -> tuple[float, float]:
    """The least and the most that one request can be worth, at the token costs seen in `rows`."""
    costs = [token_cost(row, spec) for row in rows] or [0.0]
    worth = (spec.right, spec.wrong, spec.refused)
    return min(worth) - max(costs), max(worth) - min(costs)
