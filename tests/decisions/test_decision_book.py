"""The book: once for each evidence, one claim for each customization, budgets that hold together."""

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from maintenance_world import make_evidence, make_policy

from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.diagnosis import decide
from ml_assets.decisions.records import NO_LIMITS, Alert, Cost, Decision, Limits, Spent
from ml_assets.endpoints.ledger import Ledger, now

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    yield opened
    opened.close()


@pytest.fixture
def book(ledger: Ledger) -> DecisionBook:
    return DecisionBook(ledger)


def make(name: str = "home", **changes) -> Decision:
    return dataclasses.replace(decide(make_evidence(), make_policy()), customization=name, **changes)


def claim(book: DecisionBook, decision: Decision, own: Limits = NO_LIMITS, fleet: Limits = NO_LIMITS):
    return book.claim(decision, own, fleet, price=1.0)


def spend(book: DecisionBook, name: str, seconds: float, run: str, **changes) -> None:
    cost = Cost(name, "training", "p", run, seconds, 100, money=seconds)
    book.record_cost(dataclasses.replace(cost, **changes))


def test_the_same_evidence_is_decided_once(book: DecisionBook) -> None:
    first = book.record(make())
    assert book.record(make(action="watch", status="no_action")) == first, "the first one stays"
    assert [history.decision for history in book.latest("home", 5)] == [first]
    assert book.get(first.id).decision == first and first.at
    for change in ({"attempt": 2}, {"evidence": "x"}, {"dataset_digest": "x"}, {"policy": "x"}):
        book.record(make(**change))
    assert len(book.latest("home", 10)) == 5


def test_what_was_done_is_found_behind_any_number_of_looks(book: DecisionBook) -> None:
    book.record(make())
    for number in range(150):
        book.record(make(evidence=f"look{number}", action="watch", status="no_action"))
    assert [h.decision.action for h in book.latest("home", 100, acted=True)] == ["incremental_update"]
    for number in range(4):
        book.record(make(evidence=f"source{number}", action="refresh_source"))
        book.record(make("other", evidence=f"source{number}", action="refresh_source"))
    book.record(make(evidence="age", action="extend_dataset"))
    book.record(make(evidence="blocked", action="full_retrain", status="blocked_by_budget"))
    found = book.latest_trainings(["home", "other", "third"], 2)
    assert {name: [h.decision.evidence for h in some] for name, some in found.items()} == {
        "home": ["source3", "source2"],
        "other": ["source3", "source2"],
    }


def test_a_decision_goes_from_pending_over_claimed_to_its_end(book: DecisionBook) -> None:
    decision = book.record(make())
    actions = ("incremental_update",)
    assert book.pending(actions) == [decision] and book.pending(("release",)) == []
    assert claim(book, decision) is None
    assert book.pending(actions) == [] and [c.decision for c in book.claims()] == [decision]
    assert book.get(decision.id).state == "under way"
    book.step(decision.id, "judged", "reject")
    then = dataclasses.replace(decision, attempt=2, action="full_retrain", at="")
    book.finish(decision, "succeeded", "the gate says reject", "run1", then)
    history = book.get(decision.id)
    assert (history.state, history.verdict, history.is_open) == ("succeeded", "reject", False)
    assert book.claims() == [] and [p.id for p in book.pending(("full_retrain",))] == [then.id]
    book.step(decision.id, "failed", "", "run1")
    assert book.get(decision.id).state == "succeeded", "the first end stays"
    assert claim(book, decision) == "it was closed meanwhile"


def test_only_one_of_many_gets_the_customization(ledger: Ledger) -> None:
    """Two sensors (here 8 threads, each with a connection of its own) that want the same at once."""
    book = DecisionBook(ledger)
    decisions = [book.record(make(evidence=f"e{number}")) for number in range(8)]
    other = book.record(make("other"))
    start, got = threading.Barrier(8), []

    def run(decision: Decision) -> None:
        own = Ledger(str(ledger.engine.url))
        start.wait()
        got.append((claim(DecisionBook(own), decision), decision))
        own.close()

    threads = [threading.Thread(target=run, args=(decision,)) for decision in decisions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [decision for refused, decision in got if refused is None]
    assert len(winners) == 1
    assert {refused for refused, _ in got if refused} == {f"decision {winners[0].id} is under way"}
    assert [c.decision for c in book.claims()] == winners
    assert claim(book, other) is None
    book.finish(winners[0], "succeeded", "", "run")
    assert claim(book, next(d for d in decisions if d != winners[0])) is None


def test_open_claims_count_as_spent(book: DecisionBook) -> None:
    """Decisions made at the same time on the same budget: together they stay within it."""
    decisions = [book.record(make(f"c{n}", device_seconds=40.0, cost=None)) for n in range(4)]
    fleet = Limits(device_seconds=100.0)
    refused = [claim(book, decision, fleet=fleet) for decision in decisions]
    assert refused[:2] == [None, None]
    assert all(reason and reason.startswith("the budget of the fleet") for reason in refused[2:])
    assert [book.get(d.id).state for d in decisions] == ["under way"] * 2 + ["blocked_by_budget"] * 2
    assert book.reserved(None, price=2.0) == Spent(80.0, 160.0)
    # what a run has spent of its prediction is not counted twice
    spend(book, "c0", 25.0, "run0", decision_id=decisions[0].id)
    assert book.reserved(None, 1.0).device_seconds == 55.0
    assert book.spent(None, now()[:7]).device_seconds == 25.0
    spend(book, "c0", 30.0, "run0", kind="evaluation", decision_id=decisions[0].id)
    assert book.reserved("c0", 1.0).device_seconds == 0.0


def test_budgets_in_money_and_of_the_customization(book: DecisionBook) -> None:
    spend(book, "home", 70.0, "run0")
    decision = book.record(make(device_seconds=40.0, cost=40.0))
    reason = claim(book, decision, own=Limits(money=100.0))
    assert reason == "the budget of this customization: 40 money more than the 70 of this month exceed 100"
    free = book.record(make("free", action="release", device_seconds=0.0))
    assert claim(book, free, fleet=Limits(money=1.0)) is None, "a release computes nothing worth a budget"


def test_what_a_provider_is_paid_is_planned_and_reserved(book: DecisionBook) -> None:
    dear = book.record(make(device_seconds=3.0, cost=73.0))
    assert claim(book, dear, own=Limits(money=50.0)).startswith("the budget of this customization: 73 money")
    first, second = (book.record(make(f"c{n}", device_seconds=3.0, cost=73.0)) for n in range(2))
    assert claim(book, first, fleet=Limits(money=100.0)) is None
    assert book.reserved(None, 1.0) == Spent(3.0, 73.0)
    spend(book, "c0", 3.0, "run0", money=43.0, decision_id=first.id)
    assert book.reserved(None, 1.0) == Spent(0.0, 30.0)
    assert claim(book, second, fleet=Limits(money=100.0)).startswith("the budget of the fleet")


def test_a_cost_is_recorded_once_for_a_run_and_partition(book: DecisionBook) -> None:
    for _ in range(2):
        spend(book, "home", 5.0, "run1")
    spend(book, "home", 5.0, "run1", partition="q")
    spend(book, "home", 5.0, "run1", kind="evaluation")
    month = now()[:7]
    assert book.spent("home", month) == Spent(15.0, 15.0)
    assert book.spent(None, "1999-01") == Spent()
    assert {k: v.device_seconds for k, v in book.costs_of_month(month)["home"].items()} == {
        "training": 10.0,
        "evaluation": 5.0,
    }
    assert [cost.kind for cost in book.costs("home")] == ["evaluation", "training", "training"]


@pytest.mark.parametrize("table", ["decisions", "decision_steps", "costs", "alerts"])
def test_history_cannot_be_changed(book: DecisionBook, ledger: Ledger, table: str) -> None:
    decision = book.record(make())
    book.step(decision.id, "judged", "promote")
    spend(book, "home", 5.0, "run1")
    book.alert(Alert("a", "title", "text"))
    for statement in (f"UPDATE {table} SET at = 'x'", f"DELETE FROM {table}"):
        with pytest.raises(sa.exc.IntegrityError, match="append-only"), ledger.engine.begin() as connection:
            connection.execute(sa.text(statement))


def test_notes_keep_the_newest(book: DecisionBook) -> None:
    book.note("home", "source", {"version": "1"})
    book.note("home", "source", {"version": "2"})
    book.note("home", "dataset", {"digest": "d"})
    book.note("other", "source", {"version": "3"})
    assert book.notes()["home"]["source"].value == {"version": "2"}
    assert set(book.notes("home")) == {"home"} and set(book.notes()["home"]) == {"source", "dataset"}


def test_an_alert_waits_until_it_was_delivered_and_is_raised_once(book: DecisionBook) -> None:
    book.alert(Alert("a", "first", "text"), Alert("a", "again", "text"), Alert("b", "second", "text"))
    book.alert(Alert("a", "again", "text"))
    assert [alert.title for alert in book.undelivered()] == ["first", "second"]
    book.delivered("a")
    book.delivered("a")
    assert [alert.id for alert in book.undelivered()] == ["b"]
    assert book.unknown_alerts(["a", "c"]) == {"c"}


def test_an_alert_is_raised_with_what_it_is_about_or_not_at_all(
    book: DecisionBook, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    alert, decision = Alert("a", "title", "text"), make()
    spend(book, "home", 5.0, "run1")
    changes = (
        lambda: book.record_all([decision], [alert]),
        lambda: book.finish(decision, "gave_up", "", "run", alerts=[alert]),
        lambda: book.claim(decision, Limits(1.0), NO_LIMITS, 1.0, lambda reason: alert),
    )

    def die(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("ml_assets.decisions.book._raise", die)
        for change in changes:
            with pytest.raises(RuntimeError):
                change()
    assert book.get(decision.id) is None
    book.record(decision)
    assert book.get(decision.id).steps == ()
    for change in changes:
        change()
    assert [alert.id for alert in book.undelivered()] == ["a"]


def test_many_processes_create_the_tables_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from ml_assets.decisions.book import DecisionBook
from ml_assets.endpoints.ledger import Ledger
book = DecisionBook(Ledger({url!r}))
for number in range(20):
    book.note("home", "source", {{"version": str(number)}})
    book.note(sys.argv[1], "source", {{"version": str(number)}})
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", program, f"c{n}"], stderr=subprocess.PIPE) for n in range(4)
    ]
    errors = [process.communicate(timeout=60)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    assert set(DecisionBook(Ledger(url)).notes()) == {"home", "c0", "c1", "c2", "c3"}
