"""The page of the migration plan: what it says of each customization on each base revision."""

from typing import Any

from maintenance_world import make_release, make_spec
from traffic_records import record

from ml_assets.adapters.rungs import Climb, RungResult
from ml_assets.decisions.book import History
from ml_assets.decisions.records import Decision, Spent
from ml_assets.endpoints.ledger import Release
from ml_assets.fleet.migration_page import Evaluated, build_page, median_latencies, render_html, table_rows

OLD, NEW, BAD = "tiny@000000000001", "tiny@000000000002", "tiny@000000000003"
AT = "2026-03-10T12:00:00.000000+00:00"


def evaluated(verdict: str, quality: float, champion: str | None, **decision: Any) -> Evaluated:
    def arm(mean: float) -> dict[str, Any]:
        interval = {"mean": mean, "lower": mean - 0.05, "upper": mean + 0.05}
        value = {**interval, "mean": 1000 * mean}
        return {"metrics": {"chrf": interval}, "value": value, "cost_per_1000": 2.5}

    summary = {
        "about": {"champion": champion},
        "arms": {"zero_shot": arm(0.1), "adapter": arm(quality), "champion": arm(0.9)},
        "metric": "chrf",
        "currency": "EUR",
        "rows": 200,
        "decision": {
            "verdict": verdict,
            "reasons": [f"the gate says {verdict}"],
            "difference": {"losses": 7},
            "needs_rows": None,
        }
        | decision,
    }
    return Evaluated.of(summary, "e" * 64, {"seconds": {"adapter": [0.1, 0.3, 0.2]}})


def page_of(
    move: str = "automatic",
    releases: list[Release] | None = None,
    histories: tuple[History, ...] = (),
    spent: dict[str, Spent] | None = None,
) -> Any:
    spec = make_spec(migration={"move": move})
    serves = make_release(base_revision=OLD, at="2026-03-01T00:00:00.000000+00:00")
    found = {
        ("home", NEW): evaluated("promote", 0.89, serves.adapter_digest),
        ("home", BAD): evaluated("undecided", 0.7, serves.adapter_digest, needs_rows=1234),
    }
    rungs = (
        RungResult("copy", "copy", "reject", "worse", training_seconds=5.0, evaluation_seconds=15.0),
        RungResult("tune", "copy", "promote", "as good", training_seconds=10.0, evaluation_seconds=20.0),
    )
    climb = Climb("c" * 64, "home", NEW, "a" * 64, OLD, "d" * 64, rungs, full_seconds=200.0)
    return build_page(
        [spec],
        [OLD, NEW, BAD],
        lambda name, revision: found.get((name, revision)),
        histories,
        [climb],
        spent or {},
        lambda name: [serves] if releases is None else releases,
        lambda name: {OLD: 0.25},
        AT,
    )


def test_each_pair_has_a_recommendation_with_its_figures() -> None:
    page = page_of()
    old, new, bad = page.lines
    assert (old.recommendation, old.latency_seconds, old.quality) == ("serves", 0.25, None)
    assert (new.recommendation, new.rung, new.saved) == ("move", "tune", 0.75)
    assert (new.quality, new.champion, new.bare, new.negative_flips) == (0.89, 0.9, 0.1, 7)
    assert (new.serving_per_1000, new.value_per_1000) == (2.5, 890.0)
    assert (new.actual_seconds, new.seconds_per_answer, new.latency_seconds) == (50.0, 0.2, None)
    assert bad.recommendation == "undecided: needs 1,234 rows"
    assert page.saved == 0.75
    assert [row["recommendation"] for row in table_rows(page)] == [line.recommendation for line in page.lines]
    html = render_html(page, AT)
    for text in ("250 ms", "0.2 s in a full batch", "75 %", "undecided: needs 1,234 rows", "0.840 to 0.940"):
        assert text in html


def test_a_person_is_waited_for_and_another_champion_undoes_a_verdict() -> None:
    assert "waits for a person" in page_of("manual").lines[1].why
    other = make_release(base_revision=OLD, adapter="f" * 64, at=AT)
    assert page_of(releases=[other]).lines[1].recommendation == "undecided: evaluate again"
    assert page_of(releases=[]).lines[0].recommendation == "not tried"


def test_the_cost_to_move_is_that_of_all_attempts() -> None:
    def attempt(number: int) -> History:
        names = ("diagnosis", "reason", "evidence", "dataset_digest", "adapter_digest", "policy")
        texts: dict[str, Any] = dict.fromkeys(names, "")
        decision = Decision("home", "migrate", "to_do", **texts, base_revision=NEW, attempt=number)
        return History(decision, (), claimed=False)

    third, second, first = (attempt(number) for number in (3, 2, 1))
    spent = {first.decision.id: Spent(30.0, 3.0), second.decision.id: Spent(20.0, 2.0)}
    line = page_of(histories=(third, second, first), spent=spent).lines[1]
    assert (line.actual_seconds, line.actual_money) == (50.0, 5.0)
    assert page_of(histories=(first,)).lines[1].actual_money is None


def test_latencies_are_those_of_answered_requests() -> None:
    requests = [record(latency_ms=float(ms), base_revision=OLD) for ms in (10, 30, 20)]
    requests += [record(latency_ms=9e9, base_revision=OLD, status=500), record(latency_ms=5.0)]
    assert median_latencies(requests) == {OLD: 0.02, "tiny@0123456789ab": 0.005}
