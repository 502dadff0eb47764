"""From a base revision that passed its probe to migrated customizations: plan, one backfill, verdicts.

All state is in the instance and the book. A decision to migrate is recorded, claims its customization, is
put into a batch (its step `started` names it), and the batch is a backfill whose id follows from the
decisions in it: whatever dies in between, the next tick finds what is missing, and adds it once.
"""

import datetime
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal

import dagster as dg
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.execution.backfill import (
    BULK_ACTION_TERMINAL_STATUSES,
    BulkActionStatus,
    PartitionBackfill,
)
from dagster._core.storage.tags import SENSOR_NAME_TAG

from ml_assets.artifacts import ArtifactError, ArtifactRef, ArtifactStore, read_json
from ml_assets.base_models.asset import CHECKS
from ml_assets.decisions.asset import asset_url
from ml_assets.decisions.book import DecisionBook, History
from ml_assets.decisions.diagnosis import Policies, again
from ml_assets.decisions.records import Alert, Decision, Limits
from ml_assets.decisions.tags import MIGRATION_TAG, REVISION_TAG
from ml_assets.endpoints.ledger import Ledger, Release, now
from ml_assets.fleet.migration_plan import (
    Stake,
    by_value,
    plan_migration,
    plan_row,
    predicted_seconds,
    requests_per_month,
    value_per_1000,
)
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.store import TrafficLog
from sensors.dispatch import RETRY_AFTER, listing, running

PLAN = dg.AssetKey(["fleet", "migration_plan"])
BASE = dg.AssetKey("base_model")
SENSOR = "base_updates"
MUST_PASS = frozenset({"finite_logits"})
"""Checks of a base model that stop a migration in any case; another one does so when what serves passes."""
TRAFFIC = 200
"""The newest requests, by which the traffic of a month is estimated."""


@dataclass
class Fleet:
    """What a tick needs to know of all customizations."""

    instance: dg.DagsterInstance
    book: DecisionBook
    specs: Mapping[str, CustomizationSpec]
    policies: Policies
    ledger: Ledger
    serving: Mapping[str, Release]
    settings: Settings
    retry_after: Mapping[int, datetime.timedelta] = field(default_factory=lambda: dict(RETRY_AFTER))

    def followers(self, revision: str) -> list[CustomizationSpec]:
        family = revision.rpartition("@")[0]
        return [spec for spec in self.specs.values() if family in spec.base_models]


# -- the probe -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """What is known of a base revision: it was made in `run_id`, and these checks `failed`."""

    run_id: str
    failed: Mapping[str, str]
    complete: bool


Stands = Literal["usable", "untried", "unusable"]
"""Of a base revision: it passed its probe, is not probed to the end, or nothing is migrated to it."""


def newest_materialization(
    instance: dg.DagsterInstance, revision: str, after: float = 0.0
) -> dg.EventLogRecord | None:
    """Of a base revision, later than the timestamp `after`."""
    which = dg.AssetRecordsFilter(asset_key=BASE, asset_partitions=[revision], after_timestamp=after or None)
    return next(iter(instance.fetch_materializations(which, limit=1).records), None)


def probe_of(instance: dg.DagsterInstance, revision: str, after: float = 0.0) -> Probe | None:
    """The checks of the newest materialization of a base revision later than `after`; None where there is
    none, or its run died before all of them were evaluated."""
    record = newest_materialization(instance, revision, after)
    if record is None:
        return None
    run_id = record.run_id
    evaluated: set[str] = set()
    failed: dict[str, str] = {}
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION):
        event = entry.dagster_event
        if event is None:
            continue
        check = event.asset_check_evaluation_data
        if check.asset_key == BASE and check.partition in (None, revision):
            evaluated.add(check.check_name)
            if not check.passed:
                failed[check.check_name] = check.description or ""
    run = instance.get_run_by_id(run_id)
    # Dagster stores that the asset was made before it stores what its checks say
    if run is not None and run.is_finished and not run.is_success and CHECKS.keys() - evaluated:
        return None
    return Probe(run_id, failed, run is None or run.is_finished)


def unusable(fleet: Fleet, revision: str, probe: Probe) -> str | None:
    """Why nothing is migrated to a base revision: a check that must pass, or that passes on a revision which
    its followers are on, so that they would be worse off. None when nothing speaks against it."""
    if not probe.failed:
        return None
    stops = MUST_PASS & probe.failed.keys()
    if not stops:
        notes = fleet.book.notes()
        before = {
            release.base_revision
            for spec in fleet.followers(revision)
            if (release := fleet.serving.get(spec.name)) is not None
        } | {
            str(notes[spec.name]["candidate"].value["base_revision"])
            for spec in fleet.followers(revision)
            if "candidate" in notes.get(spec.name, {})
        }
        for other in sorted(before - {revision}):
            passes = probe_of(fleet.instance, other)
            stops = stops | (probe.failed.keys() - (passes.failed.keys() if passes else set()))
    reasons = [f"{name}: {probe.failed[name]}" for name in sorted(stops)]
    return "; ".join(reasons) or None


# -- the plan ------------------------------------------------------------------------------------------


def make_plan(fleet: Fleet, revision: str, store: ArtifactStore, log: TrafficLog) -> str | None:
    """Decide about every follower of a base revision that is not decided about yet, and show it. What this
    does, in a line; None when there is nothing to decide."""
    asked = cache(partial(log.newest_times, TRAFFIC))  # once, and only when there is something to decide
    made = plan_migration(
        revision,
        list(fleet.specs.values()),
        fleet.book,
        fleet.serving,
        fleet.ledger.last_in_family(revision.rpartition("@")[0]),
        fleet.policies,
        fleet.settings,
        now()[:7],
        lambda spec: stake_of(spec, fleet.serving.get(spec.name), store, asked().get(spec.name)),
    )
    if not made:
        return None
    seconds = predicted_seconds(made)
    # first shown, then recorded: what is started at the next tick was seen before
    fleet.instance.report_runless_asset_event(
        dg.AssetMaterialization(
            PLAN,
            description=f"What is going to be done about base revision {revision}.",
            metadata={
                "base_revision": revision,
                "predicted_device_seconds": seconds,
                "plan": dg.MetadataValue.table([dg.TableRecord(plan_row(d, d.status)) for d in made]),
            },
        )
    )
    alerts = [
        Alert(
            f"blocked_by_budget:{decision.id}",
            f"{decision.customization}: its migration to {revision} is blocked by the budget",
            f"{decision.diagnosis} {decision.reason}",
            customization=decision.customization,
            url=asset_url(fleet.settings.dagster_url, *PLAN.path),
        )
        for decision in made
        if decision.status == "blocked_by_budget"
    ]
    fleet.book.record_all(made, alerts)
    states = [f"{sum(d.status == s for d in made)} {s}" for s in sorted({d.status for d in made})]
    return f"planned the migration to {revision}: {', '.join(states)}; predicted {seconds:g} device seconds"


def stake_of(
    spec: CustomizationSpec, release: Release | None, store: ArtifactStore, asked: tuple[int, str] | None
) -> Stake:
    """The value of what serves, from the report that let it serve, and how much it is asked: so many times
    since then."""
    requests: float | None = spec.maintenance.requests_per_month
    if requests is None and asked is not None:
        count, first = asked
        requests = requests_per_month([first] * count, now())
    if release is None:
        return Stake(None, requests)
    try:
        summary = read_json(store.open(ArtifactRef("eval_report", release.report_digest)) / "summary.json")
    except (ArtifactError, ValueError):
        return Stake(None, requests)
    return Stake(value_per_1000(summary), requests)


# -- carrying it out -----------------------------------------------------------------------------------


def carry_out(
    fleet: Fleet,
    graph: BaseAssetGraph,
    current: Mapping[str, str],
    stands: Mapping[str, Stands],
    revisions: Collection[str],
) -> list[str]:
    """Close what has ended, start what was decided at an earlier tick; what was done, in lines. `current`:
    the revision that each family's source holds, as far as that is known; `stands`: how these and the
    revisions of open decisions stand; `revisions`: the partitions."""
    lines: list[str] = []
    batches: dict[str, list[Decision]] = {}
    waiting: list[Decision] = []
    backfill_of = cache(fleet.instance.get_backfill)  # one backfill is that of many
    for history in fleet.book.migrations():
        if not (history.is_open and history.claimed):
            continue
        started = next((step for step in history.steps if step.step == "started"), None)
        decision = history.decision
        if started is not None and (line := _follow(fleet, history, started.detail, backfill_of)):
            lines.append(line)
        elif started is not None and backfill_of(started.detail) is not None:
            batches.setdefault(started.detail, []).append(decision)
        # claimed, and what claimed it died
        elif reason := _impossible(fleet, decision, stands, revisions):
            lines.append(_drop(fleet, decision, reason))
        elif started is None:
            waiting.append(decision)
        else:
            batches.setdefault(started.detail, []).append(decision)
    for name, decisions in batches.items():
        if backfill_of(name) is None:
            _add_backfill(fleet, graph, name, decisions)
        lines.append(f"backfill {name} migrates {listing([d.customization for d in decisions])}")
    waiting += _claim(fleet, current, stands, revisions, lines)
    for revision in sorted({str(decision.base_revision) for decision in waiting}):
        together = by_value([decision for decision in waiting if decision.base_revision == revision])
        name = fleet.book.start_together([decision.id for decision in together])
        _add_backfill(fleet, graph, name, together)
        names = listing([decision.customization for decision in together])
        lines.append(f"backfill {name} to {revision} is requested for {names}")
    return lines


def _claim(
    fleet: Fleet,
    current: Mapping[str, str],
    stands: Mapping[str, Stands],
    revisions: Collection[str],
    lines: list[str],
) -> list[Decision]:
    """Claim what may begin; why the others may not is put into `lines`."""
    pending = by_value(fleet.book.pending(("migrate",)))
    if not pending:
        return []
    busy = running(fleet.instance, [decision.customization for decision in pending])
    ready: list[Decision] = []
    for decision in pending:
        name, revision = decision.customization, str(decision.base_revision)
        family = revision.rpartition("@")[0]
        age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(decision.at)
        newest = current.get(family)
        untried = [one for one in (newest, revision) if one is not None and stands.get(one) == "untried"]
        if reason := _impossible(fleet, decision, stands, revisions):
            lines.append(_drop(fleet, decision, reason))
        elif newest is None:
            lines.append(f"{name}: its migration to {revision} waits until the source of {family} was read")
        elif untried:
            lines.append(f"{name}: its migration to {revision} waits: {untried[0]} is being probed")
        elif reason := _outdated(fleet, decision, newest, stands):
            lines.append(_drop(fleet, decision, reason))
        elif (wait := fleet.retry_after.get(decision.attempt)) and age < wait:
            lines.append(f"{name}: attempt {decision.attempt} to migrate it waits {wait}")
        elif name in busy:
            lines.append(f"{name}: its migration waits for run {busy[name][:8]}")
        else:
            ready.append(decision)

    def limits_of(decision: Decision) -> tuple[Limits, Limits]:
        policy = fleet.policies.of(decision.customization, fleet.settings)
        return policy.own, policy.fleet

    def blocked(decision: Decision, reason: str) -> Alert:
        return _alert(fleet, decision, "is blocked by the budget", reason)

    price, claimed = fleet.settings.device_second_price, []
    for decision, refused in zip(ready, fleet.book.claim_all(ready, limits_of, price, blocked), strict=True):
        if refused is None:
            claimed.append(decision)
        else:
            lines.append(f"{decision.customization}: its migration waits or is closed: {refused}")
    return claimed


def _drop(fleet: Fleet, decision: Decision, reason: str) -> str:
    fleet.book.step(decision.id, "dropped", reason)
    return f"{decision.customization}: its migration to {decision.base_revision} is dropped: {reason}"


def _impossible(
    fleet: Fleet, decision: Decision, stands: Mapping[str, Stands], revisions: Collection[str]
) -> str | None:
    """Why a decision can't be carried out."""
    name, revision = decision.customization, str(decision.base_revision)
    if name not in fleet.specs or revision.rpartition("@")[0] not in fleet.specs[name].base_models:
        return "the customization does not follow it any more"
    if revision not in revisions:
        return "it is not a partition any more"
    return "it failed its probe" if stands.get(revision) == "unusable" else None


def _outdated(fleet: Fleet, decision: Decision, newest: str, stands: Mapping[str, Stands]) -> str | None:
    """Why a decision that was not begun does not hold any more."""
    name, revision = decision.customization, str(decision.base_revision)
    if newest != revision and stands.get(newest) == "usable":
        return f"{newest} is newer"
    if decision.policy != fleet.policies.of(name, fleet.settings).version:
        return "the policy changed; it is decided again"
    release = fleet.serving.get(name)
    return "it serves on it since" if release is not None and release.base_revision == revision else None


def _add_backfill(fleet: Fleet, graph: BaseAssetGraph, name: str, decisions: Sequence[Decision]) -> None:
    """One backfill over adapters and eval reports. The UI shows and cancels it as any other."""
    revision, seconds = str(decisions[0].base_revision), predicted_seconds(decisions)
    names = [decision.customization for decision in by_value(decisions)]
    currency = next((decision.currency for decision in decisions if decision.currency), "")
    cost = sum(decision.cost or 0.0 for decision in decisions)
    keys = [dg.AssetKey([one, kind]) for one in names for kind in ("adapter", "eval_report")]
    fleet.instance.add_backfill(
        PartitionBackfill.from_asset_partitions(
            backfill_id=name,
            asset_graph=graph,
            partition_names=[revision],
            asset_selection=keys,
            backfill_timestamp=time.time(),
            tags={
                MIGRATION_TAG: name,
                REVISION_TAG: revision,
                "evergreen/predicted_device_seconds": f"{seconds:g}",
                SENSOR_NAME_TAG: SENSOR,
            },
            dynamic_partitions_store=fleet.instance,
            all_partitions=False,
            title=f"Migration to {revision}"[:100],
            description=(
                f"Carries {len(names)} customizations to {revision}, in this order: {listing(names, 20)}. "
                f"Predicted: {seconds:g} device seconds"
                + (f", {cost:g} {currency}" if cost else "")
                + f". The plan: {asset_url(fleet.settings.dagster_url, *PLAN.path)}"
            ),
            run_config=None,
        )
    )


def _follow(
    fleet: Fleet,
    history: History,
    backfill_id: str,
    backfill_of: Callable[[str], PartitionBackfill | None],
) -> str | None:
    """Close a decision that was judged or whose backfill has ended; what came of it, in a line."""
    decision, name = history.decision, history.decision.customization
    then: Decision | None = None
    if history.verdict is not None:
        step, detail = "succeeded", f"the gate says {history.verdict}"
    else:
        backfill = backfill_of(backfill_id)
        if backfill is None or backfill.status not in BULK_ACTION_TERMINAL_STATUSES:
            return None
        if backfill.status == BulkActionStatus.COMPLETED_SUCCESS:
            step, detail = "succeeded", ""
        elif backfill.status == BulkActionStatus.CANCELED:
            step, detail = "canceled", "a person ended the backfill"
        else:
            then = again(decision, f"backfill {backfill_id}")
            step, detail = ("failed", "") if then else ("gave_up", f"{decision.attempt} attempts failed")
    gave_up = [_alert(fleet, decision, "failed and is not tried again", detail)] if step == "gave_up" else []
    fleet.book.finish(decision, step, detail, backfill_id, then, gave_up)
    return f"{name}: its migration to {decision.base_revision} {step}" + (f", {detail}" if detail else "")


def _alert(fleet: Fleet, decision: Decision, what: str, text: str) -> Alert:
    return Alert(
        id=f"{what}:{decision.id}",
        title=f"{decision.customization}: its migration to {decision.base_revision} {what}",
        text=f"{decision.diagnosis} {text}",
        severity="error" if what.startswith("failed") else "warning",
        customization=decision.customization,
        url=asset_url(fleet.settings.dagster_url, *PLAN.path),
    )
