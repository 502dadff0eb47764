"""Decisions as an operator would make them, and rules that hold for all evidence."""

import dataclasses
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from maintenance_world import (
    ADAPTER,
    NOW,
    looks,
    make_evidence,
    make_findings,
    make_policy,
    signal,
)

from ml_assets.decisions.diagnosis import LADDER, Past, again, decide, diagnose, escalated, paid, predict
from ml_assets.decisions.records import MAX_ATTEMPTS, TRAINING, Cost, Limits, Spent

QUIET = signal(alarm=False)
MOVED = signal("inputs_mmd", severity="warn")


def ago(**delta: float) -> str:
    return (datetime.fromisoformat(NOW) - timedelta(**delta)).isoformat(timespec="microseconds")


def past(action: str, state: str = "succeeded", **changes) -> Past:
    fields = {"action": action, "state": state, "adapter_digest": ADAPTER, "at": ago(days=3)}
    return Past(**(fields | {"ended_at": ago(days=3)} | changes))


def why_not(decision, action: str) -> str:
    (found,) = [one.reason for one in decision.rejected if one.action == action]
    return found


# -- what is chosen ------------------------------------------------------------------------------------


def test_quiet_traffic_is_watched() -> None:
    decision = decide(make_evidence(make_findings(signals=[QUIET])), make_policy())
    assert (decision.action, decision.status) == ("watch", "no_action")
    assert decision.reason == "nothing is wrong"
    assert {one.action for one in decision.rejected} == set(LADDER) - {"watch"}


def test_moved_inputs_without_harm_are_watched() -> None:
    findings = make_findings(loss=0.0, labelled=5, signals=[QUIET, MOVED])
    decision = decide(make_evidence(findings), make_policy())
    assert decision.action == "watch"
    assert "inputs_mmd" in decision.diagnosis and "no harm" in decision.reason


def test_moved_inputs_with_labels_extend_the_dataset_once() -> None:
    findings = make_findings(loss=0.0, labelled=40, signals=[QUIET, MOVED])
    assert decide(make_evidence(findings), make_policy()).action == "extend_dataset"
    done = (past("extend_dataset", labelled=40),)
    assert decide(make_evidence(findings, past=done), make_policy()).action == "watch"
    assert decide(make_evidence(findings), dataclasses.replace(make_policy(), uses_labels=False)).action == (
        "watch"
    )


def test_a_loss_with_labels_is_repaired_by_an_incremental_update() -> None:
    decision = decide(make_evidence(), make_policy())
    assert (decision.action, decision.status) == ("incremental_update", "to_do")
    assert decision.device_seconds == 30.0
    assert decision.gain == pytest.approx(0.15 * 100 * 30)
    assert "not needed" in why_not(decision, "full_retrain")
    assert why_not(decision, "watch").startswith("the loss is confirmed, and waiting costs 450.00 EUR")


def test_moved_inputs_with_a_loss_are_repaired() -> None:
    """No signal of the outcome is in alarm, but the look failed: what moved came with a loss."""
    assert decide(make_evidence(make_findings(signals=[MOVED])), make_policy()).action == (
        "incremental_update"
    )


def test_in_a_fleet_the_evidence_must_stand_out() -> None:
    evidence = make_evidence(fleet_size=1000, stands_out=False)
    decision = decide(evidence, make_policy())
    assert decision.action == "watch" and "stand out among 1000" in decision.diagnosis
    assert decide(dataclasses.replace(evidence, stands_out=True), make_policy()).action != "watch"


def test_malformed_answers_are_harm_although_labels_do_not_show_it() -> None:
    malformed = dataclasses.replace(signal("outputs_malformed"), group="outputs")
    decision = decide(make_evidence(make_findings(loss=0.0, signals=[malformed])), make_policy())
    assert decision.action == "ask_for_labels" and "the answers themselves are worse" in decision.diagnosis


def test_a_loss_that_the_gate_accepts_is_not_repaired() -> None:
    decision = decide(make_evidence(make_findings(loss=0.01, labelled=5)), make_policy())
    assert decision.action == "watch" and "within the 0.02" in decision.diagnosis


def test_a_loss_without_labels_asks_for_them_once() -> None:
    findings = make_findings(labelled=4)
    decision = decide(make_evidence(findings), make_policy(ask_for_labels=30))
    assert decision.action == "ask_for_labels" and decision.seen["asked"] == 30
    assert why_not(decision, "incremental_update") == "4 new labelled rows, 20 are needed"
    asked = (past("ask_for_labels", at=ago(days=1), asked=30, labelled=4),)
    waiting = decide(make_evidence(findings, past=asked), make_policy())
    assert waiting.action == "watch" and "nothing can repair it now" in waiting.reason
    assert "30 were asked for" in why_not(waiting, "ask_for_labels")
    long_ago = (past("ask_for_labels", at=ago(days=8), asked=30, labelled=4),)
    assert decide(make_evidence(findings, past=long_ago), make_policy()).action == "ask_for_labels"


def test_an_alarm_without_known_loss_asks_for_labels() -> None:
    decision = decide(make_evidence(make_findings(loss=None, labelled=0)), make_policy())
    assert decision.action == "ask_for_labels"


def test_too_many_generations_are_followed_by_a_retrain() -> None:
    decision = decide(make_evidence(generation=5), make_policy(full_after=5))
    assert decision.action == "full_retrain"
    assert "5 incremental updates in a row" in why_not(decision, "incremental_update")


def test_a_rejected_incremental_candidate_is_followed_by_a_retrain() -> None:
    tried = (past("incremental_update", verdict="reject", labelled=60),)
    assert decide(make_evidence(past=tried), make_policy()).action == "full_retrain"
    tried = (past("full_retrain", verdict="reject", labelled=60), *tried)
    decision = decide(make_evidence(past=tried), make_policy())
    assert decision.action == "ask_for_labels", "neither convinced the gate: only labels can help"
    more = make_evidence(make_findings(labelled=90), past=tried)
    assert decide(more, make_policy()).action == "full_retrain"


def test_what_the_gate_could_not_decide_needs_rows_and_not_another_candidate() -> None:
    tried = (past("incremental_update", verdict="undecided", labelled=60),)
    assert decide(make_evidence(past=tried), make_policy()).action == "ask_for_labels"


def test_a_candidate_against_an_earlier_champion_says_nothing_about_this_one() -> None:
    tried = (past("incremental_update", verdict="reject", labelled=60, adapter_digest="e" * 64),)
    assert decide(make_evidence(past=tried), make_policy()).action == "incremental_update"


def test_the_cooldown_grows_with_failures() -> None:
    def at(hours: float, *states: str):
        ended = ago(hours=hours)
        before = tuple(past("incremental_update", state, ended_at=ended) for state in states)
        return decide(make_evidence(past=before), make_policy(cooldown="6h"))

    assert at(5, "succeeded").action == "watch" and "cooldown" in at(5, "succeeded").reason
    assert at(7, "succeeded").action == "incremental_update"
    assert at(7, "failed").action == "watch", "12 hours after one failure"
    assert at(13, "failed", "succeeded").action == "incremental_update"
    assert at(40, "gave_up", "failed", "failed").action == "watch", "48 hours after three"


def test_what_failed_for_good_waits_for_more_labels() -> None:
    failed = (past("incremental_update", "gave_up", labelled=60, ended_at=ago(days=5)),)
    assert decide(make_evidence(past=failed), make_policy()).action == "full_retrain"
    both = (past("full_retrain", "gave_up", labelled=60, ended_at=ago(days=6)), *failed)
    assert decide(make_evidence(past=both), make_policy()).action == "ask_for_labels"
    moved = make_findings(loss=0.0, labelled=40, signals=[QUIET, MOVED])
    built = (past("extend_dataset", "gave_up", labelled=30),)
    decision = decide(make_evidence(moved, past=built), make_policy())
    assert decision.action == "watch" and "failed for good" in why_not(decision, "extend_dataset")


def test_one_action_at_a_time() -> None:
    decision = decide(make_evidence(past=(past("refresh_source", "open"),)), make_policy())
    assert decision.action == "watch" and "refresh_source" in decision.reason


def test_people_who_were_asked_hold_nothing_up() -> None:
    """Also where the request failed before its file was written: nothing closes such a decision."""
    asked = (past("ask_for_labels", "open"),)
    assert decide(make_evidence(past=asked), make_policy()).action == "incremental_update"
    few = make_evidence(make_findings(labelled=3), past=asked)
    assert decide(few, make_policy()).action == "ask_for_labels"


def test_a_report_about_another_adapter_than_serves_moves_nothing() -> None:
    assert decide(make_evidence(serving="f" * 64), make_policy()).action == "watch"


def test_training_that_costs_more_than_it_gains_is_not_done() -> None:
    policy = dataclasses.replace(make_policy(requests_per_month=10), price=1.0)
    decision = decide(make_evidence(), policy)
    assert decision.action == "ask_for_labels"
    assert "it costs more than it gains" in why_not(decision, "incremental_update")


@pytest.mark.parametrize(
    ("maintenance", "changes", "status"),
    [
        ({"mode": "record"}, {}, "record_only"),
        ({"device_seconds_per_month": 100}, {"spent": Spent(80.0)}, "blocked_by_budget"),
        ({"device_seconds_per_month": 100}, {"spent": Spent(60.0)}, "to_do"),
        ({"device_seconds_per_month": 100}, {"spent": Spent(100.0), "predicted": {}}, "blocked_by_budget"),
        ({"device_seconds_per_month": 100}, {"spent": Spent(50.0), "predicted": {}}, "to_do"),
    ],
)
def test_would_have(maintenance: dict, changes: dict, status: str) -> None:
    decision = decide(make_evidence(**changes), make_policy(**maintenance))
    assert (decision.action, decision.status) == ("incremental_update", status)
    assert ("would have" in decision.reason) == (status != "to_do")


def test_the_fleet_has_a_budget_too() -> None:
    policy = dataclasses.replace(make_policy(), price=2.0, fleet=Limits(money=100.0))
    blocked = decide(make_evidence(fleet_spent=Spent(25.0, 50.0)), policy)
    assert blocked.status == "blocked_by_budget" and "of the fleet" in blocked.reason
    assert decide(make_evidence(fleet_spent=Spent(10.0, 20.0)), policy).status == "to_do"


# -- what follows --------------------------------------------------------------------------------------


def test_escalation_stays_on_the_evidence_and_within_the_budget() -> None:
    first = decide(make_evidence(), make_policy())
    policy = make_policy(device_seconds_per_month=100)
    why = "the gate rejected its candidate"
    follows = escalated(first, why, 90.0, policy, Spent(5.0), Spent(5.0))
    assert follows is not None
    assert (follows.action, follows.status, follows.attempt) == ("full_retrain", "to_do", 2)
    assert follows.evidence == first.evidence and follows.id != first.id
    assert why in follows.reason and why_not(follows, "incremental_update") == why
    blocked = escalated(first, why, 90.0, policy, Spent(30.0), Spent(30.0))
    assert blocked is not None and blocked.status == "blocked_by_budget"
    assert escalated(follows, why, 90.0, policy, Spent(), Spent()) is None


def test_attempts_end() -> None:
    decision = decide(make_evidence(), make_policy())
    seen = {decision.id}
    for number in range(2, MAX_ATTEMPTS + 1):
        decision = again(decision, "run x")
        assert decision is not None and decision.attempt == number
        seen.add(decision.id)
    assert again(decision, "run x") is None and len(seen) == MAX_ATTEMPTS


def test_predictions_scale_with_rows() -> None:
    def cost(kind: str, seconds: float, rows: int) -> Cost:
        return Cost("home", kind, "p", f"{kind}{seconds}", seconds, rows)  # type: ignore[arg-type]

    costs = [cost("training", 40.0, 400), cost("evaluation", 12.0, 100), cost("training", 44.0, 400)]
    found = predict(costs, train_rows=800, new_rows=50, replay=0.1)
    assert found["full_retrain"] == pytest.approx(0.105 * 850 + 12.0)
    assert found["incremental_update"] == pytest.approx(0.105 * (50 + 80) + 12.0)
    assert predict([], 800, 50, 0.1) == dict.fromkeys(found)


def test_what_others_are_paid_counts_for_gain_and_budget() -> None:
    costs = [
        Cost("home", "training", "p", "r", 100.0, 400, money=40.0),
        Cost("home", "evaluation", "p", "r", 10.0, 100, money=30.0),
        Cost("home", "incremental", "p", "r", 20.0, 100, money=2.0),
    ]
    free = predict(costs, 400, 0, 0.0, paid(0.0))
    assert free["full_retrain"] == pytest.approx(70.0)
    priced = predict(costs, 400, 0, 0.0, paid(0.1))
    assert priced["full_retrain"] == pytest.approx(30.0 + 29.0), "the device's own price is no payment"
    evidence = make_evidence(paid={"incremental_update": 70.0, "full_retrain": 90.0})
    policy = make_policy(money_per_month=50.0)
    decision = decide(evidence, policy)
    assert (decision.status, decision.cost) == ("blocked_by_budget", 70.0)
    assert decision.gain == pytest.approx(450.0 - 70.0)
    assert decide(evidence, make_policy(money_per_month=71.0)).status == "to_do"
    follows = escalated(decision, "rejected", 120.0, policy, Spent(), Spent(), paid=90.0)
    assert follows is not None and (follows.status, follows.cost) == ("blocked_by_budget", 90.0)


def test_right_answers_that_the_dataset_would_not_take_are_no_new_rows() -> None:
    findings = make_findings(loss=0.0, labelled=60, signals=[QUIET, MOVED])
    outcome = dataclasses.replace(findings.outcome, usable=10)
    decision = decide(make_evidence(dataclasses.replace(findings, outcome=outcome)), make_policy())
    assert decision.action == "watch"
    assert why_not(decision, "extend_dataset").startswith("10 labelled rows that the dataset lacks")


# -- for all evidence ----------------------------------------------------------------------------------

states = st.sampled_from(["succeeded", "failed", "gave_up", "canceled", "open", "dropped", "record_only"])
pasts = st.lists(
    st.builds(
        past,
        action=st.sampled_from(["incremental_update", "full_retrain", "refresh_source", "ask_for_labels"]),
        state=states,
        verdict=st.sampled_from([None, "promote", "reject", "undecided"]),
        labelled=st.integers(0, 80),
        asked=st.integers(0, 50),
        ended_at=st.integers(0, 100).map(lambda hours: ago(hours=hours)),
    ),
    max_size=5,
).map(tuple)
findings_strategy = st.builds(
    make_findings,
    loss=st.one_of(st.none(), st.floats(-0.2, 0.8)),
    labelled=st.integers(0, 200),
    signals=st.lists(
        st.builds(signal, alarm=st.booleans(), severity=st.sampled_from(["warn", "error"])), max_size=3
    ),
    window=st.lists(st.booleans(), max_size=6).map(lambda flags: looks(*flags)),
    unlabelled=st.lists(st.just("chatcmpl-1"), max_size=3),
)
evidences = st.builds(
    make_evidence,
    findings_strategy,
    generation=st.integers(0, 8),
    stands_out=st.booleans(),
    past=pasts,
    predicted=st.fixed_dictionaries(
        {a: st.one_of(st.none(), st.floats(0, 500)) for a in ("incremental_update", "full_retrain")}
    ),
    spent=st.floats(0, 1000).map(lambda seconds: Spent(seconds, seconds * 0.5)),
    fleet_spent=st.floats(0, 5000).map(lambda seconds: Spent(seconds, seconds * 0.5)),
)
limits = st.one_of(st.none(), st.floats(1, 1000))


@settings(max_examples=400, deadline=None)
@given(
    evidences, st.integers(1, 4), st.integers(1, 4), limits, limits, st.sampled_from(["automatic", "record"])
)
def test_rules(evidence, first, second, own, money, mode) -> None:
    policy = dataclasses.replace(
        make_policy(
            failed_looks=min(first, second),
            of_looks=max(first, second),
            device_seconds_per_month=own,
            mode=mode,
        ),
        price=0.5,
        fleet=Limits(money=money),
    )
    decision = decide(evidence, policy)
    # every other action of the ladder was rejected, with a reason
    assert {decision.action, *(one.action for one in decision.rejected)} == set(LADDER)
    assert len(decision.rejected) == len(LADDER) - 1 and all(one.reason for one in decision.rejected)
    # the same evidence leads to the same decision
    assert decide(evidence, policy) == decision
    # at most one action is open; people who were asked hold up none
    if any(one.state == "open" and one.action != "ask_for_labels" for one in evidence.past):
        assert decision.action == "watch"
    # hysteresis
    window = evidence.findings.looks[-policy.maintenance.of_looks :]
    confirmed = bool(window) and window[-1].failed
    confirmed = confirmed and sum(look.failed for look in window) >= policy.maintenance.failed_looks
    if decision.action in (*TRAINING, "ask_for_labels"):
        assert confirmed and evidence.stands_out
    if decision.action in TRAINING:
        assert (evidence.findings.outcome.loss or 0) > policy.margin
        assert evidence.new_rows >= policy.maintenance.min_new_rows
    # the budget is never exceeded, as far as costs were predicted
    if decision.status == "to_do" and decision.action in TRAINING:
        seconds = decision.device_seconds or 0.0
        assert own is None or evidence.spent.device_seconds + seconds <= own
        assert money is None or evidence.fleet_spent.money + seconds * 0.5 <= money
    if mode == "record":
        assert decision.status in ("no_action", "record_only")


@given(findings_strategy)
def test_a_diagnosis_needs_harm_to_be_a_loss(findings) -> None:
    found = diagnose(findings, make_policy())
    errors = [one for one in findings.signals if one.alarm and one.severity == "error"]
    failed = bool(findings.looks) and findings.looks[-1].failed
    assert errors or failed or found.kind in ("quiet", "drift")
    assert any(one.alarm for one in findings.signals) or found.kind == "quiet"
