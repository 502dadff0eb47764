"""Scores of answers, one row at a time; every mean is derived from them. Scores are 0..1, higher is better.

Three rules make an answer comparable: runs of whitespace are one space; labels also ignore case, quotes
around them, a final full stop and how accents are encoded; JSON is compared as values, so that spacing and
order of keys don't count.
"""

import importlib
import json
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_assets.spec import Metric, PythonMetric

Score = Callable[[str, str, Mapping[str, Any]], float]
# a similarity is hardly ever 1: from here on an answer counts as right
GRADED = {"chrf": 0.5, "rouge_l": 0.5}
CORPUS = {"macro_f1"}


class MetricError(ValueError):
    """A metric can't be computed; the message names the metric and what was expected."""


def metric_name(metric: Metric) -> str:
    """The name under which a metric's scores are kept: its own, or `package.module:function`."""
    return metric.callable if isinstance(metric, PythonMetric) else metric


def right_from(name: str) -> float:
    """The score from which an answer counts as right."""
    return GRADED.get(name, 0.5 if ":" in name else 1.0)


def normalize(text: str) -> str:
    """Runs of whitespace become one space, none at the ends."""
    return " ".join(text.split())


def normalize_label(text: str) -> str:
    """A class label: also without case, quotes around it and a final full stop, on either side of them, and
    in the composed form of its accents."""
    text = normalize(unicodedata.normalize("NFC", text)).removesuffix(".").strip("\"'`*")
    return normalize(normalize(text).removesuffix(".")).casefold()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError when it is not one (NaN and Infinity are not)."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _number(value: Any) -> Any:
    """1 and 1.0 are the same number, and true is not 1."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def json_leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    """(path, value) of every scalar and empty container; items of a list share a path, with their index."""
    if isinstance(value, dict) and value:
        return [leaf for key in sorted(value) for leaf in json_leaves(value[key], (*path, f".{key}"))]
    if isinstance(value, list) and value:
        return [leaf for i, item in enumerate(value) for leaf in json_leaves(item, (*path, f"[{i}]"))]
    return [(path, json.dumps(_number(value)))]


def _parse_or_none(text: str) -> list[tuple[tuple[str, ...], str]] | None:
    try:
        return json_leaves(parse_json(text))
    except (ValueError, RecursionError):
        return None


def _exact_match(expected: str, answer: str, row: Mapping[str, Any]) -> float:
    return float(normalize(expected) == normalize(answer))


def _exact_json(expected: str, answer: str, row: Mapping[str, Any]) -> float:
    found = _parse_or_none(answer)
    return float(found is not None and found == _parse_or_none(expected))


def _json_valid(expected: str, answer: str, row: Mapping[str, Any]) -> float:
    return float(_parse_or_none(answer) is not None)


def _json_field_f1(expected: str, answer: str, row: Mapping[str, Any]) -> float:
    wanted, found = _parse_or_none(expected), _parse_or_none(answer)
    if wanted is None:
        raise MetricError(f"json_field_f1: expected answer is not JSON: {expected[:200]!r}")
    if found is None:
        return 0.0
    common = (Counter(wanted) & Counter(found)).total()
    return 2 * common / (len(wanted) + len(found))


def _accuracy(expected: str, answer: str, row: Mapping[str, Any]) -> float:
    return float(normalize_label(expected) == normalize_label(answer))


@lru_cache(maxsize=1)
def _chrf_scorer() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def _chrf(expected: str, answer: str, row: Mapping[str, Any]) -> float:
    if not expected.strip() or not answer.strip():
        return float(expected.strip() == answer.strip())
    return _chrf_scorer().sentence_score(answer, [expected]).score / 100


class _Words:
    """Words of any script, for rouge-score: its own tokenizer keeps a-z and 0-9 alone, so that other scripts
    score 0. A character of a script without spaces is a word. Vowels and accents may be marks that follow
    their letter: they are part of it."""

    _unspaced = r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0e7f]"

    def __init__(self) -> None:
        characters = map(chr, range(sys.maxunicode + 1))
        mark = "[" + "".join(c for c in characters if unicodedata.category(c) in ("Mn", "Mc")) + "]"
        self._word = re.compile(rf"{self._unspaced}{mark}*|(?:(?!{self._unspaced})[^\W_]{mark}*)+")

    def tokenize(self, text: str) -> list[str]:
        return self._word.findall(unicodedata.normalize("NFC", text).casefold())


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def _rouge_l(expected: str, answer: str, row: Mapping[str, Any]) -> float:
    if not expected.strip() or not answer.strip():
        return float(expected.strip() == answer.strip())
    return float(_rouge_scorer().score(expected, answer)["rougeL"].fmeasure)


_SCORES: dict[str, Score] = {
    "exact_match": _exact_match,
    "json_valid": _json_valid,
    "json_field_f1": _json_field_f1,
    "accuracy": _accuracy,
    "chrf": _chrf,
    "rouge_l": _rouge_l,
}


def resolve_callable(path: str) -> Callable[..., Any]:
    """`package.module:function`. Raises MetricError that names what is missing."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MetricError(
            f"metric {path}: expected an importable 'package.module:function': {error}"
        ) from error
    if not callable(function):
        raise MetricError(f"metric {path}: expected a function, found {type(function).__name__}")
    return function


def _checked(path: str) -> Score:
    function = resolve_callable(path)

    def score(expected: str, answer: str, row: Mapping[str, Any]) -> float:
        value = function(expected, answer, dict(row))
        if isinstance(value, (bool, int, float, np.number)):
            number = float(value)
            if math.isfinite(number) and 0 <= number <= 1:
                return number
        raise MetricError(f"metric {path}: expected a number from 0 to 1, found {value!r}")

    return score


def row_scores(metrics: Sequence[Metric], task: str) -> dict[str, Score]:
    """Name -> f(expected, answer, row) for every metric that scores rows (macro_f1 is of the corpus)."""
    scores: dict[str, Score] = {}
    for metric in metrics:
        name = metric_name(metric)
        if isinstance(metric, PythonMetric):
            scores[name] = _checked(name)
        elif metric == "exact_match" and task == "json":
            scores[name] = _exact_json
        elif metric not in CORPUS:
            scores[name] = _SCORES[metric]
    return scores


def macro_f1(
    expected: Sequence[str], answers: Sequence[str], weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Mean F1 over the labels that are expected; an answer that is no label counts against its row's label.

    `weights`: draws x rows, for intervals; default one draw of ones. Returns one value per draw.
    """
    wanted = [normalize_label(text) for text in expected]
    given = [normalize_label(text) for text in answers]
    labels = sorted(set(wanted))
    if weights is None:
        weights = np.ones((1, len(wanted)))
    if not labels:
        return np.full(len(weights), np.nan)
    is_label = np.array([[text == label for label in labels] for text in wanted], dtype=float)
    is_answer = np.array([[text == label for label in labels] for text in given], dtype=float)
    hits = weights @ (is_label * is_answer)
    total = weights @ (is_label + is_answer)
    return np.mean(np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0), axis=1)
