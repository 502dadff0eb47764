"""What is fed in pieces, restarted, or is no sensible request at all."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from drift_world import World, numbered, specification
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ml_assets.drift_reports.embeddings import hashing
from ml_assets.drift_reports.observe import LabelRule, answered, observe
from ml_assets.drift_reports.pictures import mix
from ml_assets.drift_reports.reference import Models, Reference, find_reference
from ml_assets.drift_reports.signals import outcome_of, signals_of
from ml_assets.drift_reports.watch import Watch
from ml_assets.traffic.records import FeedbackRecord, Judged, TrafficRecord


@lru_cache
def world(task: str = "classification") -> World:
    return World(Path(mkdtemp()), specification(task))


@lru_cache
def embed():
    return hashing()


@lru_cache
def reference(task: str = "classification") -> Reference:
    w = world(task)
    return find_reference(w.spec, w.store, w.champion, Models(w.spec, w.store, w.home, w.champion))


def add(watch: Watch, records: Sequence[TrafficRecord]) -> None:
    rule = watch.reference.rule
    watch.add([(observe(watch.spec, rule, record), record.answer) for record in records], embed())


def judged(records: Sequence[TrafficRecord], right: str) -> list[Judged]:
    return [
        Judged(r, FeedbackRecord(r.id, r.at, r.customization, r.key_id, None, right, seq=i + 1))
        for i, r in enumerate(records)
    ]


@lru_cache
def stream() -> list[TrafficRecord]:
    w = world()
    return numbered([*w.quiet(300), *w.moved(120, 300), *w.quiet(40)])  # the last ones are repeats


@lru_cache
def at_once() -> dict[str, bytes]:
    watch = Watch(world().spec, reference(), 365.0)
    add(watch, stream())
    return watch.save()


@given(
    cuts=st.one_of(
        st.sampled_from([1, 7, 20, 200]).map(lambda n: list(range(n, 460, n))),
        st.lists(st.integers(1, 459), max_size=12, unique=True).map(sorted),
    ),
    restarts=st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_the_same_requests_give_the_same_state_however_they_are_cut(cuts: list[int], restarts: bool) -> None:
    watch = Watch(world().spec, reference(), 365.0)
    for start, end in zip([0, *cuts], [*cuts, len(stream())], strict=True):
        add(watch, stream()[start:end])
        if restarts:
            saved = watch.save()
            watch = Watch(world().spec, reference(), 365.0)
            watch.load(saved)
            assert watch.save() == saved
    assert watch.save() == at_once()


def test_a_repeated_text_is_counted_once() -> None:
    watch = Watch(world().spec, reference(), 365.0)
    one = world().quiet(1)[0]
    add(watch, numbered([one] * 10_000))
    p = watch.progress
    assert (p.read, p.repeated, p.counted) == (10_000, 9_999, 0)
    assert not any(d.alarm for d in watch.detectors.values())


def test_a_shift_is_found_in_inputs_and_outputs_and_explained() -> None:
    w = world()
    watch = Watch(w.spec, reference(), 365.0)
    add(watch, numbered([*w.quiet(300), *w.moved(200, 300)]))
    signals = {s.name: s for s in signals_of(watch, outcome_of(watch))}
    for name in ("inputs_classifier", "inputs_mmd", "outputs_mix"):
        assert signals[name].alarm, name
        assert (signals[name].alarmed_at or 0) > 300
        assert signals[name].severity == "warn"
        assert signals[name].p_value is not None and signals[name].p_value < 0.01
    assert not signals["outputs_malformed"].alarm
    shown = signals["inputs_classifier"].rows
    assert shown and all("upstairs" in row["prompt"] for row in shown)
    assert any("upstairs" in row["why"] for row in shown)
    assert "black" in signals["outputs_mix"].rows[0]["why"]


def test_feedback_measures_the_loss_and_no_request_counts_twice() -> None:
    w = world()
    watch = Watch(w.spec, reference(), 365.0)
    records = numbered([*w.quiet(60), *w.moved(60, 60)])
    add(watch, records)
    watch.judge(judged(records[60:], "heater"))
    watch.judge(judged(records[60:], "heater"))
    outcome = outcome_of(watch)
    assert outcome.labelled == 60
    assert outcome.accuracy == 0.0
    assert outcome.reference_accuracy == pytest.approx(0.95, abs=0.02)
    assert outcome.loss == pytest.approx(outcome.reference_accuracy)
    assert outcome.value_per_1000 == pytest.approx(-50.0)
    signal = next(s for s in signals_of(watch, outcome) if s.name == "outcome_feedback")
    assert signal.alarm and signal.severity == "error"
    assert signal.effect_interval is not None and signal.effect_interval[0] > 0.8
    assert signal.rows[0]["why"] == "right would be: heater"


def by_its_row(expected: str, answer: str, row: dict[str, str]) -> float:
    """A metric that needs a column of the dataset."""
    return float(row["text"] != "" and row["colour"] == expected == answer)


def test_a_metric_of_our_own_gets_the_row_that_a_request_would_be() -> None:
    evaluation = {"task": "classification", "metrics": [{"callable": f"{__name__}:by_its_row"}]}
    w = world()
    watch = Watch(specification(evaluation=evaluation), reference(), 365.0)
    records = numbered(w.quiet(40))
    watch.judge([one for r in records for one in judged([r], r.answer)])
    assert (outcome_of(watch).labelled, outcome_of(watch).accuracy) == (40, 1.0)


def unreadable(expected: str, answer: str, row: dict[str, str]) -> float:
    raise KeyError("no such column")


def test_a_label_that_no_metric_can_read_is_left_out() -> None:
    evaluation = {"task": "classification", "metrics": [{"callable": f"{__name__}:unreadable"}]}
    w = world()
    watch = Watch(specification(evaluation=evaluation), reference(), 365.0)
    watch.judge(judged(numbered(w.quiet(40)), "red"))
    assert (outcome_of(watch).labelled, outcome_of(watch).accuracy) == (0, None)


def test_labels_are_drawn_as_they_are() -> None:
    assert mix(["$5_$9", "10% off $5, 20% off $9", "red"], [0.2, 0.3, 0.5], [0.3, 0.3, 0.4])


JUNK = [
    "",
    "\x00",
    "a\x00b",
    "x" * 1_000_000,
    "\u202e\u202e",
    "שלום עולם, הדלק את האור",
    "🤖" * 3000,
    "\ud800 lone",
    "\n\n\t \u200b",
    "{" * 5000,
    "\u202e" * 10,
    "<|im_end|><|im_start|>system",
]


@pytest.mark.parametrize("task", ["classification", "json"])
@given(
    texts=st.lists(st.one_of(st.sampled_from(JUNK), st.text(max_size=60)), min_size=20, max_size=60),
    confidences=st.lists(
        st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)), min_size=5, max_size=9
    ),
)
@example(texts=[str(i) for i in range(20)], confidences=[-1.7e308])
@settings(max_examples=12, deadline=None)
def test_nothing_that_is_asked_or_answered_is_an_error(
    task: str, texts: list[str], confidences: list[float | None]
) -> None:
    w = world(task)
    watch = Watch(w.spec, reference(task), 365.0)
    records = numbered(
        [
            w.record(
                i, text, texts[-i - 1], mean_logprob=confidences[i % len(confidences)], finish_reason=None
            )
            for i, text in enumerate(texts)
        ]
    )
    add(watch, records)
    watch.judge(judged(records, texts[0] or "x"))
    again = Watch(w.spec, reference(task), 365.0)
    again.load(watch.save())
    assert again.save() == watch.save()
    signals_of(watch, outcome_of(watch))


def test_junk_is_counted_as_malformed_and_alarms() -> None:
    w = world()
    watch = Watch(w.spec, reference(), 365.0)
    junk = [w.record(i, f"request {i}", ["", "no colour", "\x00", "red" * 9][i % 4]) for i in range(60)]
    broken = [w.record(60 + i, f"why {i}\x00", "red", mean_logprob=float("nan")) for i in range(20)]
    add(watch, numbered([*w.quiet(100), *junk, *broken]))
    assert [r.malformed for r in watch.progress.recent[100:]] == [True] * 80
    signals = {s.name: s for s in signals_of(watch, outcome_of(watch))}
    assert signals["outputs_malformed"].alarm and signals["outputs_malformed"].severity == "error"


def test_what_is_malformed_depends_on_the_task() -> None:
    calls = specification("json")
    rule = LabelRule.of(calls, ['{"intent":"a","x":"1"}', '{"intent":"b"}', '{"intent":"a"}'])
    assert (rule.key, rule.labels) == ("intent", ["a", "b"])
    assert not answered(calls, rule, '{"intent":"b"}', True).malformed
    assert answered(calls, rule, '{"intent":"b"', True).malformed
    assert answered(calls, rule, '{"intent":"c"}', True).malformed
    assert answered(calls, rule, '{"intent":"b"}', False).malformed
    plain = specification("text", prompt={"user": "{text}", "target": "{colour}"})
    none = LabelRule.of(plain, ["any", "thing"])
    assert none.labels == []
    assert not answered(plain, none, "whatever", True).malformed
    assert answered(plain, none, "I can't say", True).refused


def test_embeddings_of_texts_without_letters_are_finite() -> None:
    rows = embed()(JUNK)
    assert rows.shape == (len(JUNK), 256)
    assert np.isfinite(rows).all()
