"""The gate blocks what is bad, lets pass what is good, and says why."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_bad import BAD, BASE_SKILL, Bad, Row, champion, good, lines, make_rows, skilled

from ml_assets.eval_reports.gate import Decision, better_arm, decide
from ml_assets.spec import EvaluationSpec


def specification(**changes: object) -> EvaluationSpec:
    value = {"refusal": "can't", **changes.pop("value", {})}  # type: ignore[dict-item]
    return EvaluationSpec.model_validate(
        {"task": "json", "segments": ["language"], "max_rows": None, "value": value, **changes}
    )


def judge(bad: Bad, seed: int) -> Decision:
    evaluation = specification(**bad.evaluation)
    rows = make_rows(bad.rows, seed)
    candidate = lines("adapter", bad.model, rows, evaluation, seed)
    if bad.against == "champion":
        reference = lines("champion", champion, rows, evaluation, seed)
    else:
        reference = lines("few_shot", skilled(BASE_SKILL.get(bad.name, 0.4)), rows, evaluation, seed)
    if bad.must_pass_model:
        extra = make_rows(5, 10_000 + seed)
        candidate += lines("adapter", good, extra[1:], evaluation, 1, must_pass=4)
        candidate += lines("adapter", bad.must_pass_model, extra[:1], evaluation, 1, must_pass=1)
    return decide(
        candidate,
        reference,
        evaluation,
        against=bad.against,  # type: ignore[arg-type]
        forgetting=bad.forgetting,
    )


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_known_bad_adapters_are_blocked(bad: Bad) -> None:
    for seed in range(3):
        decision = judge(bad, seed)
        assert decision.verdict != "promote", decision.reasons
        assert any(bad.because in reason for reason in decision.reasons), decision.reasons
        if bad.because != "not shown to be better":
            assert decision.verdict == "reject", decision.reasons


@pytest.mark.parametrize("seed", range(5))
def test_good_adapters_pass(seed: int) -> None:
    """The gate is not a wall: a better adapter is promoted against a champion and against a base."""
    evaluation = specification()
    rows = make_rows(600, seed)
    candidate = lines("adapter", good, rows, evaluation, seed)
    against_champion = decide(
        candidate, lines("champion", champion, rows, evaluation, seed), evaluation, against="champion"
    )
    assert (against_champion.verdict, against_champion.needs_rows) == ("promote", None)
    against_base = decide(
        candidate, lines("zero_shot", skilled(0.3), rows, evaluation, seed), evaluation, against="base"
    )
    assert (against_base.verdict, against_base.claim) == ("promote", "better")


@pytest.mark.slow
def test_a_segment_that_dies_behind_a_better_mean_is_caught() -> None:
    """20 points lost in a segment of 60 of 1,200 rows, gains elsewhere: caught in 95 % of the evaluations."""
    evaluation = specification()
    generator = np.random.default_rng(5)
    caught = 0
    for _ in range(40):
        rows = [row | {"language": "fr" if i < 60 else "en"} for i, row in enumerate(make_rows(1200, 77))]
        lost = {row["_row"] for row in rows[:60] if generator.random() < 0.2}

        def model(row: Row, rng: random.Random, lost: set[str] = lost) -> str:
            return "{}" if row["_row"] in lost else skilled(0.99)(row, rng)

        decision = decide(
            lines("adapter", model, rows, evaluation, 0),
            lines("champion", skilled(0.97), rows, evaluation, 0),
            evaluation,
            against="champion",
        )
        caught += decision.verdict != "promote" and any("language=fr" in r for r in decision.reasons)
    assert caught / 40 >= 0.95


@pytest.mark.slow
def test_undecided_says_how_many_rows_and_they_suffice() -> None:
    """The rows asked for give the power: planned from a small evaluation, kept on a new one of that size."""
    evaluation = specification(gate={"margin": 0.04, "max_negative_flips": 1.0}, segments=[])
    equal = skilled(0.85, shake=0.1)
    asked, promoted = [], 0
    for seed in range(16):
        rows = make_rows(100, seed)
        decision = decide(
            lines("adapter", equal, rows, evaluation, seed),
            lines("champion", equal, rows, evaluation, seed),
            evaluation,
            against="champion",
        )
        if decision.verdict == "undecided":
            assert decision.needs_rows and decision.more_rows == decision.needs_rows - 100
            assert str(decision.needs_rows) in decision.reasons[0]
            asked.append(decision.needs_rows)
    assert len(asked) >= 4
    needs = int(np.median(asked))
    for seed in range(100, 160):
        rows = make_rows(needs, seed)
        promoted += (
            decide(
                lines("adapter", equal, rows, evaluation, seed),
                lines("champion", equal, rows, evaluation, seed),
                evaluation,
                against="champion",
            ).verdict
            == "promote"
        )
    assert 0.8 * 0.85 <= promoted / 60 <= 1.0


def test_same_rows_only_and_both_ways_reported() -> None:
    evaluation = specification()
    rows = make_rows(400, 1)
    decision = decide(
        lines("adapter", good, rows[:350], evaluation, 1),
        lines("champion", champion, rows[50:], evaluation, 1),
        evaluation,
        against="champion",
    )
    assert decision.common_rows == 300
    assert decision.left_out == {"candidate": 50, "reference": 50}
    nothing = decide(
        lines("adapter", good, rows[:50], evaluation, 1),
        lines("champion", champion, rows[50:], evaluation, 1),
        evaluation,
        against="champion",
    )
    assert (nothing.verdict, nothing.difference) == ("undecided", None)


def test_labels_of_the_champion_cap_the_claim() -> None:
    evaluation = specification()
    rows = make_rows(800, 2)
    arms = (
        lines("adapter", skilled(0.99), rows, evaluation, 2),
        lines("champion", skilled(0.8), rows, evaluation, 2),
    )
    free = decide(*arms, evaluation, against="champion")
    capped = decide(*arms, evaluation, against="champion", labels_from_champion=True)
    assert (free.claim, capped.claim) == ("better", "as good as")
    assert capped.verdict == "promote"
    assert any("champion" in note for note in capped.notes)


def test_identical_rows_promote_only_when_there_are_enough() -> None:
    evaluation = specification(segments=[])
    for count, verdict in ((10, "undecided"), (100, "undecided"), (200, "promote")):
        rows = make_rows(count, 3)
        decision = decide(
            lines("adapter", champion, rows, evaluation, 3),
            [{**line, "arm": "champion"} for line in lines("adapter", champion, rows, evaluation, 3)],
            evaluation,
            against="champion",
        )
        assert decision.verdict == verdict, decision.reasons


def test_small_segments_are_reported_not_judged() -> None:
    evaluation = specification()
    rows = [row | {"language": "fr" if i < 8 else "en"} for i, row in enumerate(make_rows(600, 4))]
    decision = decide(
        lines("adapter", good, rows, evaluation, 4),
        lines("champion", champion, rows, evaluation, 4),
        evaluation,
        against="champion",
    )
    assert decision.verdict == "promote"
    assert any("language=fr" in note and "8 rows" in note for note in decision.notes)


def test_a_budget_of_zero_flips_allows_none() -> None:
    evaluation = specification(gate={"max_negative_flips": 0.0})
    rows = make_rows(600, 4)
    reference = lines("champion", champion, rows, evaluation, 4)
    same = [{**line, "arm": "adapter"} for line in reference]
    assert decide(same, reference, evaluation, against="champion").verdict == "promote"
    first = next(i for i, line in enumerate(same) if line["right"])
    same[first] = {**same[first], "right": False, "scores": {**same[first]["scores"], "exact_match": 0.0}}
    assert decide(same, reference, evaluation, against="champion").verdict == "reject"


def test_graded_metric_decides_by_bootstrap_and_is_stable() -> None:
    evaluation = specification(metrics=["json_field_f1"], segments=[])
    rows = make_rows(500, 6)
    arms = (
        lines("adapter", skilled(0.5), rows, evaluation, 6),
        lines("champion", skilled(0.8), rows, evaluation, 6),
    )
    first, second = (decide(*arms, evaluation, against="champion") for _ in range(2))
    assert first == second
    assert first.verdict == "reject"
    better = decide(arms[1], arms[0], evaluation, against="champion")
    assert better.verdict == "promote"


def test_clusters_count_as_clusters() -> None:
    """The same rows ten times over, as clusters, show no more than once."""
    evaluation = specification(segments=[], cluster="talk")
    rows = [row | {"talk": row["_row"]} for row in make_rows(60, 8)]
    many = [row | {"_row": f"{k:02d}{row['_row'][2:]}"} for row in rows for k in range(10)]

    def arms(rows: list[Row]) -> tuple[list[Row], list[Row]]:
        def copy(skill: float) -> list[Row]:
            return lines("adapter", skilled(skill, 0.0), rows, evaluation, 8)

        return copy(0.87), copy(0.84)

    once = decide(*arms(rows), evaluation, against="champion").difference
    often = decide(*arms(many), evaluation, against="champion").difference
    blind = decide(
        *[[line | {"cluster": None} for line in arm] for arm in arms(many)], evaluation, against="champion"
    ).difference
    assert once and often and blind
    assert often.effective_rows == pytest.approx(60, rel=0.05)
    assert often.lower <= once.lower + 0.01
    assert blind.lower > often.lower + 0.02


def test_bad_input_is_one_clear_error() -> None:
    evaluation = specification()
    rows = lines("adapter", good, make_rows(5, 1), evaluation, 1)
    with pytest.raises(ValueError, match="is there twice"):
        decide([*rows, rows[0]], rows, evaluation, against="champion")
    with pytest.raises(ValueError, match="chrf"):
        decide(rows, rows, specification(metrics=["chrf"]), against="champion")


def test_better_arm() -> None:
    evaluation = specification()
    rows = make_rows(50, 1)
    arms = {
        "few_shot": lines("few_shot", skilled(0.4), rows, evaluation, 1),
        "zero_shot": lines("zero_shot", skilled(0.6), rows, evaluation, 1),
    }
    assert better_arm(arms, evaluation) == "zero_shot"
    assert better_arm({"few_shot": arms["few_shot"], "zero_shot": arms["few_shot"]}, evaluation) == "few_shot"


@settings(max_examples=25, deadline=None)
@given(
    data=st.lists(
        st.tuples(st.booleans(), st.booleans(), st.sampled_from("ab"), st.booleans()), min_size=1, max_size=40
    ),
    against=st.sampled_from(["champion", "base"]),
    gain=st.sampled_from([0.0, 0.05]),
)
def test_any_rows_give_a_json_decision_that_is_not_careless(
    data: list[tuple[bool, bool, str, bool]], against: str, gain: float
) -> None:
    evaluation = specification(gate={"min_gain": gain})

    def arm(name: str, index: int) -> list[Row]:
        return [
            {
                "row": f"{i:064x}",
                "arm": name,
                "prompt": "",
                "expected": "{}",
                "answer": "",
                "scores": {"exact_match": float(entry[index])},
                "right": entry[index],
                "refused": False,
                "segments": {"language": entry[2]},
                "cluster": None,
                "must_pass": entry[3],
                "prompt_tokens": 1,
                "answer_tokens": 1,
            }
            for i, entry in enumerate(data)
        ]

    candidate, reference = arm("adapter", 0), arm("zero_shot", 1)
    decision = decide(candidate, reference, evaluation, against=against)  # type: ignore[arg-type]
    json.dumps(decision.as_json(), allow_nan=False)
    assert decision.reasons
    if any(entry[3] and not entry[0] for entry in data):
        assert decision.verdict == "reject"
    judged = [entry for entry in data if not entry[3]]
    if decision.verdict == "promote" and against == "base":
        assert sum(entry[0] for entry in judged) > sum(entry[1] for entry in judged)
    if not any(entry[0] for entry in judged):
        assert decision.verdict != "promote"


# -- several looks -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    looks=st.integers(1, 6),
    rows=st.sampled_from([60, 150, 400]),
    flips=st.sampled_from([0.03, 0.1, 0.3]),
    alpha=st.sampled_from([0.05, 0.1]),
    margin=st.sampled_from([0.02, 0.05]),
)
def test_all_looks_together_promote_a_worse_candidate_at_most_as_often_as_one_may(
    looks: int, rows: int, flips: float, alpha: float, margin: float
) -> None:
    """Exact, by enumeration: whatever the candidates have to do with each other, the chance that any of them
    is promoted is at most the sum of theirs."""
    from ml_assets.eval_reports.gate import share_alpha
    from ml_assets.eval_reports.statistics import claim_probability

    evaluation = specification(gate={"alpha": alpha, "margin": margin})
    loss = (flips + margin) / 2
    total = 0.0
    for look in range(1, looks + 1):
        shared = share_alpha(evaluation, looks, look).gate.alpha
        if loss > margin:
            total += claim_probability(rows, loss - margin, loss, -margin, shared)
    assert total <= alpha + 1e-9


@given(looks=st.integers(1, 12))
def test_the_shares_of_all_looks_are_the_whole_of_alpha(looks: int) -> None:
    from ml_assets.eval_reports.gate import share_alpha

    shares = [share_alpha(specification(), looks, look).gate.alpha for look in range(1, looks + 1)]
    assert sum(shares) == pytest.approx(specification().gate.alpha)
    assert shares == sorted(shares, reverse=True), "the cheapest candidate has the largest"


@pytest.mark.parametrize("looks,look,share", [(1, 1, 1), (2, 1, 1 / 2), (2, 2, 1 / 2), (5, 3, 1 / 8)])
def test_a_decision_says_how_many_looks_share_its_error(looks: int, look: int, share: float) -> None:
    evaluation = specification(gate={"margin": 0.05})
    rows = make_rows(400, 1)
    arms = [lines("adapter", champion, rows, evaluation, 1), lines("champion", champion, rows, evaluation, 1)]
    decision = decide(*arms, evaluation, against="champion", looks=looks, look=look)
    assert decision.looks == looks and decision.alpha == pytest.approx(0.05 * share)
    assert any(f"look {look} of {looks} at these rows" in note for note in decision.notes) == (looks > 1)
    one = decide(*arms, evaluation, against="champion")
    assert decision.difference is not None and one.difference is not None
    assert decision.difference.lower <= one.difference.lower
    assert decision.flips == one.flips and decision.value == one.value, "what only refuses keeps all of alpha"


def test_no_look_is_no_look() -> None:
    rows = lines("adapter", good, make_rows(5, 0), specification(), 0)
    with pytest.raises(ValueError, match="looks: expected at least 1, found 0"):
        decide(rows, rows, specification(), against="champion", looks=0)
    with pytest.raises(ValueError, match="look: expected one of the 2 that were planned, found number 3"):
        decide(rows, rows, specification(), against="champion", looks=2, look=3)


# -- failure memory ------------------------------------------------------------------------------------


def remembered(
    now: list[bool], before: list[bool], side: str, against: str = "champion"
) -> tuple[Decision, list[str]]:
    """A decision on many rows that do not matter, and some that failed in production; and their names."""
    evaluation = specification(gate={"margin": 0.2, "max_negative_flips": 1.0})
    rows, failed = make_rows(300, 1), make_rows(len(now), 77)

    def arm(name: str, rights: list[bool]) -> list[Row]:
        right, wrong = skilled(2.0), skilled(-1.0)
        found = lines(name, right, rows, evaluation, 1)
        for row, is_right in zip(failed, rights, strict=True):
            (line,) = lines(name, right if is_right else wrong, [row], evaluation, 1)
            found.append(line | {"failed": side, "sampled": False})
        return found

    reference = "champion" if against == "champion" else "few_shot"
    decision = decide(
        arm("adapter", now),
        arm(reference, before),
        evaluation,
        against=against,  # type: ignore[arg-type]
    )
    return decision, [row["_row"] for row in failed]


def test_what_failed_in_production_and_could_be_learned_must_be_right() -> None:
    decision, (row, *_) = remembered([False, True], [False, False], "trained")
    assert decision.verdict == "reject" and decision.must_pass["wrong"] == [row]
    assert any(reason.startswith("must-pass: 1 of 2 rows") for reason in decision.reasons)
    assert remembered([True, True], [False, False], "trained")[0].verdict == "promote"


def test_what_was_fixed_must_not_fail_again() -> None:
    for side in ("trained", "held_out"):
        decision, (row, *_) = remembered([False, True], [True, True], side)
        assert decision.verdict == "reject" and decision.must_pass["wrong"] == [row]


def test_a_failure_that_nobody_could_learn_waits() -> None:
    decision, (row, *_) = remembered([False, True], [False, False], "held_out")
    assert decision.verdict == "promote"
    assert decision.must_pass == {"rows": 0, "wrong": [], "failures": 2, "open": [row]}


def test_a_flood_of_wrong_feedback_does_not_block_every_candidate() -> None:
    decision, rows = remembered([False] * 15 + [True] * 5, [False] * 20, "trained")
    assert decision.verdict == "promote" and sorted(decision.must_pass["open"]) == sorted(rows[:15])
    assert any("15 of 20 rows that were to be learned" in note for note in decision.notes)
    # but what the champion has right by now is not given up for it
    decision, rows = remembered([False] * 20, [False] * 19 + [True], "trained")
    assert decision.verdict == "reject" and decision.must_pass["wrong"] == [rows[19]]
    # and one or two that are wrong again are the candidate's own
    assert remembered([False] * 2 + [True] * 2, [False] * 4, "trained")[0].verdict == "reject"


def test_the_first_release_is_not_held_to_what_a_prompt_gets_right() -> None:
    assert remembered([False, True], [True, True], "held_out", against="base")[0].verdict != "reject"


@pytest.mark.parametrize(("worth", "rejects"), [(1.0, False), (0.01, True)])
def test_against_a_champion_value_may_fall_by_what_the_margin_is_worth(worth: float, rejects: bool) -> None:
    """The same answers in more words: 30 money per 1,000 requests more, where the margin of 10 points is
    worth 100, or 1."""
    value = {"right": worth, "wrong": 0.0, "per_1000_tokens": 1.0}
    evaluation = specification(value=value, gate={"margin": 0.1})
    old = lines("champion", champion, make_rows(200, 1), evaluation, 1)
    new = [{**row, "arm": "adapter", "answer_tokens": row["answer_tokens"] + 30} for row in old]
    decision = decide(new, old, evaluation, against="champion")
    assert decision.value is not None and decision.value.upper < 0
    assert any("value" in reason for reason in decision.reasons) == rejects
    assert decision.verdict == ("reject" if rejects else "promote")
    base = [{**row, "arm": "few_shot"} for row in old]
    assert decide(new, base, evaluation, against="base").verdict == "reject", "a base gets no margin"
