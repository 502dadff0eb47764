"""`<name>/decision`: what is done about the findings of the newest look, and why nothing else."""

from typing import Any
from urllib.parse import quote

import dagster as dg

from ml_assets.artifacts import ArtifactError, ArtifactRef, ArtifactStore, read_json
from ml_assets.code_link import code_link
from ml_assets.datasets.snapshot import load_manifest
from ml_assets.decisions.book import DecisionBook, History
from ml_assets.decisions.diagnosis import Evidence, Past, Policy, decide, paid, predict
from ml_assets.decisions.labels import label_path, write_requests
from ml_assets.decisions.records import Alert, Decision
from ml_assets.decisions.tags import DECISION_TAG
from ml_assets.drift_reports.build import read_findings
from ml_assets.drift_reports.fleet import e_value_of, fleet_alarms
from ml_assets.endpoints.ledger import Ledger, now
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.store import Head
from resources.artifact_store import ArtifactStoreResource
from resources.ledger import LedgerResource
from resources.traffic_log import TrafficLogResource

HISTORY_ROWS = 20
PAST = 100
"""Earlier decisions that led to something, which a new one takes into account."""

CHECKS = {
    "no_confirmed_loss": "The champion answers the traffic as well as its evaluation rows.",
    "within_budget": "What was decided may be paid for.",
}


def build_decision_asset(spec: CustomizationSpec) -> dg.AssetsDefinition:
    """The decision asset of one customization. It starts nothing itself: the sensor `drift` does."""
    key = dg.AssetKey([spec.name, "decision"])
    rules = spec.maintenance

    @dg.asset(
        key=key,
        ins={
            "drift_report": dg.AssetIn(key=dg.AssetKey([spec.name, "drift_report"])),
            "dataset": dg.AssetIn(key=dg.AssetKey([spec.name, "dataset"])),
        },
        description=(
            f"What is done about the traffic of **{spec.name}**: watch, extend the dataset, update, retrain "
            f"or ask for labels, whichever is the cheapest that is enough. A loss counts when "
            f"{rules.failed_looks} of the last {rules.of_looks} looks failed, the newest among them. "
            + ("Nothing is started (`mode: record`)." if rules.mode == "record" else "")
        ),
        group_name=spec.name,
        owners=spec.owners,
        kinds={"report"},
        tags={"customization": spec.name},
        metadata=code_link(),
        check_specs=[dg.AssetCheckSpec(name, asset=key, description=text) for name, text in CHECKS.items()],
    )
    def decision(
        context: dg.AssetExecutionContext,
        artifact_store: ArtifactStoreResource,
        ledger: LedgerResource,
        traffic_log: TrafficLogResource,
        drift_report: ArtifactRef,
        dataset: ArtifactRef,
    ) -> dg.MaterializeResult:
        settings, store = Settings.from_env(), artifact_store.store()
        policy = Policy.of(spec, settings)
        with ledger.opened() as opened:
            book = DecisionBook(opened)
            try:
                evidence = gather(spec, store, drift_report, dataset, opened, policy)
            except ArtifactError as error:
                raise dg.Failure(str(error), allow_retries=False) from error
            made = book.record(decide(evidence, policy))
            findings = evidence.findings
            labels: dict[str, Any] = {}
            with traffic_log.opened() as log:
                # in this order: a request in between makes the next look come a little earlier
                head = log.heads().get(spec.name, Head(spec.name))
                looked = head.requests - len(log.requests(spec.name, findings.to_seq, head.last_seq))
                facts = {"adapter": findings.adapter_digest, "to_seq": findings.to_seq, "looked": looked}
                facts |= {"kind": made.seen["kind"], "e_value": e_value_of(findings)}
                facts |= {"labelled": head.labelled, "wants_labels": made.action == "ask_for_labels"}
                book.note(spec.name, "look", facts)
                if made.action == "ask_for_labels" and made.status == "to_do":
                    wanted = findings.unlabelled[: rules.ask_for_labels]
                    path = label_path(settings.home, spec.name, made.id)
                    write_requests(path, [found for name in wanted if (found := log.request(name))])
                    book.step(made.id, "succeeded", f"wanted labels are in {path}", context.run.run_id)
                    labels = {"labels_wanted": dg.MetadataValue.path(str(path))}
            book.alert(*alerts(made, settings.dagster_url))
            history = book.latest(spec.name, HISTORY_ROWS)
        context.log.info(f"{made.action} ({made.status}): {made.diagnosis} {made.reason}")
        return dg.MaterializeResult(
            data_version=dg.DataVersion(made.id),
            metadata={**describe(made, history, settings.dagster_url), **labels},
            check_results=_checks(key, made),
        )

    return decision


def gather(
    spec: CustomizationSpec,
    store: ArtifactStore,
    drift_report: ArtifactRef,
    dataset: ArtifactRef,
    ledger: Ledger,
    policy: Policy,
) -> Evidence:
    """What a decision rests on, read from artifacts, ledger and book. Raises ArtifactError."""
    book, month = DecisionBook(ledger), now()[:7]
    findings = read_findings(store, drift_report)
    rows = load_manifest(store.open(dataset))["rows"]["train"]
    outcome, new_rows = findings.outcome, 0
    if policy.uses_labels:
        new_rows = outcome.labelled if outcome.usable is None else outcome.usable
    if findings.dataset_digest not in ("", dataset.digest):
        before = load_manifest(store.open(ArtifactRef("dataset", findings.dataset_digest)))["rows"]["train"]
        new_rows = max(new_rows, rows - before)
    champion = {}
    if findings.adapter_digest:  # else nothing served when it was looked at
        champion = read_json(store.open(ArtifactRef("adapter", findings.adapter_digest)) / "manifest.json")
    current = ledger.current(spec.name)
    costs = book.costs(spec.name)
    looks = {name: notes["look"].value for name, notes in book.notes().items() if "look" in notes}
    e_values = {name: float(look.get("e_value", 1.0)) for name, look in looks.items()}
    e_values[spec.name] = e_value_of(findings)
    return Evidence(
        findings=findings,
        dataset_digest=dataset.digest,
        train_rows=rows,
        new_rows=new_rows,
        now=now(),
        generation=int((champion.get("update") or {}).get("generation", 0)),
        past=tuple(Past.of(history) for history in book.latest(spec.name, PAST, acted=True)),
        predicted=predict(costs, rows, new_rows, spec.maintenance.replay),
        paid=predict(costs, rows, new_rows, spec.maintenance.replay, paid(policy.price)),
        serving=current.adapter_digest if current else None,
        spent=book.spent(spec.name, month) + book.reserved(spec.name, policy.price),
        fleet_spent=book.spent(None, month) + book.reserved(None, policy.price),
        fleet_size=len(e_values),
        stands_out=spec.name in fleet_alarms(e_values),
    )


def alerts(decision: Decision, dagster_url: str) -> list[Alert]:
    """What people are told about a decision: a loss that is not repaired by itself."""
    if decision.status == "blocked_by_budget":
        title = f"{decision.customization}: {decision.action} is blocked by the budget"
    elif decision.action == "ask_for_labels" and decision.status == "to_do":
        title = f"{decision.customization}: labels are wanted"
    else:
        return []
    # once for what was seen with this dataset and policy, not at every look that sees it still; each request
    # for labels is one of its own
    about = f"{decision.adapter_digest[:12]}:{decision.dataset_digest[:12]}:{decision.policy}"
    if decision.action == "ask_for_labels":
        about = decision.id
    return [
        Alert(
            id=f"{decision.status}:{decision.action}:{decision.customization}:{about}",
            title=title,
            text=f"{decision.diagnosis} {decision.reason}",
            customization=decision.customization,
            url=asset_url(dagster_url, decision.customization, "decision"),
        )
    ]


def asset_url(dagster_url: str, *path: str) -> str:
    return f"{dagster_url}/assets/{'/'.join(quote(part, safe='') for part in path)}"


def runs_url(dagster_url: str, decision_id: str) -> str:
    """The runs that a decision started, in the Dagster UI."""
    return f"{dagster_url}/runs?q[0]={quote(f'tag:{DECISION_TAG}={decision_id}', safe='')}"


def describe(decision: Decision, history: list[History], dagster_url: str) -> dict[str, dg.MetadataValue]:
    """A decision as metadata of an asset event: what an operator reads."""
    known = {"device seconds": decision.device_seconds, f"cost, {decision.currency}": decision.cost}
    known |= {f"gain a month, {decision.currency}": decision.gain}
    expected = "; ".join(f"{name}: {'unknown' if v is None else f'{v:g}'}" for name, v in known.items())
    would = "" if decision.status in ("to_do", "no_action") else " (would have)"
    lines = [
        f"**{decision.action}**{would}: {decision.reason}",
        f"**Diagnosis.** {decision.diagnosis}",
        f"**Expected.** {expected}",
        *(f"- not **{one.action}**: {one.reason}" for one in decision.rejected),
    ]
    metadata: dict[str, dg.MetadataValue] = {
        "decision": dg.MetadataValue.md("\n\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:])),
        "action": dg.MetadataValue.text(decision.action),
        "status": dg.MetadataValue.text(decision.status),
        "diagnosis": dg.MetadataValue.text(decision.diagnosis),
        "evidence": dg.MetadataValue.text(decision.evidence),
        "run_key": dg.MetadataValue.text(decision.key),
        "seen": dg.MetadataValue.json(decision.seen),
        "why_not": dg.MetadataValue.table(
            [
                dg.TableRecord(
                    {
                        "action": one.action,
                        "reason": one.reason,
                        "device seconds": "unknown"
                        if one.device_seconds is None
                        else f"{one.device_seconds:g}",
                    }
                )
                for one in decision.rejected
            ]
        )
        if decision.rejected
        else dg.MetadataValue.text("there was no other action to choose"),
    }
    for name, value in (
        ("predicted_device_seconds", decision.device_seconds),
        ("predicted_cost", decision.cost),
        ("predicted_gain_per_month", decision.gain),
    ):
        if value is not None:
            metadata[name] = dg.MetadataValue.float(value)
    if decision.action not in ("watch", "ask_for_labels") and decision.status == "to_do":
        metadata["runs"] = dg.MetadataValue.url(runs_url(dagster_url, decision.id))
    if history:
        metadata["history"] = dg.MetadataValue.table([dg.TableRecord(_line(one)) for one in history])
    return metadata


def _line(history: History) -> dict[str, str]:
    """Few columns: a table that is wider than the page has all other texts of the page cut off."""
    decision, end = history.decision, history.end
    became = [history.state.replace("_", " ")]
    if history.verdict:
        became.append(f"gate: {history.verdict}")
    if end and end.run_id:
        became.append(f"run {end.run_id[:8]}")
    return {
        "at": decision.at[:19].replace("T", " "),
        "action": f"{decision.action}: {', '.join(became)}",
        "reason": decision.reason,
    }


def _checks(key: dg.AssetKey, decision: Decision) -> list[dg.AssetCheckResult]:
    harm = decision.seen.get("kind") in ("loss", "unknown_loss")
    blocked = decision.status == "blocked_by_budget"
    return [
        dg.AssetCheckResult(
            asset_key=key,
            check_name="no_confirmed_loss",
            passed=not harm,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"{decision.diagnosis} Decided: {decision.action} ({decision.status}).",
            metadata={"action": decision.action, "reason": decision.reason},
        ),
        dg.AssetCheckResult(
            asset_key=key,
            check_name="within_budget",
            passed=not blocked,
            severity=dg.AssetCheckSeverity.WARN,
            description=decision.reason if blocked else "Nothing was blocked by a budget.",
        ),
    ]
