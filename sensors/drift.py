"""Looks at the traffic when enough of it is new, and starts what the decisions say."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import dagster as dg

from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.diagnosis import Policies
from ml_assets.decisions.records import MAX_ATTEMPTS, Note
from ml_assets.decisions.tags import CUSTOMIZATION_TAG
from ml_assets.endpoints.ledger import Release
from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.store import Head
from resources.ledger import LedgerResource
from resources.traffic_log import TrafficLogResource
from sensors.dispatch import RUNS_PER_TICK, dispatch, listing, running, tick_result
from sensors.targets import Job, Targets


@dataclass(frozen=True)
class Asked:
    """The look that was asked for last: after `looked` requests, when there were `requests`."""

    looked: int
    requests: int
    attempt: int


def build_drift_sensor(
    specs: Sequence[CustomizationSpec], jobs: Sequence[Job], interval: int = 30, **limits: object
) -> dg.SensorDefinition:
    """The sensor over all customizations: one query to the traffic database, one to the book, two to Dagster,
    however many there are."""
    by_name, targets, policies = {spec.name: spec for spec in specs}, Targets(jobs), Policies(specs)

    @dg.sensor(
        name="drift",
        **targets.options(),
        minimum_interval_seconds=interval,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Starts `<name>__look` (drift report and decision) after every `drift.every` requests, "
        "and `<name>__update` when a decision says so: each decision once, the next attempt after a failed "
        "run, a retrain when the gate rejects an incremental candidate.",
    )
    def drift(
        context: dg.SensorEvaluationContext, ledger: LedgerResource, traffic_log: TrafficLogResource
    ) -> dg.SensorResult:
        with traffic_log.opened() as log:
            heads = log.heads()
        with ledger.opened() as opened:
            notes, serving = DecisionBook(opened).notes(), opened.current_all()
            actions = ("incremental_update", "full_retrain")
            fleet = (by_name, policies, targets)
            done = dispatch(context.instance, opened, *fleet, actions, serving, **limits)  # type: ignore[arg-type]
        asked = {name: Asked(**values) for name, values in json.loads(context.cursor or "{}").items()}
        due = find_due(by_name, heads, notes, serving)
        room = max(0, RUNS_PER_TICK - len(done.requests))
        busy = running(context.instance, due, "look")
        looks, lines, left = [], [*done.lines], 0
        for name in due:
            if name in busy:
                lines.append(f"{name}: a look is under way")
                continue
            this = next_look(by_name[name], heads[name], notes.get(name, {}), asked.get(name))
            if isinstance(this, str):
                lines.append(f"{name}: {this}")
                continue
            if len(busy) + len(looks) >= room:
                left += 1
                continue
            asked[name] = this
            key = f"{name}:look:{serving[name].adapter_digest[:12]}:{this.looked}:{this.attempt}"
            looks.append(targets.request(name, "look", key))
        if looks:
            names = [str(look.tags[CUSTOMIZATION_TAG]) for look in looks]
            lines.append(f"enough new requests or labels to look at {listing(names)}")
        if left:
            lines.append(f"{left} looks are left to the next tick")
        if not lines:
            lines.append(_quiet(by_name, heads, notes, serving))
        cursor = json.dumps({name: asdict(one) for name, one in asked.items() if name in by_name})
        return tick_result(context, [*done.requests, *looks], lines, cursor, done.events)

    return drift


def looked_at(notes: Mapping[str, Note]) -> int:
    """How many requests there were at the last look."""
    return int(notes["look"].value["looked"]) if "look" in notes else 0


def find_due(
    specs: Mapping[str, CustomizationSpec],
    heads: Mapping[str, Head],
    notes: Mapping[str, Mapping[str, Note]],
    serving: Mapping[str, Release],
) -> list[str]:
    """Customizations that serve and had at least `drift.every` requests since their last look, or the labels
    that this look had asked for; those that waited for the most requests first."""
    new = {
        name: heads[name].requests - looked_at(notes.get(name, {}))
        for name in specs
        if name in heads and name in serving
    }
    due = [
        name
        for name, count in new.items()
        if count >= specs[name].drift.every or _labelled(specs[name], heads[name], notes.get(name, {}))
    ]
    return sorted(due, key=lambda name: -new[name])


def _labelled(spec: CustomizationSpec, head: Head, notes: Mapping[str, Note]) -> bool:
    """Whether labels that were asked for at the last look have come: a quiet endpoint must not wait for
    requests until it may use them."""
    look = notes["look"].value if "look" in notes else {}
    if not look.get("wants_labels"):
        return False
    return head.labelled - int(look["labelled"]) >= spec.maintenance.min_new_rows


def next_look(
    spec: CustomizationSpec, head: Head, notes: Mapping[str, Note], asked: Asked | None
) -> Asked | str:
    """The look to ask for, or why not. One that was asked for and did not happen is asked for again: twice at
    once, then after as many requests again."""
    looked = looked_at(notes)
    if asked is None or asked.looked != looked:
        return Asked(looked, head.requests, 1)
    if asked.attempt % MAX_ATTEMPTS == 0 and head.requests < asked.requests + spec.drift.every:
        return f"{asked.attempt} looks failed; the next one after {spec.drift.every} more requests"
    return Asked(looked, head.requests, asked.attempt + 1)


def _quiet(
    specs: Mapping[str, CustomizationSpec],
    heads: Mapping[str, Head],
    notes: Mapping[str, Mapping[str, Note]],
    serving: Mapping[str, Release],
) -> str:
    """Why there is nothing to do."""
    silent = [name for name in specs if name in serving and name not in heads]
    waiting = [
        f"{name} ({heads[name].requests - looked_at(notes.get(name, {}))} of {spec.drift.every})"
        for name, spec in specs.items()
        if name in heads and name in serving
    ]
    unserved = [name for name in specs if name not in serving]
    parts = []
    if waiting:
        parts.append(f"too few new requests for a look: {listing(waiting)}")
    if silent:
        parts.append(f"no requests yet: {listing(silent)}")
    if unserved:
        parts.append(f"nothing serves yet: {listing(unserved)}")
    return "; ".join(parts) or "no customization is declared"
