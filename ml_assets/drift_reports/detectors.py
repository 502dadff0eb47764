"""The detectors: fed one block of requests after the other, counted from the first one of the reference.

A block is cut by number, never by when one looked, so the same requests give the same evidence however they
were divided into looks; and `state` and `restore` move a detector to another process, to the byte.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ml_assets.drift_reports.budget import SHARES, Purse
from ml_assets.drift_reports.ranks import Bets, Direction, Floats, Integers, bins_of, cuts, random_order

BLOCK = 20
"""Requests in a block of inputs or outputs."""
FEW = 5
"""Labelled requests in a block: they are rare."""
TRAIL = 4000
"""Blocks whose evidence is kept for pictures."""
REQUEST_ORDER, REFERENCE_ORDER = 1, 2
"""Seeds of the second numbers, by which equal scores are put in order."""
State = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Span:
    """A window of blocks: a comparison begins every `stride` blocks and ends after `life`."""

    blocks: int
    stride: int
    life: int


CLASSIFIER_SPANS = tuple(Span(w, max(2, w // 4), 4 * w) for w in (5, 10, 20, 40, 80, 160))
CONTRAST_SPANS = tuple(Span(w, max(2, w // 4), 4 * w) for w in (10, 40, 160))
SCORE_SPANS = tuple(Span(w, w, 8 * w) for w in (4, 16, 64, 256))
MMD_WINDOWS = (2, 4, 8, 16, 32, 64)


class Detector:
    """What all share: the budget, the evidence so far, and the alarm, which stays.

    Evidence is scaled by the weight that a comparison took from the budget: an alarm when it reaches
    `threshold`.
    """

    def __init__(self, name: str, days: float, kinds: int, share: float | None = None):
        """`days` is N of 'at most one false alarm in N days', `kinds` the number of windows."""
        self.name = name
        self.threshold = days
        self.share = (SHARES[name] if share is None else share) / kinds
        self.purses = [Purse() for _ in range(kinds)]
        self.day: int | None = None
        self.blocks = 0
        self.spent = 0.0
        self.log_evidence = -np.inf
        self.log_peak = -np.inf
        self.alarmed_at: int | None = None
        self.trail: list[tuple[float, float]] = []

    @property
    def alarm(self) -> bool:
        return self.alarmed_at is not None

    @property
    def e_value(self) -> float:
        return float(np.exp(min(self.log_evidence, 700.0)))

    @property
    def p_value(self) -> float:
        """Holds at any time: the chance that the evidence ever gets this far is at most the weights that were
        begun, over the evidence."""
        return float(min(1.0, self.spent * np.exp(-max(self.log_peak, -700.0)))) if self.spent else 1.0

    def block(self, rows: Floats, seqs: Sequence[int], day: int) -> None:
        """The next block: scores (n,) or features (n, d), the requests' `seq`, and the day of the last."""
        if self.day is None or day > self.day:
            passed = 1 if self.day is None else day - self.day
            for purse in self.purses:
                purse.add(passed, self.share)
            self.day = day
        self._update(rows, np.asarray(seqs, dtype=np.int64))
        self.blocks += 1
        self.log_peak = max(self.log_peak, self.log_evidence)
        if not self.alarm and self.log_evidence >= np.log(self.threshold):
            self.alarmed_at = int(seqs[-1])
        self.trail = [*self.trail[-TRAIL + 1 :], (float(seqs[-1]), float(self.log_evidence))]

    def _update(self, rows: Floats, seqs: Integers) -> None:
        raise NotImplementedError

    def _take(self, kind: int) -> float:
        weight = self.purses[kind].take()
        self.spent += weight
        return weight

    def state(self) -> State:
        alarmed = -1 if self.alarmed_at is None else self.alarmed_at
        day = -1 if self.day is None else self.day
        return {
            "counters": np.array([self.blocks, alarmed, day], dtype=np.int64),
            "evidence": np.array([self.spent, self.log_evidence, self.log_peak]),
            "purses": np.array([[p.held, p.today, p.fullest] for p in self.purses], dtype=float),
            "trail": np.array(self.trail, dtype=float).reshape(-1, 2),
        }

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        blocks, alarmed, day = (int(v) for v in state["counters"])  # type: ignore[arg-type]
        self.blocks, self.alarmed_at, self.day = (
            blocks,
            alarmed if alarmed >= 0 else None,
            day if day >= 0 else None,
        )
        self.spent, self.log_evidence, self.log_peak = (float(v) for v in state["evidence"])  # type: ignore[arg-type]
        self.purses = [Purse(float(h), int(t), int(f)) for h, t, f in state["purses"]]  # type: ignore[arg-type]
        self.trail = [(float(a), float(b)) for a, b in state["trail"]]  # type: ignore[arg-type]


@dataclass
class Runs:
    """Comparisons under way (R of them): when each ends, the log of its weight, and its counts (R, k)."""

    ends: Integers
    log_weights: Floats
    counts: Integers
    extra: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    @classmethod
    def none(cls, bins: int, **extra: NDArray[np.generic]) -> "Runs":
        return cls(
            np.zeros(0, np.int64),
            np.zeros(0),
            np.zeros((0, bins), np.int64),
            {k: v[:0] for k, v in extra.items()},
        )

    def begin(self, end: int, weight: float, **extra: NDArray[np.generic]) -> None:
        self.ends = np.append(self.ends, end)
        self.log_weights = np.append(self.log_weights, np.log(max(weight, 1e-300)))
        self.counts = np.concatenate([self.counts, np.zeros((1, self.counts.shape[1]), np.int64)])
        for name, value in extra.items():
            self.extra[name] = np.concatenate([self.extra[name], value[None]])

    def retire(self, now: int) -> None:
        kept = self.ends > now
        if not kept.all():
            self.ends, self.log_weights, self.counts = (
                self.ends[kept],
                self.log_weights[kept],
                self.counts[kept],
            )
            self.extra = {name: value[kept] for name, value in self.extra.items()}

    def count(self, bins: Integers) -> None:
        """Add one block: bins (R, n) of its rows."""
        k = self.counts.shape[1]
        self.counts = self.counts + np.sum(bins[..., None] == np.arange(k), axis=1)

    def state(self) -> State:
        found: State = {"ends": self.ends, "log_weights": self.log_weights, "counts": self.counts}
        return found | {f"x_{name}": value for name, value in self.extra.items()}

    @classmethod
    def of(cls, state: Mapping[str, NDArray[np.generic]]) -> "Runs":
        extra = {name.removeprefix("x_"): value for name, value in state.items() if name.startswith("x_")}
        return cls(state["ends"], state["log_weights"], state["counts"], extra)  # type: ignore[arg-type]


class ScoreDetector(Detector):
    """One number of each request against the numbers of the reference rows.

    Args:
        reference: (n,) numbers of the reference rows, by a rule that does not depend on them.
        gaps: where they are cut: `ranks.gaps_above`, `gaps_even` or `gaps_of_shares`.
        direction: `higher` when only higher numbers are harm, `any` for every change.
    """

    def __init__(self, name: str, days: float, reference: Floats, gaps: Integers, direction: Direction):
        super().__init__(name, days, len(SCORE_SPANS))
        self.gaps = gaps
        self.bets = Bets.on(gaps, direction)
        order = random_order(np.arange(len(reference), dtype=np.int64), REFERENCE_ORDER)
        self.edges = cuts(np.asarray(reference, dtype=float), order, gaps)
        self.runs = Runs.none(len(gaps))
        self.best = 0

    def _update(self, rows: Floats, seqs: Integers) -> None:
        self.runs.retire(self.blocks)
        for kind, span in enumerate(SCORE_SPANS):
            if self.blocks % span.stride == 0:
                self.runs.begin(self.blocks + span.life, self._take(kind))
        bins = bins_of(np.asarray(rows, dtype=float), random_order(seqs, REQUEST_ORDER), self.edges)
        self.runs.count(np.broadcast_to(bins, (len(self.runs.ends), len(bins))))
        evidence = self.runs.log_weights + self.bets.log_evidence(self.runs.counts)
        self.best = int(np.argmax(evidence))
        self.log_evidence = float(evidence[self.best])

    def state(self) -> State:
        return super().state() | {f"runs.{k}": v for k, v in self.runs.state().items()}

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        super().restore(state)
        self.runs = Runs.of(_below("runs.", state))


class ClassifierDetector(Detector):
    """A classifier of 'reference or traffic', again and again fitted on the last requests, and tested on
    those that come after.

    Fitted on a window of each length: the direction from the mean of one part of the reference (`whitened`
    features have mean 0 and variance 1 there) to the mean of the window, which is Fisher's discriminant.
    The requests after the window and the other part of the reference, `held` (n, d), are scored by it and
    compared by rank. With `contrasts` (r, d), orthonormal, another one is fitted within these directions
    alone: where it is the mix of the kinds of requests that changes, a mean of few numbers is found with less
    noise than one of many.
    """

    def __init__(
        self,
        days: float,
        held: NDArray[np.float32],
        gaps: Integers,
        contrasts: NDArray[np.float32] | None = None,
        name: str = "inputs_classifier",
    ):
        self.spans = [(span, None) for span in CLASSIFIER_SPANS]
        if contrasts is not None and len(contrasts):
            self.spans += [(span, contrasts) for span in CONTRAST_SPANS]
        super().__init__(name, days, len(self.spans))
        self.held = held
        self.gaps = gaps
        self.bets = Bets.on(gaps, "higher")
        self.held_order = random_order(np.arange(len(held), dtype=np.int64), REFERENCE_ORDER)
        d = held.shape[1]
        self.sums = np.zeros((0, d))
        self.runs = Runs.none(
            len(gaps), direction=np.zeros((0, d), np.float32), edges=np.zeros((0, len(gaps) - 1, 2))
        )

    def _update(self, rows: Floats, seqs: Integers) -> None:
        self.runs.retire(self.blocks)
        for kind, (span, within) in enumerate(self.spans):
            if self.blocks >= span.blocks and (self.blocks - span.blocks) % span.stride == 0:
                mean = self.sums[-span.blocks :].sum(axis=0) / (span.blocks * BLOCK)
                direction = fisher(mean if within is None else (mean @ within.T) @ within)
                edges = cuts(exactly(self.held, direction[None])[0], self.held_order, self.gaps)
                self.runs.begin(self.blocks + span.life, self._take(kind), direction=direction, edges=edges)
        longest = CLASSIFIER_SPANS[-1].blocks
        if len(self.runs.ends):
            scores = exactly(rows.astype(np.float32), self.runs.extra["direction"])  # type: ignore[arg-type]
            self.runs.count(bins_of(scores, random_order(seqs, REQUEST_ORDER), self.runs.extra["edges"]))  # type: ignore[arg-type]
            evidence = self.runs.log_weights + self.bets.log_evidence(self.runs.counts)
            self.log_evidence = float(evidence.max())
        self.sums = np.concatenate([self.sums[-longest + 1 :], rows.sum(axis=0, dtype=float)[None]])

    def best_direction(self) -> NDArray[np.float32] | None:
        """The classifier with the most evidence; None as long as there is none."""
        if not len(self.runs.ends):
            return None
        evidence = self.runs.log_weights + self.bets.log_evidence(self.runs.counts)
        return self.runs.extra["direction"][int(np.argmax(evidence))]  # type: ignore[return-value]

    def state(self) -> State:
        return super().state() | {"sums": self.sums} | {f"runs.{k}": v for k, v in self.runs.state().items()}

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        super().restore(state)
        self.sums = state["sums"]  # type: ignore[assignment]
        self.runs = Runs.of(_below("runs.", state))


def fisher(mean: Floats) -> NDArray[np.float32]:
    """Unit direction (d,) from the reference's mean (0 in whitened features) to `mean`."""
    norm = float(np.linalg.norm(mean))
    return (mean / norm if norm > 0 else mean).astype(np.float32)


def exactly(rows: NDArray[np.float32], directions: NDArray[np.float32]) -> Floats:
    """Scores (R, n) of rows (n, d) by directions (R, d): equal for equal rows, which the last digits of a
    product are not when it is computed in other company. Else all repeats of a text would be on one side of
    a cut at this text."""
    return (directions.astype(float) @ rows.T.astype(float)).astype(np.float32).astype(float)


def _below(prefix: str, state: Mapping[str, NDArray[np.generic]]) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
