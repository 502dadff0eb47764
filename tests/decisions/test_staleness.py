"""Three ways to be behind, told apart."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from maintenance_world import ADAPTER, NOW, REVISION, make_policy, make_release, make_spec

from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.diagnosis import Policy
from ml_assets.decisions.records import NOTHING, Decision, Note, Spent
from ml_assets.decisions.staleness import find_stale, note_candidate, observe_due, to_decision
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings


def ago(**delta: float) -> str:
    return (datetime.fromisoformat(NOW) - timedelta(**delta)).isoformat(timespec="microseconds")


def notes(source: str = "v1", made_of: str = "v1", **changes: Note) -> dict[str, Note]:
    facts = {
        "adapter": ADAPTER,
        "base_revision": REVISION,
        "dataset": "d",
        "source_version": made_of,
        "verdict": "promote",
    }
    return {
        "source": Note({"version": source}, ago(hours=1)),
        "dataset": Note({"digest": "d", "source_version": made_of, "train_rows": 10}, ago(days=2)),
        "candidate": Note(facts, ago(days=2)),
        "accepted": Note(facts, ago(days=2)),
    } | changes


RELEASE = make_release(at=ago(days=1))


def actions(spec, known, release=RELEASE) -> list[str]:
    return [one.action for one in find_stale(spec, known, release, NOW)]


def test_up_to_date() -> None:
    assert actions(make_spec(freshness={"dataset": "3d"}), notes()) == []
    assert actions(make_spec(), {}, None) == []


def test_a_source_with_other_rows_is_followed() -> None:
    (stale,) = find_stale(make_spec(), notes(source="v2"), RELEASE, NOW)
    assert (stale.action, stale.base_revision) == ("refresh_source", REVISION)
    assert stale.evidence == f"source-v2-{ADAPTER[:12]}-{NOW[:7]}"
    (later,) = find_stale(make_spec(), notes(source="v2"), RELEASE, ago(days=-31))
    assert later.evidence != stale.evidence, "a budget that was exhausted is another one then"
    other = find_stale(make_spec(), notes(source="v2"), make_release(adapter="n" * 64, at=NOW), NOW)
    assert [one.evidence != stale.evidence for one in other] == [True], (
        "what was dropped because another adapter serves is decided again"
    )
    known = {name: note for name, note in notes(source="v2").items() if name != "accepted"}
    assert actions(make_spec(), known, None) == [], "nothing serves: the first run is a person's"


def test_a_source_that_changed_to_the_same_rows_is_not_behind() -> None:
    same = Note({"digest": "d", "source_version": "v2", "train_rows": 10}, ago(hours=1))
    assert actions(make_spec(), notes(source="v2", dataset=same)) == []
    other = Note({"digest": "e", "source_version": "v2", "train_rows": 11}, ago(hours=1))
    assert actions(make_spec(), notes(source="v2", dataset=other)) == ["refresh_source"]


def test_a_dataset_past_its_age_is_built_again() -> None:
    assert actions(make_spec(freshness={"dataset": "36h"}), notes()) == ["extend_dataset"]


def test_an_accepted_adapter_that_does_not_serve_is_released() -> None:
    accepted = Note(notes()["accepted"].value | {"adapter": "n" * 64}, ago(hours=2))
    (stale,) = find_stale(make_spec(), notes(accepted=accepted), RELEASE, NOW)
    assert stale.action == "release" and stale.base_revision == REVISION
    assert actions(make_spec(), notes(accepted=accepted), None) == ["release"], "the first release failed"
    rolled_back = make_release(at=ago(hours=1), action="rollback")
    assert actions(make_spec(), notes(accepted=accepted), rolled_back) == [], "somebody chose what serves"
    withdrawn = make_release(at=ago(hours=1), action="withdraw")
    assert actions(make_spec(), notes(accepted=accepted), withdrawn) == [], "somebody chose that nothing does"


def test_a_move_to_another_base_revision_waits_for_a_person_where_the_yaml_says_so() -> None:
    def decided(
        revision: str, adapter: str = "n" * 64, now: str = NOW, move: str = "manual"
    ) -> list[Decision]:
        facts = notes()["accepted"].value | {"adapter": adapter, "base_revision": revision}
        spec = make_spec(migration={"move": move})
        policy = Policy.of(spec, Settings.from_env())
        found = find_stale(spec, notes(accepted=Note(facts, ago(hours=2))), RELEASE, now)
        return [to_decision("home", one, "d", RELEASE, policy, None, NOTHING, NOTHING) for one in found]

    (waits,) = decided("tiny@000000000002")
    assert (waits.action, waits.status) == ("release", "record_only")
    assert "waits for a person who materializes home/endpoint" in waits.reason
    (tomorrow,) = decided("tiny@000000000002", now=ago(days=-1))
    assert tomorrow.id == waits.id, "it is written down once"
    assert [one.status for one in decided("tiny@000000000002", move="automatic")] == ["to_do"]
    assert [one.status for one in decided(REVISION)] == ["to_do"], "the same base revision is no move"


def test_an_adapter_that_is_judged_again_and_not_accepted_is_accepted_no_more(tmp_path: Path) -> None:
    book = DecisionBook(Ledger(f"sqlite:///{tmp_path}/l.db"))
    facts = {"adapter": "n", "base_revision": REVISION, "dataset": "d", "source_version": "v1"}
    note_candidate(book, "home", facts | {"verdict": "promote"})
    at = book.notes("home")["home"]["accepted"].at
    note_candidate(book, "home", facts | {"verdict": "promote"})
    assert book.notes("home")["home"]["accepted"].at == at, "it was accepted then, not now"
    note_candidate(book, "home", facts | {"adapter": "other", "verdict": "reject"})
    assert book.notes("home")["home"]["accepted"].value["adapter"] == "n"
    note_candidate(book, "home", facts | {"verdict": "reject"})
    assert actions(make_spec(), book.notes("home")["home"]) == []


@pytest.mark.parametrize(
    ("seen", "due"), [(None, True), (ago(hours=2), True), (ago(minutes=30), False)], ids=str
)
def test_sources_are_looked_at_as_often_as_the_yaml_says(seen: str | None, due: bool) -> None:
    spec = make_spec(freshness={"source": "1h"})
    known = {"source": Note({"version": "v"}, seen)} if seen else {}
    assert (observe_due(spec, known, NOW) is not None) == due
    assert observe_due(make_spec(), known, NOW) is None


def test_the_budget_holds_for_refreshes_and_not_for_what_is_free() -> None:
    policy = make_policy(device_seconds_per_month=100)
    (refresh,) = find_stale(make_spec(), notes(source="v2"), RELEASE, NOW)
    spent = Spent(50.0)
    blocked = to_decision("home", refresh, "d", RELEASE, policy, 60.0, spent, NOTHING)
    assert blocked.status == "blocked_by_budget"
    assert to_decision("home", refresh, "d", RELEASE, policy, 40.0, spent, NOTHING).status == "to_do"
    money = make_policy(money_per_month=50)
    paid = to_decision("home", refresh, "d", RELEASE, money, 0.0, NOTHING, NOTHING, 70.0)
    assert (paid.status, paid.cost) == ("blocked_by_budget", 70.0), "also what a provider is paid"
    (rebuild,) = find_stale(make_spec(freshness={"dataset": "1d"}), notes(), RELEASE, NOW)
    assert to_decision("home", rebuild, "d", RELEASE, policy, None, Spent(500.0), NOTHING).status == "to_do"
