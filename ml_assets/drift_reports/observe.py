"""What a detector needs to know of one request or one evaluated row: a few numbers."""

import json
import math
import sys
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import Any

from ml_assets.datasets.duplicates import fold
from ml_assets.datasets.snapshot import normalize
from ml_assets.eval_reports.metrics import normalize_label, parse_json
from ml_assets.eval_reports.value import is_refused
from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.records import TrafficRecord
from ml_assets.traffic.rows import invert

MOST_LABELS = 60
"""A field of JSON answers with more values than this is no label."""
LONGEST = 20_000
"""Characters of a question from which it is malformed: no one wrote it by hand."""


LATELY = 50
"""Requests after which the same text is a request of its own again."""


@dataclass(frozen=True)
class LabelRule:
    """Where an answer says what kind it is: the whole of it (`classification`), or a `key` of its JSON object
    that names an intent. `labels` are those of the training targets, the most frequent first; no labels, no
    kind."""

    task: str
    key: str | None
    labels: list[str]

    @classmethod
    def of(cls, spec: CustomizationSpec, targets: Sequence[str]) -> "LabelRule":
        task = spec.evaluation.task
        if task == "classification":
            return cls(task, None, _by_count(normalize_label(target) for target in targets))
        if task == "json":
            parsed = [value for target in targets if isinstance(value := _json(target), dict)]
            for key in _by_count(key for value in parsed for key in value):
                said = [value[key] for value in parsed if isinstance(value.get(key), str)]
                if len(said) == len(parsed) and 2 <= len(set(said)) <= MOST_LABELS:
                    return cls(task, key, _by_count(said))
        return cls(task, None, [])

    def label(self, answer: str) -> str | None:
        """The label of an answer; None where it has none."""
        if self.task == "classification":
            return normalize_label(answer)
        value = _json(answer)
        said = value.get(self.key) if isinstance(value, dict) and self.key else None
        return said if isinstance(said, str) else None

    def rank(self, answer: str) -> int:
        """Place of the answer's label among `labels`; one more than the last for every other answer."""
        label = self.label(answer)
        return self.labels.index(label) if label in self.labels else len(self.labels)


@dataclass(frozen=True)
class Answered:
    """An answer in numbers."""

    label: int
    length: float
    malformed: bool
    refused: bool


LEAST_LOGPROB = math.log(sys.float_info.min)
"""No probability is smaller, and sums of such values stay finite."""


@dataclass(frozen=True)
class Observation:
    """A request in numbers. `confidence` is the mean log-probability, None where it was not measured; `twin`
    stands for the text: equal texts, equal numbers."""

    seq: int
    id: str
    at: str
    day: int
    text: str
    twin: int
    answer: Answered
    confidence: float | None


class Lately:
    """The texts of the last requests, by `twin`: what one client repeats, or a timer, is counted once."""

    def __init__(self, twins: Iterable[int] = ()) -> None:
        self.twins = deque(twins, LATELY)

    def repeats(self, twin: int) -> bool:
        """Whether a request repeats one of the last; it is one of them from now on."""
        found = twin in self.twins
        self.twins.append(twin)
        return found


def answered(
    spec: CustomizationSpec, rule: LabelRule, answer: str, finished: bool, known: bool = True
) -> Answered:
    """Malformed is an empty answer, one that was cut off, one with control characters; JSON that does not
    parse where JSON is the task, and a label that no training row has where labels are. `known` is false
    for a question that is malformed itself."""
    rank = rule.rank(answer)
    broken = not answer.strip() or not finished or "\x00" in answer or not known
    if spec.evaluation.task == "json":
        broken = broken or _json(answer) is None
    if rule.labels:
        broken = broken or rank == len(rule.labels)
    return Answered(rank, math.log1p(len(answer)), broken, is_refused(answer, spec.evaluation.value))


def makes_sense(asked: str) -> bool:
    """Whether a question, as it came, is one: no empty, endless or binary one."""
    return bool(normalize(asked[: 2 * LONGEST])) and len(asked) <= LONGEST and "\x00" not in asked


def content(template: str, asked: str) -> str:
    """What differs from question to question: the columns of the template, or the whole text where that does
    not have its form. An embedding reads the beginning of a text, where the instruction of a template is."""
    text = normalize(asked[: 2 * LONGEST])
    columns = invert(template, text)
    return "\n".join(columns.values()) if columns else text


def observe(
    spec: CustomizationSpec, rule: LabelRule, record: TrafficRecord, template: str | None = None
) -> Observation:
    """Never fails, whatever was asked or answered. `template` is the champion's for the user message, by
    default that of the spec."""
    asked = [
        m.get("content") or "" for m in record.messages if isinstance(m, dict) and m.get("role") == "user"
    ]
    raw = "\n".join(str(text) for text in asked)
    text = content(spec.prompt.user if template is None else template, raw)
    confidence = confidence_of(record)
    nonsense = confidence is None and record.mean_logprob is not None
    known = makes_sense(raw) and not nonsense
    finished = record.finish_reason in (None, "stop")
    return Observation(
        record.seq or 0,
        record.id,
        record.at,
        day_of(record.at),
        text[:LONGEST],
        twin_of(text),
        answered(spec, rule, record.answer or "", finished, known),
        confidence,
    )


def confidence_of(record: TrafficRecord) -> float | None:
    """The mean log-probability of the answer, between LEAST_LOGPROB and 0; None where it was not measured, or
    is no number."""
    measured = record.mean_logprob
    if measured is None or not math.isfinite(measured):
        return None
    return min(0.0, max(LEAST_LOGPROB, float(measured)))


def twin_of(text: str) -> int:
    """A number below 2 ** 63 that is equal for texts that are equal but for case and spacing."""
    return int.from_bytes(blake2b(fold(text).encode("utf-8", "replace"), digest_size=8).digest()) >> 1


def day_of(at: str) -> int:
    """The calendar day (UTC) of an ISO 8601 time; 0 where it is none."""
    try:
        return datetime.fromisoformat(at).toordinal()
    except ValueError:
        return 0


def _json(text: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return None


def _by_count(values: Any) -> list[str]:
    counts = Counter(values)
    return sorted(counts, key=lambda value: (-counts[value], value))


def wrong_rows(lines: Sequence[Mapping[str, Any]]) -> list[bool]:
    return [not line["right"] for line in lines]


def as_json(observation: Observation) -> str:
    return json.dumps(vars(observation) | {"answer": vars(observation.answer)}, sort_keys=True)


def from_json(text: str) -> Observation:
    values = json.loads(text)
    return Observation(**values | {"answer": Answered(**values["answer"])})
