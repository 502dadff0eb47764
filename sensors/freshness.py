"""Notices what is behind: a source with other rows, a dataset past its age, an endpoint that lags."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import dagster as dg

from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.diagnosis import (
    LONGEST_BACK_OFF,
    Past,
    Policies,
    cooldown,
    duration,
    paid,
    predict,
)
from ml_assets.decisions.records import NOTHING, Alert, Decision, Note
from ml_assets.decisions.staleness import Stale, find_stale, observe_due, to_decision
from ml_assets.endpoints.ledger import Release, now
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from resources.ledger import LedgerResource
from sensors.dispatch import RUNS_PER_TICK, dispatch, listing, running, tick_result
from sensors.targets import Job, Targets

NEW_PER_TICK = 50
"""Decisions that a tick makes; each reads what trainings of its customization cost."""


def build_stale_data_sensor(
    specs: Sequence[CustomizationSpec], jobs: Sequence[Job], interval: int = 60, **limits: object
) -> dg.SensorDefinition:
    """The sensor over all customizations: looks at sources, refreshes, rebuilds, releases."""
    by_name, targets, policies = {spec.name: spec for spec in specs}, Targets(jobs), Policies(specs)

    @dg.sensor(
        name="stale_data",
        **targets.options(),
        minimum_interval_seconds=interval,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Three ways to be behind, three actions: a source that has other rows is followed by the "
        "main job, a dataset past its age is built again, an endpoint that lags behind its newest accepted "
        "adapter releases it. Sources are looked at as often as `freshness.source` says.",
    )
    def stale_data(context: dg.SensorEvaluationContext, ledger: LedgerResource) -> dg.SensorResult:
        with ledger.opened() as opened:
            book, at = DecisionBook(opened), now()
            notes, newest = book.notes(), opened.newest_all()
            serving = {name: row for name, row in newest.items() if row.action != "withdraw"}
            at_work = {claim.customization for claim in book.claims()}
            found = _find(by_name, notes, newest, at_work, at)
            at_work |= running(context.instance, [spec.name for spec, *_ in found]).keys()
            behind = [one for one in found if one[0].name not in at_work]
            lines: list[str] = []
            made = _record(book, behind, policies, notes, serving, at, lines)
            done = dispatch(
                context.instance,
                opened,
                by_name,
                policies,
                targets,
                ("refresh_source", "extend_dataset", "release"),
                serving,
                **limits,  # type: ignore[arg-type]
            )
        asked: dict[str, int] = json.loads(context.cursor or "{}")
        looks = [
            (name, due)
            for name, spec in by_name.items()
            if (due := observe_due(spec, notes.get(name, {}), at)) not in (None, asked.get(name))
        ]
        looking = running(context.instance, [name for name, _ in looks], "observe")
        looks = [look for look in looks if look[0] not in looking]
        # those first that were not asked for the longest: in a large fleet all get their turn
        looks.sort(key=lambda look: _asked_at(by_name[look[0]], asked.get(look[0], 0)))
        room = max(0, RUNS_PER_TICK - len(done.requests))
        observe = [
            # once in an interval, whatever becomes of it
            targets.request(name, "observe", f"{name}:observe:{due}")
            for name, due in looks[:room]
        ]
        lines += done.lines
        lines += [f"{d.customization}: {d.action} ({d.status}): {d.diagnosis}" for d in made]
        if looks:
            lines.append(f"looking at the source of {listing([name for name, _ in looks])}")
        asked |= dict(looks[:room])
        if not lines:
            lines.append(f"{len(by_name)} customizations are up to date with what is known of their sources")
        cursor = json.dumps({name: due for name, due in asked.items() if name in by_name})
        return tick_result(context, [*done.requests, *observe], lines, cursor, done.events)

    return stale_data


def _asked_at(spec: CustomizationSpec, interval: int) -> float:
    """Seconds since the epoch at which an interval of looks at the source began."""
    return interval * duration(spec.freshness.source or "1d").total_seconds()


def _find(
    specs: Mapping[str, CustomizationSpec],
    notes: Mapping[str, Mapping[str, Note]],
    newest: Mapping[str, Release],
    at_work: Collection[str],
    at: str,
) -> list[tuple[CustomizationSpec, Stale]]:
    """What is behind, without the customizations that somebody brings up to date now."""
    return [
        (spec, stale)
        for name, spec in specs.items()
        if name not in at_work
        for stale in find_stale(spec, notes.get(name, {}), newest.get(name), at)
    ]


def _record(
    book: DecisionBook,
    found: Sequence[tuple[CustomizationSpec, Stale]],
    policies: Policies,
    notes: Mapping[str, Mapping[str, Note]],
    serving: Mapping[str, Release],
    at: str,
    lines: list[str],
) -> list[Decision]:
    """Record the decisions that are new; gives these back. Why others are not made is put into `lines`."""
    settings = Settings.from_env()

    def decide(spec: CustomizationSpec, stale: Stale, *figures: Any) -> Decision:
        policy, digest = policies.of(spec.name, settings), _dataset(notes[spec.name], stale)
        return to_decision(spec.name, stale, digest, serving.get(spec.name), policy, *figures)

    ids = [decide(spec, stale, None, NOTHING, NOTHING).id for spec, stale in found]
    known = book.known(ids)
    unknown = [one for one, name in zip(found, ids, strict=True) if name not in known]
    refreshes = [spec.name for spec, stale in unknown if stale.action == "refresh_source"]
    trainings, cooling = book.latest_trainings(refreshes, LONGEST_BACK_OFF + 1), set[str]()
    for name, histories in trainings.items():
        until = cooldown([Past.of(one) for one in histories], policies.of(name, settings))
        if until and until > at:
            cooling.add(name)
            lines.append(f"{name}: the source has other rows; the cooldown lasts until {until[:16]}")
    new = [one for one in unknown if one[1].action != "refresh_source" or one[0].name not in cooling]
    new = new[:NEW_PER_TICK]
    if not new:
        return []
    month, price = at[:7], settings.device_second_price
    fleet = book.spent(None, month) + book.reserved(None, price)
    made = []
    for spec, stale in new:
        seconds, money, dataset = None, None, notes[spec.name].get("dataset")
        if stale.action == "refresh_source":
            rows = int(dataset.value["train_rows"]) if dataset else 0
            costs = book.costs(spec.name)
            seconds = predict(costs, rows, 0, 0.0)["refresh_source"]
            money = predict(costs, rows, 0, 0.0, paid(price))["refresh_source"]
        made.append(decide(spec, stale, seconds, book.spent(spec.name, month), fleet, money))
    alerts = [
        Alert(
            f"blocked_by_budget:{decision.id}",
            f"{decision.customization}: {decision.action} is blocked by the budget",
            f"{decision.diagnosis} {decision.reason}",
            customization=decision.customization,
        )
        for decision in made
        if decision.status == "blocked_by_budget"
    ]
    return book.record_all(made, alerts)


def _dataset(notes: Mapping[str, Note], stale: Stale) -> str:
    """Digest of the dataset that a decision is about. One that follows a candidate keeps its dataset, so that
    a run that built another and then failed does not make it a new decision."""
    subject = {"release": "accepted", "refresh_source": "candidate"}.get(stale.action, "")
    if subject in notes:
        return str(notes[subject].value["dataset"])
    return str(notes["dataset"].value["digest"]) if "dataset" in notes else ""
