"""Which examples a base answers best with, measured on training rows within a budget of requests.

Ways to choose examples run against each other: all are asked the same few rows, the worse half is left, the
rest is asked twice as many, and so on (successive halving: Jamieson and Talwalkar 2016, arXiv 1502.07943).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ml_assets.adapters.recipe import example_pairs
from ml_assets.artifacts import sha256_bytes
from ml_assets.engine.examples import Examples, Nearest
from ml_assets.spec import CustomizationSpec

if TYPE_CHECKING:
    from ml_assets.engine.hosted import HostedModel
    from ml_assets.engine.loading import Base

Row = Mapping[str, Any]
FIRST_ROWS = 8
"""Rows of the first round."""
MOST_SETS = 8
"""Fixed sets that are tried."""


@dataclass(frozen=True)
class Way:
    """One way to choose examples. `rows` are the examples of a fixed set; None: the nearest to each question
    (`count` of them)."""

    name: str
    rows: tuple[Row, ...] | None
    count: int

    def examples(self, spec: CustomizationSpec, pool: Sequence[Row], answer_tokens: int) -> Examples:
        """The examples; `pool` are the rows that the nearest are found among."""
        if self.rows is not None:
            return Examples(tuple(example_pairs(spec.prompt, self.rows)), answer_tokens)
        pairs = example_pairs(spec.prompt, pool)
        return Examples(tuple(pairs), answer_tokens, Nearest.fit([asked for asked, _ in pairs]), self.count)


@dataclass(frozen=True)
class Measured:
    """How a way did: the mean of the deciding metric and of the prompt's tokens over `rows` rows."""

    name: str
    score: float
    prompt_tokens: float
    rows: int


def split_rows(rows: Sequence[Row], wanted: int) -> tuple[list[Row], list[Row]]:
    """(rows to show, rows to measure on): `wanted` of these, at most a third, the same ones as data grows but
    for the end."""
    ordered = sorted(rows, key=lambda row: sha256_bytes(f"examples{row['_row']}".encode()))
    n = min(wanted, len(rows) // 3)
    measured = {row["_row"] for row in ordered[:n]}
    return [row for row in rows if row["_row"] not in measured], ordered[:n]


def ways_of(spec: CustomizationSpec, pool: Sequence[Row], sets: int) -> list[Way]:
    """The ways that the YAML allows: `sets` fixed sets, each of different labels and segments, the nearest,
    and none."""
    from ml_assets.eval_reports.runner import choose_examples

    asked = spec.examples
    evaluation = spec.evaluation.model_copy(update={"few_shot": asked.count})
    fixed = [
        Way(f"set {i + 1}", tuple(choose_examples(pool, spec.prompt, evaluation, seed)), asked.count)
        for i, seed in enumerate(_seeds(spec.adapter.seed, sets))
    ]
    nearest = [Way(f"nearest {asked.count}", None, asked.count)]
    if asked.choose == "nearest":
        return nearest
    if asked.choose == "searched":
        return fixed
    return [*nearest, *fixed, Way("none", (), 0)]


def _seeds(seed: int, n: int) -> list[int]:
    drawn = random.Random(seed)
    return [seed, *(drawn.randrange(2**31) for _ in range(n - 1))][:n]


def requests_of(ways: int, rows: int) -> int:
    """Requests of a whole race."""
    total, asked, alive = 0, 0, ways
    while alive > 1 and asked < rows:
        upto = min(rows, 2 * asked or FIRST_ROWS)
        total += alive * (upto - asked)
        asked, alive = upto, max(1, alive // 2) if upto < rows else 1
    return total


def choose_way(
    base: "Base | HostedModel",
    spec: CustomizationSpec,
    rows: Sequence[Row],
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Way, list[Measured]]:
    """The best way to show examples from training rows, and what was measured, best first (nothing where
    there is no choice, or no budget for one: then it is the nearest, or the first set). Raises HostedError.
    """
    pool, held = split_rows(rows, spec.examples.validation_rows)
    sets = MOST_SETS
    while sets > 1 and requests_of(len(ways_of(spec, [], sets)), len(held)) > spec.examples.max_requests:
        sets -= 1
    ways = ways_of(spec, pool, sets)
    needed = requests_of(len(ways), len(held))
    if not held or len(ways) == 1 or needed > spec.examples.max_requests:
        tell(f"examples: {ways[0].name}, without measuring: {len(held)} rows, {needed} requests")
        return ways[0], []
    return _race(base, spec, ways, pool, held, tell)


def _race(
    base: "Base | HostedModel",
    spec: CustomizationSpec,
    ways: Sequence[Way],
    pool: Sequence[Row],
    held: Sequence[Row],
    tell: Callable[[str], None],
) -> tuple[Way, list[Measured]]:
    from ml_assets.eval_reports.runner import Arm, default_new_tokens, evaluate

    tokens = spec.evaluation.max_new_tokens or default_new_tokens(base, spec.prompt, pool)
    evaluation = spec.evaluation.model_copy(update={"max_new_tokens": tokens})
    shown = {way.name: way.examples(spec, pool, tokens) for way in ways}
    found: dict[str, Measured] = {}
    alive, asked = list(ways), 0
    while len(alive) > 1 and asked < len(held):
        asked = min(len(held), 2 * asked or FIRST_ROWS)
        for way in alive:
            # rows of an earlier round are not asked again: answers are kept
            arm = Arm("adapter", shots=shown[way.name])
            lines, _ = evaluate(base, spec.prompt, evaluation, held[:asked], pool, [arm])
            scores = [next(iter(line["scores"].values())) for line in lines]
            found[way.name] = Measured(
                way.name,
                sum(scores) / len(scores),
                sum(line["prompt_tokens"] for line in lines) / len(lines),
                asked,
            )
            tell(f"examples: {way.name}: {found[way.name].score:.3f} on {asked} rows")
        alive.sort(key=lambda way: _rank(found[way.name]))
        alive = alive[: max(1, len(alive) // 2)] if asked < len(held) else alive[:1]
    ranked = sorted(found.values(), key=lambda one: (-one.rows, *_rank(one)))
    return alive[0], ranked


def _rank(measured: Measured) -> tuple[float, float]:
    """Best first; of equals the one with the shorter prompt."""
    return -measured.score, measured.prompt_tokens
