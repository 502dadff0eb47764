"""What is fed in pieces, restarted, or is no sensible request at all."""

import codecs
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from drift_world import World, numbered, specification
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ml_assets.artifacts import sha256_bytes
from ml_assets.datasets.snapshot import load_rows
from ml_assets.decisions.diagnosis import Evidence, Policy, decide, diagnose
from ml_assets.drift_reports.detectors import exactly
from ml_assets.drift_reports.embeddings import embed_all, hashing
from ml_assets.drift_reports.findings import DriftFindings, Look, Signal
from ml_assets.drift_reports.observe import LabelRule, answered, observe
from ml_assets.drift_reports.pictures import mix
from ml_assets.drift_reports.reference import (
    Models,
    Reference,
    as_asked,
    find_reference,
    input_arrays,
    word_counts,
)
from ml_assets.drift_reports.report import headline
from ml_assets.drift_reports.signals import failed, outcome_of, signals_of
from ml_assets.drift_reports.watch import Watch
from ml_assets.traffic.records import OPERATOR, FeedbackRecord, Judged, TrafficRecord

ALARM = Signal("outcome_estimated", "outcome", True, "error", 1.0, 900.0, 365.0, "a signal")


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


def test_quiet_long_documents_are_no_alarm() -> None:
    w = World(Path(mkdtemp()), ending=" lorem ipsum dolor" * 1200)
    known = find_reference(w.spec, w.store, w.champion, Models(w.spec, w.store, w.home, w.champion))
    watch = Watch(w.spec, known, 365.0)
    add(watch, numbered(w.quiet(60)))
    assert all(r.malformed for r in watch.progress.recent) and known.arrays["malformed"].all()
    assert not any(d.alarm for d in watch.detectors.values())


def test_a_shift_is_found_behind_a_long_instruction() -> None:
    instruction = "You are given a question. Follow the rules below. " * 40
    prompt = {"user": instruction + "{text}", "target": "{colour}"}
    w = World(Path(mkdtemp()), specification(prompt=prompt))
    known = find_reference(w.spec, w.store, w.champion, Models(w.spec, w.store, w.home, w.champion))
    assert (known.arrays["held"] == reference().arrays["held"]).all(), "as without the instruction"
    watch = Watch(w.spec, known, 365.0)
    asked = [*w.quiet(200), *(replace(r, messages=[said(rot13(r))]) for r in w.quiet(200, 200))]
    add(watch, numbered([replace(r, messages=[said(instruction + text_of(r))]) for r in asked]))
    assert (watch.detectors["inputs_classifier"].alarmed_at or 0) > 200
    assert (watch.detectors["inputs_mmd"].alarmed_at or 0) > 200


def text_of(record: TrafficRecord) -> str:
    return record.messages[0]["content"]


def rot13(record: TrafficRecord) -> str:
    return codecs.encode(text_of(record), "rot13")


def said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@lru_cache
def commands() -> list[str]:
    """Texts of a household, the most frequent first: short ones, with a long tail."""
    verbs = ["turn on", "turn off", "dim", "open", "close", "start", "stop"]
    things = ["light", "lamp", "door", "blind", "heater", "fan", "radio", "oven"]
    rooms = ["kitchen", "hall", "bath", "office", "garage", "attic"]
    short = [f"{verb} the {thing}" for verb in verbs for thing in things]
    return short + [
        f"{text} in the {room} at {n} please" for n in range(20) for room in rooms for text in short
    ]


@lru_cache
def known_commands(exponent: float, seed: int) -> tuple[Reference, list[str]]:
    """The reference of a source that was asked 6,000 times, and what is asked after that."""
    texts = commands()
    weights = np.arange(1, len(texts) + 1) ** -exponent
    drawn = np.random.default_rng(seed).choice(len(texts), 9000, p=weights / weights.sum())
    counts = np.bincount(drawn[:6000], minlength=len(texts))
    rows = sorted((sha256_bytes(texts[i].encode()), i) for i in np.flatnonzero(counts))
    ordered = [texts[i] for _, i in rows]
    asked = [ordered[number] for number in as_asked(ordered, [int(counts[i]) for _, i in rows])]
    about = reference().about | {"words": word_counts(asked)}
    arrays = input_arrays(embed_all(embed(), asked), asked, [0] * len(asked))
    others = {name: v for name, v in reference().arrays.items() if name in ("label", "length", "malformed")}
    others |= {name: reference().arrays[name] for name in ("refused", "wrong", "confidence")}
    return Reference(reference().ref, about, others | arrays), [texts[i] for i in drawn[6000:]]


@pytest.mark.parametrize(("exponent", "seed"), [(0.8, 0), (1.0, 1), (1.2, 2), (1.2, 3)])
def test_popular_texts_are_no_change(exponent: float, seed: int) -> None:
    known, asked = known_commands(exponent, seed)
    w, watch = world(), Watch(world().spec, known, 365.0)
    add(watch, numbered([w.record(i, text, "red") for i, text in enumerate(asked)]))
    found = {name: d.alarmed_at for name, d in watch.detectors.items() if name.startswith("inputs")}
    assert found == {"inputs_classifier": None, "inputs_mmd": None}


def test_a_shift_among_popular_texts_is_found_however_one_looks() -> None:
    known, asked = known_commands(1.0, 1)
    w = world()
    moved = [r.messages[0]["content"] for r in w.moved(600, 0)]
    texts = [*asked[:600], *(moved[i] if i % 10 < 3 else asked[600 + i] for i in range(600))]
    records = numbered([w.record(i, text, "red") for i, text in enumerate(texts)])
    watch = Watch(w.spec, known, 365.0)
    add(watch, records)
    assert 600 < (watch.detectors["inputs_classifier"].alarmed_at or 0) <= 1000
    pieces = Watch(w.spec, known, 365.0)
    for start in range(0, len(records), 130):
        add(pieces, records[start : start + 130])
        saved, pieces = pieces.save(), Watch(w.spec, known, 365.0)
        pieces.load(saved)
    assert pieces.save() == watch.save()


@pytest.mark.parametrize("rows", [7, 20, 61])
def test_equal_rows_have_equal_scores_in_any_company(rows: int) -> None:
    random = np.random.default_rng(0)
    one = random.standard_normal(37).astype(np.float32)
    directions = random.standard_normal((rows, 37)).astype(np.float32)
    company = random.standard_normal((rows, 37)).astype(np.float32)
    company[::3] = one
    scores = exactly(company, directions)
    alone = np.stack([exactly(one[None], d[None])[0, 0] for d in directions])
    assert (scores[:, ::3] == alone[:, None]).all()


def test_a_reference_without_counts_has_its_rows_once_and_by_hash() -> None:
    known = reference()
    w = world()
    rows = sorted(
        [*load_rows(w.store.open(w.dataset), "train"), *load_rows(w.store.open(w.dataset), "evaluation")],
        key=lambda row: row["_row"],
    )
    texts = [row["text"] for row in rows]
    assert known.about["rows"] == len(texts)
    held = input_arrays(embed_all(embed(), texts), texts, [0] * len(texts))["held"]
    assert (known.arrays["held"] == held).all()


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


def labels(keys: str, wrong: str = "") -> list[Judged]:
    """Right answers in this order, one letter for each key; those of the keys in `wrong` contradict the
    answer."""
    w = world()
    records = numbered([w.record(i, f"question {i}", "red") for i in range(len(keys))])
    return [
        Judged(
            r,
            FeedbackRecord(r.id, r.at, r.customization, key, None, "blue" if key in wrong else "red", r.seq),
        )
        for key, r in zip(keys, records, strict=True)
    ]


HONEST = "abcdefghijklmnopqrstuvwxyz" * 20


def told(feedback: Sequence[Judged]) -> Watch:
    watch = Watch(world().spec, reference(), 365.0)
    watch.judge(feedback)
    return watch


def loss_of(watch: Watch) -> float:
    loss = outcome_of(watch).loss
    assert loss is not None
    return loss


def test_one_key_among_others_makes_no_failed_look() -> None:
    keys = "".join(f"{one}{two}E" for one, two in zip(HONEST[:200:2], HONEST[1:200:2], strict=True))
    watch = told(labels(keys, wrong="E"))
    outcome = outcome_of(watch)
    assert outcome.labelled == 300 and outcome.measured_on == 222
    signals = signals_of(watch, outcome)
    assert not failed(signals, outcome, 0.02)
    everyone = Watch(specification(feedback={"max_share_per_key": 1}), reference(), 365.0)
    everyone.judge(labels(keys, wrong="E"))
    outcome = outcome_of(everyone)
    assert outcome.measured_on == 300 and failed(signals_of(everyone, outcome), outcome, 0.02)


def test_a_flood_of_one_key_hides_no_loss() -> None:
    watch = told(labels(HONEST[:200] + "E" * 2000, wrong=HONEST))
    assert loss_of(watch) > 0.8
    assert sum(label.key == "E" for label in watch.progress.labels) == 22


def test_the_only_application_is_measured_and_another_does_not_stop_it() -> None:
    assert loss_of(told(labels("A" * 60, wrong="A"))) > 0.9
    watch = told(labels("A" * 300 + "B" * 30 + "C" * 600, wrong="C"))
    assert watch.progress.labels_counted > 350, "C counts beside A and B, and goes on"
    assert [label.given for label in watch.progress.labels if label.key == "C"][-1] > 700
    five = told(labels("ABCDF" * 400))
    newest = [label.given for label in five.progress.labels]
    assert len(newest) >= 50 and max(newest) > 1600


def test_labels_of_the_operator_all_count() -> None:
    feedback = labels("O" * 200 + HONEST[:100], wrong="O")
    feedback = [
        Judged(j.request, replace(j.feedback, key_id=OPERATOR)) if j.feedback.key_id == "O" else j
        for j in feedback
    ]
    outcome = outcome_of(told([*feedback[200:], *feedback[:200]]))
    assert (outcome.measured_on, outcome.usable) == (300, 300)


def test_usable_right_answers_respect_the_share_per_key() -> None:
    assert outcome_of(told(labels("A" * 60))).usable == 10
    assert outcome_of(told(labels("E" * 400 + HONEST[:180]))).usable == 200


def test_which_labels_count_depends_on_keys_and_order_alone() -> None:
    keys = "AB" * 30 + HONEST[:300] + "E" * 500 + "A" * 90
    whole = told(labels(keys, wrong="E"))
    other = told(labels(keys, wrong="A"))
    assert [x.id for x in other.progress.labels] == [x.id for x in whole.progress.labels]
    pieces = Watch(world().spec, reference(), 365.0)
    for start in range(0, len(keys), 70):
        pieces.judge(labels(keys, wrong="E")[start : start + 70])
        again = Watch(world().spec, reference(), 365.0)
        again.load(pieces.save())
        pieces = again
    assert pieces.save() == whole.save()


@pytest.mark.parametrize("count", [1, 19, 20, 1000])
def test_what_is_said_of_a_loss_is_of_one_kind(count: int) -> None:
    known = reference()
    wrong = known.arrays["wrong"].astype(bool)
    sure = np.where(wrong, -2.0, -0.05) + np.linspace(0, 0.01, len(wrong))
    watch = Watch(world().spec, replace(known, arrays=known.arrays | {"confidence": sure}), 365.0)
    add(watch, numbered([replace(r, mean_logprob=-2.0) for r in world().quiet(400)]))
    watch.judge(labels("A" * count, wrong="A" if count == 20 else ""))
    if count == 1000:
        watch = told([*labels("A" * 600, wrong="A"), *labels("A" * 1000)[600:]])
    outcome = outcome_of(watch)
    assert outcome.measured == (count >= 20) and outcome.loss is not None
    assert outcome.measured_on == min(count, 400)
    before = outcome.reference_accuracy
    shown = outcome.accuracy if outcome.measured else outcome.estimated_accuracy
    assert before is not None and shown is not None
    assert outcome.loss == pytest.approx(before - shown)
    signals = signals_of(watch, outcome)
    looks = [Look(n, "", True, []) for n in range(3)]
    findings = DriftFindings(
        "colours", "a", "b", "d", 1, 400, 400, 100.0, "2026-03-01", [*signals, ALARM], outcome, looks
    )
    maintenance = world().spec.maintenance
    policy = Policy(maintenance, margin=0.02, value_of_right=1.0, currency="EUR", uses_labels=True)
    text = diagnose(findings, policy).text
    assert f"Accuracy {shown:.1%}" in text and f"a loss of {outcome.loss:.3f}" in text
    assert (f"measured on {outcome.measured_on} right answers" in text) == outcome.measured
    assert ("(measured)" in headline(findings)) == outcome.measured
    effect = next(s.effect for s in signals if s.name == "outcome_feedback")
    assert effect == (outcome.loss if outcome.measured else None)
    evidence = Evidence(findings, "d", 100, 0, "2026-03-01T00:00:00+00:00")
    worth = 1000 * outcome.loss
    if outcome.measured:
        assert outcome.value_per_1000 is not None and outcome.reference_value_per_1000 is not None
        worth = max(0.0, outcome.reference_value_per_1000 - outcome.value_per_1000)
    if count < 1000:  # then nothing is lost
        assert f"waiting costs {worth * 3:.2f} EUR" in decide(evidence, policy).reason


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
