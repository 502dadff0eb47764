"""Metrics and money: what counts as right, and what it is worth."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from ml_assets.eval_reports.metrics import MetricError, macro_f1, right_from, row_scores
from ml_assets.eval_reports.value import is_refused, row_values, value_range
from ml_assets.spec import PythonMetric, ValueSpec


def score(metric: str, task: str, expected: str, answer: str) -> float:
    return row_scores([metric], task)[metric](expected, answer, {})  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        ('{"a": 1, "b": [2]}', '{ "b": [2],\n "a": 1.0 }', 1.0),
        ('{"a": 1}', '{"a": true}', 0.0),
        ('{"a": 1}', '{"a": "1"}', 0.0),
        ('{"a": []}', "{}", 0.0),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', 0.0),
        ('{"a.b": 1}', '{"a": {"b": 1}}', 0.0),
        ('{"a": 1}', '{"a": 1} thanks', 0.0),
        ('{"a": 1}', "", 0.0),
        ('{"a": 1}', "[" * 100_000, 0.0),
        ('{"a": 1}', '{"a": NaN}', 0.0),
        ('{"a": 1}', '{"a": ' + "9" * 5000 + "}", 0.0),
    ],
)
def test_exact_match_of_json_compares_values(expected: str, answer: str, right: float) -> None:
    assert score("exact_match", "json", expected, answer) == right


def test_other_scores() -> None:
    assert score("exact_match", "text", "a  b\n", " a b") == 1.0
    assert score("exact_match", "text", "a b", "A b") == 0.0
    assert score("accuracy", "classification", "Sport", ' "sport". ') == 1.0
    assert score("accuracy", "classification", "yes", '"Yes."') == 1.0
    assert score("accuracy", "classification", "caf\u00e9", "cafe\u0301") == 1.0
    assert score("accuracy", "classification", "C", "C++") == 0.0
    assert score("json_valid", "json", "{}", "[1]") == 1.0
    assert score("json_valid", "json", "{}", "{'a': 1}") == 0.0
    wanted = '{"intent": "on", "slots": {"area": "hall", "level": 3}}'
    assert score("json_field_f1", "json", wanted, wanted) == 1.0
    two_of_three = '{"intent": "on", "slots": {"area": "hall", "level": 4}}'
    assert score("json_field_f1", "json", wanted, two_of_three) == pytest.approx(2 / 3)
    assert score("json_field_f1", "json", wanted, "no") == 0.0
    with pytest.raises(MetricError, match="expected answer is not JSON"):
        score("json_field_f1", "json", "no", "{}")


@pytest.mark.parametrize("metric", ["chrf", "rouge_l"])
def test_text_overlap_works_in_every_script(metric: str) -> None:
    for text in (
        "the vote is held next week",
        "голосование на следующей неделе",
        "来週投票が行われます",
        "đặt câu hỏi",
    ):
        assert score(metric, "text", text, text) == pytest.approx(1.0)
        assert score(metric, "text", text, "") == 0.0
    assert score(metric, "text", "", "") == 1.0
    assert score(metric, "text", "वह पढ़ता है", "वह पढ़ती है") < 1.0, "vowels are marks there"
    half = score(metric, "text", "the vote is held next week", "the vote was held last year")
    assert 0.2 < half < 0.8


@given(st.data())
def test_macro_f1_is_that_of_scikit_learn(data: st.DataObject) -> None:
    labels = st.sampled_from(["a", "b", "c"])
    expected = data.draw(st.lists(labels, min_size=1, max_size=30))
    answers = data.draw(st.lists(labels | st.just("junk"), min_size=len(expected), max_size=len(expected)))
    known = sorted(set(expected))
    ours = macro_f1(expected, answers)[0]
    assert ours == pytest.approx(f1_score(expected, answers, labels=known, average="macro", zero_division=0))
    doubled = macro_f1(expected, answers, np.full((2, len(expected)), 2.0))
    assert doubled == pytest.approx([ours, ours])


def shout(expected: str, answer: str, row: dict[str, str]) -> float:
    return float(answer == expected.upper() + row["mark"])


def crooked(expected: str, answer: str, row: dict[str, str]) -> object:
    return {"nan": float("nan"), "text": "1", "big": 1.1, "yes": True}[answer]


def test_python_metric() -> None:
    name = f"{__name__}:shout"
    scorers = row_scores([PythonMetric(callable=name)], "text")
    assert scorers[name]("hi", "HI!", {"mark": "!"}) == 1.0
    assert right_from(name) == 0.5
    bad = f"{__name__}:crooked"
    check = row_scores([PythonMetric(callable=bad)], "text")[bad]
    assert check("", "yes", {}) == 1.0
    for answer in ("nan", "text", "big"):
        with pytest.raises(MetricError, match="crooked: expected a number from 0 to 1"):
            check("", answer, {})
    with pytest.raises(MetricError, match="expected an importable"):
        row_scores([PythonMetric(callable=f"{__name__}:absent")], "text")


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
    )
)
def test_json_equals_itself_however_it_is_written(value: object) -> None:
    text, spaced = json.dumps(value), json.dumps(value, indent=2, ensure_ascii=False)
    assert score("exact_match", "json", text, spaced) == 1.0
    assert score("json_field_f1", "json", text, spaced) == 1.0


def test_value_is_what_an_answer_is_worth_minus_its_tokens() -> None:
    spec = ValueSpec(right=2, wrong=-5, refused=-0.5, per_1000_tokens=10, refusal="(?i)cannot")
    assert is_refused("I CANNOT say", spec) and not is_refused("yes", spec)
    tokens = {"prompt_tokens": 60, "answer_tokens": 40}
    rows = [
        {"right": True, "refused": False, **tokens},
        {"right": False, "refused": False, **tokens},
        {"right": False, "refused": True, **tokens},
        {"right": True, "refused": True, **tokens},
    ]
    assert row_values(rows, spec) == pytest.approx([1, -6, -1.5, 1])
    assert value_range(rows, spec) == pytest.approx((-6, 1))
