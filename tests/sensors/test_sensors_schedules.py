"""Schedules from the YAML: when what may train becomes a decision, and a cron that is none."""

from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import fleet_location
import pytest
from customizations import COLOURS_YAML, Project, base_models_yaml, colour_rows
from maintenance_world import ADAPTER, REVISION, make_spec, release

from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.records import Cost
from ml_assets.endpoints.ledger import Ledger
from ml_assets.mistakes import SpecError
from ml_assets.settings import Settings
from resources.ledger import LedgerResource
from sensors.schedules import build_schedules

BLOCKS = [
    {"cron": "0 3 * * 1", "run": "retrain"},
    {"cron": "0 4 * * *", "run": "main"},
    {"cron": "*/5 * * * *", "run": "observe"},
]


def evaluate(spec, name: str, at: datetime):
    assets, jobs = fleet_location.customization(spec.name)
    by_kind = {job.name.rpartition("__")[2]: job for job in jobs}
    schedules = build_schedules(spec, by_kind)
    defs = dg.Definitions(
        assets=assets, jobs=jobs, schedules=schedules, resources={"ledger": LedgerResource()}
    )
    (schedule,) = [one for one in schedules if one.name == name]
    context = dg.build_schedule_context(
        scheduled_execution_time=at,
        repository_def=defs.get_repository_def(),
        resources={"ledger": LedgerResource()},
    )
    return schedule.evaluate_tick(context)


def test_what_may_train_becomes_a_decision_once() -> None:
    spec, at = make_spec(schedules=BLOCKS), datetime(2026, 3, 9, 3, tzinfo=UTC)
    ledger = Ledger(Settings.from_env().ledger_url)
    book = DecisionBook(ledger)
    tick = evaluate(spec, "home__retrain__0", at)
    assert not tick.run_requests and "serves nothing yet" in str(tick.skip_message)
    release(ledger)
    for _ in range(2):
        tick = evaluate(spec, "home__retrain__0", at)
        assert "decided: full_retrain (to_do)" in str(tick.skip_message)
    (history,) = book.latest("home", 5)
    assert history.decision.evidence == "schedule-retrain-2026-03-09T03:00"
    assert (history.decision.base_revision, history.decision.adapter_digest) == (REVISION, ADAPTER)
    evaluate(spec, "home__main__1", at)
    assert [h.decision.action for h in book.latest("home", 5)] == ["refresh_source", "full_retrain"]


@pytest.mark.usefixtures("dies_before_alerts")
def test_what_a_budget_blocks_is_told_once() -> None:
    spec = make_spec(schedules=BLOCKS, maintenance={"device_seconds_per_month": 1})
    ledger = Ledger(Settings.from_env().ledger_url)
    release(ledger)
    book = DecisionBook(ledger)
    book.record_cost(Cost("home", "training", REVISION, "a run", 5.0, 10))
    for _ in range(2):
        tick = evaluate(spec, "home__retrain__0", datetime(2026, 3, 9, 3, tzinfo=UTC))
        assert "decided: full_retrain (blocked_by_budget)" in str(tick.skip_message)
    (alert,) = book.undelivered()
    assert alert.title == "home: the full_retrain of its schedule is blocked by the budget"


def test_what_does_not_train_starts_at_its_time() -> None:
    tick = evaluate(make_spec(schedules=BLOCKS), "home__observe__2", datetime(2026, 3, 9, 3, tzinfo=UTC))
    assert tick.run_requests and len(tick.run_requests) == 1


@pytest.mark.parametrize("cron", ["61 3 * * 1", "0 3 * * mondays", "0 0 31 2 *x"])
def test_a_cron_that_is_none_is_told_with_its_line(tmp_path: Path, cron: str) -> None:
    project = Project.create(tmp_path)
    project.write("bases", base_models_yaml({"tiny": tmp_path}))
    text = COLOURS_YAML + f'  schedules:\n    - cron: "{cron}"\n      run: look\n'
    project.write("colours", text, colour_rows(5))
    with pytest.raises(SpecError) as error:
        project.definitions()
    line = text.splitlines().index(f'    - cron: "{cron}"') + 1
    assert f"defs.yaml:{line}" in str(error.value)
    assert f"schedules.0.cron: expected a cron expression, found '{cron}'" in str(error.value)
