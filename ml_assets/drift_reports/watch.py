"""All detectors of one customization, what they were fed, and what they found.

Everything is counted in blocks from the first request of the reference. What is left over waits for the next
look, as part of the state; so a state says exactly which requests were counted, and each is counted once.

A text that was among the last requests is not counted again: a client that tries again, or a timer, says no
more about the others than the first time. Inputs count other repeats, like the reference, which has each
row as often as the source. Answers count each text once, like the frozen rows.

Anybody with a key can send right answers, so no key counts for more than its share, of what is shown and of
the evidence. Which ones count follows from keys and order alone, never from what was right, so what counts is
still a fair sample when nothing has changed.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_assets.artifacts import canonical_json
from ml_assets.drift_reports import ranks
from ml_assets.drift_reports.detectors import (
    BLOCK,
    FEW,
    ClassifierDetector,
    Detector,
    ScoreDetector,
    State,
)
from ml_assets.drift_reports.embeddings import Embed
from ml_assets.drift_reports.mmd import Kernel, MmdDetector, Tails
from ml_assets.drift_reports.observe import (
    Lately,
    Observation,
    as_json,
    confidence_of,
    day_of,
    from_json,
)
from ml_assets.drift_reports.projection import surface_of
from ml_assets.drift_reports.reference import Reference
from ml_assets.eval_reports.metrics import metric_name, right_from, row_scores
from ml_assets.eval_reports.value import is_refused, row_values
from ml_assets.spec import CustomizationSpec, FeedbackSpec
from ml_assets.traffic.records import OPERATOR, Judged
from ml_assets.traffic.rows import row_of

RECENT = 400
"""Requests whose details are kept, for rows to show and for estimates of how things are now."""
REMEMBERED = 50_000
"""Texts that are remembered as asked before."""
ANSWERS = ("outputs_mix", "outputs_length", "outputs_malformed", "outputs_refusals")
SERIES = 5
"""Blocks in a point of the time series."""
FEWEST_ANSWERS = 20
"""Frozen rows below which outputs are not compared."""
FEW_LABELS = 20
"""Right answers from users below which the loss is estimated, and beside which no key needs to be held to its
share: there is nothing yet that it could drown."""


@dataclass
class Recent:
    """A counted request, for people."""

    seq: int
    id: str
    at: str
    prompt: str
    answer: str
    label: int
    length: float
    malformed: bool
    refused: bool
    confidence: float | None


@dataclass
class Labelled:
    """A request with its right answer."""

    seq: int
    id: str
    right: bool
    value: float
    confidence: float | None
    prompt: str
    answer: str
    expected: str
    key: str
    given: int
    counted: int
    """Its number among all right answers, and among those that count."""


@dataclass
class Progress:
    """How far one has read, and what is waiting for a full block."""

    from_seq: int = 0
    to_seq: int = 0
    feedback_seq: int = 0
    read: int = 0
    counted: int = 0
    repeated: int = 0
    labelled: int = 0
    labels_counted: int = 0
    first_at: str = ""
    last_at: str = ""
    waiting: list[Observation] = field(default_factory=list)
    answers: dict[int, str] = field(default_factory=dict)
    answered: list[tuple[int, int, int, float, bool, bool]] = field(default_factory=list)
    confident: list[tuple[int, str, float]] = field(default_factory=list)
    judged: list[tuple[int, str, bool]] = field(default_factory=list)
    recent: list[Recent] = field(default_factory=list)
    labels: list[Labelled] = field(default_factory=list)
    given: dict[str, int] = field(default_factory=dict)
    """Right answers by key, those that do not count included."""
    series: list[list[float]] = field(default_factory=list)
    block_sums: list[list[float]] = field(default_factory=list)


class Watch:
    """The detectors over one reference; `days` is N of 'at most one false alarm in N days'."""

    def __init__(self, spec: CustomizationSpec, reference: Reference, days: float):
        self.spec, self.reference = spec, reference
        self.progress = Progress()
        self.seen: dict[int, None] = {}
        self.lately = Lately()
        self.judged: dict[str, None] = {}
        self.detectors = _detectors(reference, days)
        self.projection = reference.projection if "held" in reference.arrays else None
        width = reference.arrays["held"].shape[1] if "held" in reference.arrays else 0
        self.features = np.zeros((0, width), np.float32)  # of `progress.recent`
        metric = spec.evaluation.resolved_metrics()[0]
        self._score = row_scores([metric], spec.evaluation.task)[metric_name(metric)]
        self._right_from = right_from(metric_name(metric))

    # -- feeding ---------------------------------------------------------------------------------------

    def add(self, observations: Sequence[tuple[Observation, str]], embed: Embed) -> None:
        """Count requests in the order of `seq`; each comes with its answer's text."""
        p = self.progress
        for observation, answer in observations:
            p.to_seq = max(p.to_seq, observation.seq)
            p.from_seq = p.from_seq or observation.seq
            p.first_at = p.first_at or observation.at
            p.last_at = max(p.last_at, observation.at)
            p.read += 1
            if self.lately.repeats(observation.twin):
                p.repeated += 1
                continue
            if observation.twin not in self.seen:
                self.seen[observation.twin] = None
                if len(self.seen) > REMEMBERED:
                    del self.seen[next(iter(self.seen))]
                self._answered(observation)
            p.waiting.append(observation)
            p.answers[observation.seq] = answer[:400]
            if len(p.waiting) == BLOCK:
                self._block(p.waiting, embed)
                p.waiting, p.answers = [], {}

    def _block(self, block: list[Observation], embed: Embed) -> None:
        p = self.progress
        if self.projection is not None:
            seqs, day, texts = [o.seq for o in block], max(o.day for o in block), [o.text for o in block]
            rows = self.projection.apply(embed(texts), surface_of(texts))
            self.features = np.concatenate([self.features, rows])[-RECENT:]
            for name in ("inputs_classifier", "inputs_mmd"):
                if name in self.detectors:
                    self.detectors[name].block(rows, seqs, day)  # type: ignore[arg-type]
        p.counted += len(block)
        for o in block:
            p.recent.append(
                Recent(
                    o.seq,
                    o.id,
                    o.at,
                    o.text[:400],
                    p.answers[o.seq],
                    **vars(o.answer),
                    confidence=o.confidence,
                )
            )
        p.recent = p.recent[-RECENT:]
        known = [o.confidence for o in block if o.confidence is not None]
        p.block_sums.append(
            [
                sum(o.answer.malformed for o in block) / len(block),
                sum(o.answer.refused for o in block) / len(block),
                sum(o.answer.length for o in block) / len(block),
                sum(known) / len(known) if known else math.nan,
            ]
        )
        if len(p.block_sums) == SERIES:
            with np.errstate(all="ignore"):
                means = np.array(p.block_sums)
                valid = ~np.isnan(means)
                point = np.where(
                    valid.any(axis=0),
                    np.where(valid, means, 0).sum(axis=0) / np.maximum(valid.sum(axis=0), 1),
                    np.nan,
                )
            p.series = [*p.series[-999:], [float(block[-1].seq), *map(float, point)]]
            p.block_sums = []

    def _answered(self, o: Observation) -> None:
        """Count the answer to a text that was not asked before."""
        p, a = self.progress, o.answer
        p.answered.append((o.seq, o.day, a.label, a.length, a.malformed, a.refused))
        if len(p.answered) == BLOCK:
            seqs, days, *columns = zip(*p.answered, strict=True)
            p.answered = []
            for name, values in zip(ANSWERS, columns, strict=True):
                if name in self.detectors:
                    self.detectors[name].block(np.array(values, dtype=float), seqs, max(days))
        if o.confidence is not None:
            p.confident.append((o.seq, o.at, o.confidence))
            if len(p.confident) == BLOCK:
                self._confident()

    def _confident(self) -> None:
        waiting, self.progress.confident = self.progress.confident, []
        if "outcome_estimated" in self.detectors:
            values = np.array([-confidence for _, _, confidence in waiting])
            day = max(day_of(at) for _, at, _ in waiting)
            self.detectors["outcome_estimated"].block(values, [seq for seq, _, _ in waiting], day)

    def judge(self, feedback: Sequence[Judged]) -> None:
        """Count right answers, each request once, and of no key more than its share: in the order in which
        users gave them."""
        p = self.progress
        for judged in feedback:
            p.feedback_seq = max(p.feedback_seq, judged.feedback.seq or 0)
            expected, request = judged.feedback.right_answer, judged.request
            if expected is None or request.id in self.judged:
                continue
            self.judged[request.id] = None
            row = row_of(self.spec, request, expected) or request.metadata
            right = self.is_right(expected, request.answer, row)
            if right is None:
                continue
            key = judged.feedback.key_id
            p.labelled += 1
            p.given[key] = p.given.get(key, 0) + 1
            if not self._takes(key):
                continue
            p.labels_counted += 1
            value = row_values(
                [
                    {
                        "right": right,
                        "refused": is_refused(request.answer, self.spec.evaluation.value),
                        "prompt_tokens": request.prompt_tokens,
                        "answer_tokens": request.completion_tokens,
                    }
                ],
                self.spec.evaluation.value,
            )[0]
            asked = [m.get("content", "") for m in request.messages if m.get("role") == "user"]
            p.labels.append(
                Labelled(
                    request.seq or 0,
                    request.id,
                    right,
                    float(value),
                    confidence_of(request),
                    "\n".join(asked)[:400],
                    request.answer[:400],
                    expected[:400],
                    key,
                    p.labelled,
                    p.labels_counted,
                )
            )
            p.labels = [label for label in p.labels if label.counted > p.labels_counted - RECENT]
            p.judged.append((request.seq or 0, judged.feedback.at, right))
            if len(p.judged) == FEW:
                if "outcome_feedback" in self.detectors:
                    wrong = np.array([not right for _, _, right in p.judged], dtype=float)
                    day = max(day_of(at) for _, at, _ in p.judged)
                    self.detectors["outcome_feedback"].block(wrong, [seq for seq, _, _ in p.judged], day)
                p.judged = []

    def _takes(self, key: str) -> bool:
        """Whether the next right answer of a key counts. One of a key that has its share already takes the
        place of the key's oldest, once that is RECENT right answers ago."""
        p = self.progress
        own = [label.given for label in p.labels if label.key == key]
        others = len(p.labels) - len(own)
        if others < FEW_LABELS or len(own) < most_of_key(self.spec.feedback, key, others):
            return True
        if p.labelled - own[0] < RECENT:
            return False
        p.labels = [label for label in p.labels if label.given != own[0]]
        return True

    def usable(self) -> int:
        """Right answers that a dataset would take by its share per key; what they say may leave out more."""
        given = self.progress.given
        total = sum(given.values())
        return round(sum(min(n, most_of_key(self.spec.feedback, key, total - n)) for key, n in given.items()))

    def strangeness(self) -> list[float] | None:
        """How little each of `progress.recent` is like the reference, by the classifier with the most
        evidence: about standard normal for a row of the reference. None as long as there is no
        classifier."""
        classifier = self.detectors.get("inputs_classifier")
        direction = classifier.best_direction() if isinstance(classifier, ClassifierDetector) else None
        return None if direction is None else [float(score) for score in self.features @ direction]

    def is_right(self, expected: str, answer: str, row: Mapping[str, Any]) -> bool | None:
        """By the first metric; None where it can't be told: by a label that the metric can't read, or a row
        without a column that it needs."""
        try:
            return float(self._score(expected, answer, row)) >= self._right_from
        except Exception:
            return None

    # -- state -----------------------------------------------------------------------------------------

    def save(self) -> dict[str, bytes]:
        """Files of the state. Same requests, same bytes."""
        from safetensors.numpy import save

        arrays: State = {
            "seen": np.fromiter(self.seen, dtype=np.int64, count=len(self.seen)),
            "lately": np.array(self.lately.twins, dtype=np.int64),
            "features": self.features,
        }
        for name, detector in self.detectors.items():
            arrays |= {f"{name}.{key}": value for key, value in detector.state().items()}
        p = self.progress
        notes = {f.name: getattr(p, f.name) for f in dataclasses.fields(p)} | {
            "waiting": [as_json(o) for o in p.waiting],
            "answers": {str(seq): text for seq, text in p.answers.items()},
            "recent": [vars(r) for r in p.recent],
            "labels": [vars(x) for x in p.labels],
            "series": [[None if math.isnan(v) else v for v in point] for point in p.series],
            "block_sums": [[None if math.isnan(v) else v for v in point] for point in p.block_sums],
        }
        return {
            "state.safetensors": save({name: np.ascontiguousarray(value) for name, value in arrays.items()}),
            "state.json": canonical_json(_clean({"progress": notes, "judged": list(self.judged)})),
        }

    def load(self, files: Mapping[str, bytes]) -> None:
        from safetensors.numpy import load

        arrays = load(files["state.safetensors"])
        self.seen = dict.fromkeys(int(twin) for twin in arrays.pop("seen"))
        self.lately = Lately(int(twin) for twin in arrays.pop("lately"))
        self.features = arrays.pop("features")
        for name, detector in self.detectors.items():
            prefix = f"{name}."
            detector.restore({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
        notes = json.loads(files["state.json"])
        self.judged = dict.fromkeys(notes["judged"])
        values = notes["progress"]

        def numbers(points: Any) -> list[list[float]]:
            return [[math.nan if v is None else v for v in point] for point in points]

        self.progress = Progress(
            **values
            | {
                "waiting": [from_json(text) for text in values["waiting"]],
                "answers": {int(seq): text for seq, text in values["answers"].items()},
                "answered": [tuple(one) for one in values["answered"]],
                "confident": [(s, a, c) for s, a, c in values["confident"]],
                "judged": [(s, a, r) for s, a, r in values["judged"]],
                "recent": [Recent(**r) for r in values["recent"]],
                "labels": [Labelled(**x) for x in values["labels"]],
                "series": numbers(values["series"]),
                "block_sums": numbers(values["block_sums"]),
            }
        )


def _clean(value: Any) -> Any:
    """JSON without lone surrogates, which UTF-8 does not have."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return value


def most_of_key(rules: FeedbackSpec, key: str, others: int) -> float:
    """Right answers of a key that count beside so many of the others: as many as a dataset takes. The
    operator's all do."""
    if key == OPERATOR or rules.max_share_per_key == 1:
        return math.inf
    share = rules.max_share_per_key
    return max(rules.min_rows_per_key, int(share / (1 - share) * others))


def input_detectors(arrays: Mapping[str, NDArray[np.generic]], days: float) -> dict[str, Detector]:
    """From what `reference.input_arrays` gave."""
    if "held" not in arrays:
        return {}
    held: Any = arrays["held"]
    tails = Tails(tuple(int(w) for w in arrays["windows"]), arrays["tails"])  # type: ignore[arg-type]
    found: dict[str, Detector] = {
        "inputs_classifier": ClassifierDetector(
            days,
            held,
            ranks.gaps_above(len(held)),
            arrays["contrasts"],  # type: ignore[arg-type]
        )
    }
    if tails.windows:
        kernel = Kernel(arrays["frequencies"])  # type: ignore[arg-type]
        found["inputs_mmd"] = MmdDetector(days, kernel, arrays["mmd_mean"], tails)  # type: ignore[arg-type]
    return found


def _detectors(reference: Reference, days: float) -> dict[str, Detector]:
    arrays, mix = reference.arrays, reference.about["mix"]
    found = input_detectors(arrays, days)
    n = len(arrays["wrong"])
    if n < FEWEST_ANSWERS:
        return found

    def score(name: str, values: Any, gaps: ranks.Integers, direction: ranks.Direction) -> None:
        found[name] = ScoreDetector(name, days, np.asarray(values, dtype=float), gaps, direction)

    above = ranks.gaps_above(n)
    if mix:
        score("outputs_mix", arrays["label"], ranks.gaps_of_shares(n, mix), "any")
    score("outputs_length", arrays["length"], ranks.gaps_even(n), "any")
    score("outputs_malformed", arrays["malformed"], above, "higher")
    if reference.about["refusal"]:
        score("outputs_refusals", arrays["refused"], above, "higher")
    score("outcome_feedback", arrays["wrong"], above, "higher")
    known = arrays["confidence"].astype(float)
    known = known[~np.isnan(known)]
    if len(known) >= FEWEST_ANSWERS:
        score("outcome_estimated", -known, ranks.gaps_above(len(known)), "higher")
    return found
