"""Notices what is behind: a source with other rows, a dataset past its age, an endpoint that lags."""

import json
from collections.abc import Collection, Mapping, Sequence

import dagster as dg

from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.diagnosis import Policy, predict
from ml_assets.decisions.records import NOTHING, Alert, Decision, Note
from ml_assets.decisions.staleness import Stale, find_stale, observe_due, to_decision
from ml_assets.endpoints.ledger import Ledger, Release, now
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from resources.ledger import LedgerResource
from sensors.dispatch import RUNS_PER_TICK, dispatch, listing, running, tick_result
from sensors.targets import Job, Targets

NEW_PER_TICK = 100
"""Decisions that a tick makes; each reads what trainings of its customization cost."""


def build_stale_data_sensor(
    specs: Sequence[CustomizationSpec], jobs: Sequence[Job], interval: int = 60, **limits: object
) -> dg.SensorDefinition:
    """The sensor over all customizations: looks at sources, refreshes, rebuilds, releases."""
    by_name, targets = {spec.name: spec for spec in specs}, Targets(jobs)

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
            made = _record(opened, [one for one in found if one[0].name not in at_work], notes, serving, at)
            done = dispatch(
                context.instance,
                opened,
                by_name,
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
        room = max(0, RUNS_PER_TICK - len(done.requests))
        observe = [
            # once in an interval, whatever becomes of it
            targets.request(name, "observe", f"{name}:observe:{due}")
            for name, due in looks[:room]
        ]
        lines = [*done.lines]
        lines += [f"{d.customization}: {d.action} ({d.status}): {d.diagnosis}" for d in made]
        if looks:
            lines.append(f"looking at the source of {listing([name for name, _ in looks])}")
        asked |= dict(looks[:room])
        if not lines:
            lines.append(f"{len(by_name)} customizations are up to date with what is known of their sources")
        cursor = json.dumps({name: due for name, due in asked.items() if name in by_name})
        return tick_result(context, [*done.requests, *observe], lines, cursor, done.events)

    return stale_data


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
    ledger: Ledger,
    found: Sequence[tuple[CustomizationSpec, Stale]],
    notes: Mapping[str, Mapping[str, Note]],
    serving: Mapping[str, Release],
    at: str,
) -> list[Decision]:
    """Record the decisions that are new; gives these back."""
    book, settings = DecisionBook(ledger), Settings.from_env()
    bare = []
    for spec, one in found:
        policy, digest = Policy.of(spec, settings), _dataset(notes[spec.name], one)
        decision = to_decision(spec.name, one, digest, serving.get(spec.name), policy, None, NOTHING, NOTHING)
        bare.append((spec, one, policy, decision))
    recorded = book.known([decision.id for *_, decision in bare])
    made = []
    for spec, one, policy, plain in [entry for entry in bare if entry[3].id not in recorded][:NEW_PER_TICK]:
        seconds, month = None, at[:7]
        if one.action == "refresh_source":
            rows = (
                int(notes[spec.name]["dataset"].value["train_rows"]) if "dataset" in notes[spec.name] else 0
            )
            seconds = predict(book.costs(spec.name), rows, 0, 0.0)["refresh_source"]
        spent = book.spent(spec.name, month) + book.reserved(spec.name, policy.price)
        fleet = book.spent(None, month) + book.reserved(None, policy.price)
        release = serving.get(spec.name)
        decision = to_decision(spec.name, one, plain.dataset_digest, release, policy, seconds, spent, fleet)
        made.append(book.record(decision))
        if decision.status == "blocked_by_budget":
            title = f"{spec.name}: {decision.action} is blocked by the budget"
            alert_id = f"blocked_by_budget:{decision.id}"
            text = f"{decision.diagnosis} {decision.reason}"
            book.alert(Alert(alert_id, title, text, customization=spec.name))
    return made


def _dataset(notes: Mapping[str, Note], stale: Stale) -> str:
    """Digest of the dataset that a decision is about. One that follows a candidate keeps its dataset, so that
    a run that built another and then failed does not make it a new decision."""
    subject = {"release": "accepted", "refresh_source": "candidate"}.get(stale.action)
    if subject in notes:
        return str(notes[subject].value["dataset"])
    return str(notes["dataset"].value["digest"]) if "dataset" in notes else ""
