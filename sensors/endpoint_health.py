"""Notices a gateway that is dead or answers wrongly, and brings it back with what was served."""

import datetime
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg

from ml_assets.adapters.fingerprint import matches
from ml_assets.artifacts import ArtifactError, ArtifactStore
from ml_assets.cli.supervisor import ask_for_restart
from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.records import Alert
from ml_assets.decisions.tags import ACTION_TAG
from ml_assets.endpoints.gateway.client import GatewayClient, GatewayError
from ml_assets.endpoints.ledger import Release, now
from ml_assets.endpoints.release import read_fingerprint, why_away
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from resources.artifact_store import ArtifactStoreResource
from resources.gateway import GatewayResource
from resources.ledger import LedgerResource
from sensors.dispatch import RUNS_PER_TICK, listing, running, tick_result
from sensors.targets import Job, Targets

PROBES_PER_TICK = 3
PROBE_SECONDS = 15.0
"""Time for all probes of a tick; a busy gateway answers the rest at the next one."""
DOWN_SECONDS = 90.0
"""A gateway that dies is started again at once; one that is there and silent for that long is ended."""
REPAIR_MINUTES = 10
"""Between two runs that repair the same endpoint."""


def build_endpoint_health_sensor(
    specs: Sequence[CustomizationSpec], jobs: Sequence[Job], down_seconds: float = DOWN_SECONDS
) -> dg.SensorDefinition:
    """The sensor over all endpoints: one request for the health of all, and a few fingerprints in turns."""
    by_name, targets = {spec.name: spec for spec in specs}, Targets(jobs)

    @dg.sensor(
        name="endpoint_health",
        **targets.options(),
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Compares what the gateway serves with the ledger, and asks a few adapters at each tick "
        "for their fingerprints. An endpoint that is missing, or not served as released, is materialized, "
        "which serves it again; a gateway that is silent or answers wrongly is started again.",
    )
    def endpoint_health(
        context: dg.SensorEvaluationContext,
        ledger: LedgerResource,
        gateway: GatewayResource,
        artifact_store: ArtifactStoreResource,
    ) -> dg.SensorResult:
        settings = Settings.from_env()
        cursor: dict[str, Any] = json.loads(context.cursor or "{}")
        with ledger.opened() as opened:
            book = DecisionBook(opened)
            serving = {name: one for name, one in opened.current_all().items() if name in by_name}
            if not serving:
                return tick_result(context, [], ["nothing was released yet"])
            try:
                with gateway.client() as client:
                    health = client.health()
                    cursor.pop("down_since", None)
                    if health["status"] == "loading":
                        return tick_result(context, [], ["the gateway is loading"], json.dumps(cursor))
                    away = find_away(health, serving)
                    well = [name for name in serving if name not in away]
                    wrong, lines = _probe(client, artifact_store.store(), serving, well, cursor)
            except GatewayError as error:
                line = _silent(str(error), cursor, book, settings, down_seconds)
                return tick_result(context, [], [line], json.dumps(cursor))
            if wrong:
                ask_for_restart(settings, "gateway")
                reasons = [f"{name}: {reason}" for name, reason in wrong.items()]
                book.alert(
                    _alert(f"wrong:{now()[:13]}", "answers wrongly and is restarted", reasons, settings)
                )
                lines += reasons
        requests = []
        if away:
            busy = running(context.instance, list(away))
            bucket = int(time.time() // (REPAIR_MINUTES * 60))
            for name in in_turn(away, cursor.get("repaired", "")):
                reason = away[name]
                if name in busy:
                    lines.append(f"{name}: {reason}; run {busy[name][:8]} is at work")
                elif len(requests) < RUNS_PER_TICK:
                    lines.append(f"{name}: {reason}")
                    key = f"{name}:health:{serving[name].adapter_digest[:12]}:{serving[name].id}:{bucket}"
                    tags = {ACTION_TAG: "serve_again"}
                    requests.append(targets.request(name, "main", key, ("endpoint",), tags=tags))
                    cursor["repaired"] = name
        if not away and not wrong:
            lines.append(f"the gateway serves all {len(serving)} as the ledger says")
        return tick_result(context, requests, lines, json.dumps(cursor))

    return endpoint_health


def find_away(health: Mapping[str, Any], serving: Mapping[str, Release]) -> dict[str, str]:
    """{customization: what is wrong} of those that the gateway does not serve as the ledger says."""
    found = {}
    for name, release in serving.items():
        served = health["served"].get(name)
        if served is None:
            found[name] = f"not served ({health['unserved'].get(name, 'the gateway lost it')})"
        elif reason := why_away(served, release):
            found[name] = reason
    return found


def in_turn(names: Iterable[str], last: str) -> list[str]:
    """In order, those after `last` first: ticks that take a few each come to all of them."""
    return sorted(names, key=lambda name: (name <= last, name))


def _probe(
    client: GatewayClient,
    store: ArtifactStore,
    serving: Mapping[str, Release],
    names: Sequence[str],
    cursor: dict[str, Any],
) -> tuple[dict[str, str], list[str]]:
    """Ask a few for their fingerprints, going round; {customization: what is wrong}, and what was done."""
    wrong, asked, lines, deadline = {}, [], [], time.monotonic() + PROBE_SECONDS
    for name in in_turn(names, cursor.get("probed", ""))[:PROBES_PER_TICK]:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        cursor["probed"] = name
        digest = serving[name].adapter_digest
        try:
            fingerprint = read_fingerprint(store, digest)
            probed = client.probe(name, seconds=left)
        except (GatewayError, ArtifactError) as error:
            lines.append(f"{name}: its fingerprint can't be told now: {error}")  # busy, or being replaced
            continue
        asked.append(name)
        if probed.adapter_digest == digest and not matches(fingerprint, probed.with_adapter):
            wrong[name] = "does not answer with its fingerprint"
    if asked:
        lines.append(f"asked for fingerprints: {listing(asked)}")
    return wrong, lines


def _silent(
    reason: str, cursor: dict[str, Any], book: DecisionBook, settings: Settings, down_seconds: float
) -> str:
    """The gateway does not answer: wait for the supervisor, which starts it again when it is dead; end it
    when it is there and silent."""
    at = now()
    since = cursor.setdefault("down_since", at)
    age = datetime.datetime.fromisoformat(at) - datetime.datetime.fromisoformat(since)
    if age.total_seconds() < down_seconds:
        return f"the gateway does not answer since {since[:19]}; a dead one is started again: {reason}"
    asked = ask_for_restart(settings, "gateway")
    cursor["down_since"] = at  # the next request after as long again
    book.alert(_alert(f"down:{since[:16]}", "does not answer", [reason], settings))
    done = "it is ended and started again" if asked else "no supervisor runs here that could start it again"
    return f"the gateway does not answer since {since[:19]}; {done}: {reason}"


def _alert(name: str, what: str, reasons: Sequence[str], settings: Settings) -> Alert:
    return Alert(
        id=f"gateway:{name}",
        title=f"the gateway {what}",
        text="; ".join(reasons)[:2000],
        severity="error",
        url=f"{settings.dagster_url}/asset-groups",
    )
