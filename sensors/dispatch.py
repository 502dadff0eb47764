"""From a decision to its run: each is started once, whatever dies in between.

A decision claims its customization in the book before its run is requested. Until the claim is given back,
every tick looks for the run: one that was never made is requested again under the same run key, which
Dagster starts once; one that has ended closes the decision, and what failed is tried again, as a decision of
its own.
"""

import datetime
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import dagster as dg
from dagster._core.storage.tags import AUTO_RETRY_RUN_ID_TAG, WILL_RETRY_TAG

from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.decisions.asset import asset_url
from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.diagnosis import Policies, Policy, again, escalated, paid, permitted, predict
from ml_assets.decisions.records import Action, Alert, Decision
from ml_assets.decisions.tags import ACTION_TAG, CUSTOMIZATION_TAG, DECISION_TAG
from ml_assets.endpoints.ledger import Ledger, Release, now
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from sensors.targets import Targets, unfinished_work

RUNS_PER_TICK = 25
"""A tick that finds more leaves them to the next: creating a run takes Dagster a moment."""
RETRY_AFTER = {2: datetime.timedelta(minutes=5), 3: datetime.timedelta(minutes=30)}
"""How long an attempt waits after the one before failed."""
UNSETTLED = datetime.timedelta(minutes=1)
"""A failed run says within that time whether Dagster makes another of it."""
NOT_STARTED = dg.DagsterRunStatus.NOT_STARTED


@dataclass
class Dispatched:
    """What a tick does about decisions, and why it does nothing about others."""

    requests: list[dg.RunRequest] = field(default_factory=list)
    events: list[dg.AssetObservation] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def dispatch(
    instance: dg.DagsterInstance,
    ledger: Ledger,
    specs: Mapping[str, CustomizationSpec],
    policies: Policies,
    targets: Targets,
    actions: Sequence[Action],
    serving: Mapping[str, Release],
    retry_after: Mapping[int, datetime.timedelta] = RETRY_AFTER,
) -> Dispatched:
    """Close the decisions (of these actions) whose runs have ended, and start what is to be done."""
    book, settings, done = DecisionBook(ledger), Settings.from_env(), Dispatched()
    claims = [claim for claim in book.claims() if claim.decision.action in actions]
    runs = runs_of(instance, [claim.decision.id for claim in claims])
    revisions = set(instance.get_dynamic_partitions(str(BASE_MODELS.name)))
    for claim in claims:
        records = runs.get(claim.decision.id, [])
        if all(record.dagster_run.status == NOT_STARTED for record in records):
            # claimed, and its run was never submitted: the daemon or the tick died in between
            if reason := _impossible(claim.decision, specs, revisions):
                book.step(claim.decision.id, "dropped", reason)
                done.lines.append(f"{claim.customization}: {claim.decision.action} is dropped: {reason}")
            else:
                done.requests.append(run_request(claim.decision, targets))
                done.lines.append(f"{claim.customization}: {claim.decision.action} is requested again")
        elif ended := settled(instance, records):
            _close(book, claim.decision, ended, specs, settings, done)
        else:
            done.lines.append(f"{claim.customization}: {claim.decision.action} is under way")
    pending = book.pending(actions)
    if not pending:
        return done
    hand_made = running(instance, [decision.customization for decision in pending])
    for decision in pending:
        name = decision.customization
        if len(done.requests) >= RUNS_PER_TICK:
            done.lines.append("more at the next tick")
            break
        release = serving.get(name)
        if name in specs and (reason := _outdated(decision, release, policies.of(name, settings))):
            then = _scheduled_anew(book, decision, release, policies.of(name, settings))
            book.finish(decision, "dropped", reason, "", then, _blocked(then, settings))
            line = f"{name}: {decision.action} is dropped: {reason}"
            done.lines.append(line + (f"; next: {then.action} ({then.status})" if then else ""))
        elif reason := _impossible(decision, specs, revisions):
            book.step(decision.id, "dropped", reason)
            done.lines.append(f"{name}: {decision.action} is dropped: {reason}")
        elif (wait := retry_after.get(decision.attempt)) and _since(decision.at) < wait:
            done.lines.append(f"{name}: attempt {decision.attempt} of {decision.action} waits {wait}")
        elif name in hand_made:
            done.lines.append(f"{name}: {decision.action} waits for run {hand_made[name][:8]}")
        else:
            policy = policies.of(name, settings)
            alert = partial(_alert, decision, "blocked by the budget", settings=settings)
            refused = book.claim(decision, policy.own, policy.fleet, policy.price, alert)
            if refused is None:
                done.requests.append(run_request(decision, targets))
            else:
                done.lines.append(f"{name}: {decision.action} waits or is closed: {refused}")
    return done


def run_request(decision: Decision, targets: Targets) -> dg.RunRequest:
    """The run of a decision. Its key is made of evidence, dataset, policy and attempt."""
    kind, assets, partition, config = "main", (), decision.base_revision, None
    match decision.action:
        case "extend_dataset":
            assets, partition = ("dataset",), None
        case "release":
            assets = ("eval_report", "endpoint")
        case "incremental_update" | "full_retrain":
            mode = "incremental" if decision.action == "incremental_update" else "full"
            kind, config = "update", update_config(decision.customization, mode)
    return targets.request(
        decision.customization,
        kind,
        decision.key,
        assets,
        partition_key=partition,
        run_config=config,
        tags={DECISION_TAG: decision.id, ACTION_TAG: decision.action},
    )


def update_config(name: str, mode: str) -> dict[str, object]:
    """Run config of `<name>__update`."""
    return {"ops": {f"{name}__adapter": {"config": {"mode": mode}}}}


def runs_of(instance: dg.DagsterInstance, decisions: Sequence[str]) -> dict[str, list[dg.RunRecord]]:
    """The runs of decisions, retries by Dagster included, newest first. One query."""
    found: dict[str, list[dg.RunRecord]] = {}
    if decisions:
        for record in instance.get_run_records(dg.RunsFilter(tags={DECISION_TAG: list(decisions)})):
            found.setdefault(record.dagster_run.tags[DECISION_TAG], []).append(record)
    return found


def running(
    instance: dg.DagsterInstance, customizations: Sequence[str], kind: str = "main"
) -> dict[str, str]:
    """{customization: run id} of the runs under way that make assets of `<name>__<kind>`, by whomever they
    were started. One query, and one more for each run that makes those of many."""
    if not customizations:
        return {}
    names, found = set(customizations), {}
    unfinished = [status for status in dg.DagsterRunStatus if status not in (*FINISHED, NOT_STARTED)]
    for record in instance.get_run_records(dg.RunsFilter(statuses=unfinished)):
        run = record.dagster_run
        if run.tags.get(CUSTOMIZATION_TAG, next(iter(names))) in names:
            found |= dict.fromkeys(unfinished_work(instance, run, kind) & names, run.run_id)
    return found


FINISHED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)


def settled(instance: dg.DagsterInstance, records: Sequence[dg.RunRecord]) -> dg.RunRecord | None:
    """The run that says how it ended; None while one of them goes on or Dagster is going to repeat it."""
    if any(record.dagster_run.status not in FINISHED for record in records):
        return None
    last = max(records, key=lambda record: record.create_timestamp)
    if last.dagster_run.status != dg.DagsterRunStatus.FAILURE or not instance.run_retries_enabled:
        return last
    repeats = last.dagster_run.tags.get(WILL_RETRY_TAG)
    if repeats == "true" and AUTO_RETRY_RUN_ID_TAG not in last.dagster_run.tags:
        return None
    age = datetime.datetime.now(datetime.UTC) - last.update_timestamp
    return None if repeats is None and age < UNSETTLED else last


def _close(
    book: DecisionBook,
    decision: Decision,
    record: dg.RunRecord,
    specs: Mapping[str, CustomizationSpec],
    settings: Settings,
    done: Dispatched,
) -> None:
    run, name = record.dagster_run, decision.customization
    history = book.get(decision.id)
    verdict = history.verdict if history else None
    impossible = next((s.detail for s in history.steps if s.step == "impossible"), None) if history else None
    then: Decision | None = None
    if run.status == dg.DagsterRunStatus.SUCCESS:
        step, detail = "succeeded", f"the gate says {verdict}" if verdict else ""
        if verdict == "reject" and name in specs:
            then = _escalate(book, decision, "the gate rejected its candidate", specs[name], settings)
    elif run.status == dg.DagsterRunStatus.CANCELED:
        step, detail = "canceled", "a person ended the run"
    elif impossible is not None:
        step, detail = "gave_up", impossible
        if name in specs:
            then = _escalate(book, decision, impossible, specs[name], settings)
    else:
        then = again(decision, f"run {run.run_id[:8]}")
        step, detail = ("failed", "") if then else ("gave_up", f"{decision.attempt} attempts failed")
    alerts = _blocked(then, settings)
    if step == "gave_up" and then is None:
        alerts.append(_alert(decision, "failed and is not tried again", detail, settings))
    book.finish(decision, step, detail, run.run_id, then, alerts)
    line = f"{name}: {decision.action} {step}" + (f", {detail}" if detail else "")
    done.lines.append(line + (f"; next: {then.action} ({then.status})" if then else ""))
    metadata: dict[str, dg.MetadataValue] = {
        "decision": dg.MetadataValue.text(decision.id),
        "action": dg.MetadataValue.text(decision.action),
        "run": dg.MetadataValue.dagster_run(run.run_id),
        "ended": dg.MetadataValue.text(f"{step} {detail}".strip()),
    }
    if then is not None:
        metadata["next"] = dg.MetadataValue.text(f"{then.action} ({then.status}): {then.reason}")
    done.events.append(
        dg.AssetObservation(dg.AssetKey([name, "decision"]), description=line, metadata=metadata)
    )


def _escalate(
    book: DecisionBook, decision: Decision, why: str, spec: CustomizationSpec, settings: Settings
) -> Decision | None:
    policy, month = Policy.of(spec, settings), now()[:7]
    notes = book.notes(spec.name).get(spec.name, {})
    rows = int(notes["dataset"].value["train_rows"]) if "dataset" in notes else 0
    costs = book.costs(spec.name)
    seconds = predict(costs, rows, 0, 0.0)["full_retrain"]
    money = predict(costs, rows, 0, 0.0, paid(policy.price))["full_retrain"]
    # the run has ended, so what it reserved is either spent or free again
    spent = book.spent(spec.name, month), book.spent(None, month)
    return escalated(decision, why, seconds, policy, *spent, money)


def _impossible(
    decision: Decision, specs: Mapping[str, CustomizationSpec], revisions: Collection[str]
) -> str | None:
    """Why a decision can't be carried out."""
    if decision.customization not in specs:
        return "the customization is not declared any more"
    if decision.base_revision is not None and decision.base_revision not in revisions:
        return f"base revision {decision.base_revision} is not a partition any more"
    return None


def _outdated(decision: Decision, release: Release | None, policy: Policy) -> str | None:
    """Why a decision that was not begun does not hold any more."""
    if decision.policy != policy.version:
        return "the policy changed; it is decided again"
    serves = release.adapter_digest if release else ""
    return f"adapter {serves[:12] or 'none'} serves since" if decision.adapter_digest != serves else None


def _scheduled_anew(
    book: DecisionBook, decision: Decision, release: Release | None, policy: Policy
) -> Decision | None:
    """The decision of a schedule, about what serves now. Nobody else makes it again before its next time,
    which may be a month away."""
    if release is None or not decision.evidence.startswith("schedule-"):
        return None
    name, month = decision.customization, now()[:7]
    anew = replace(
        decision,
        # what serves is a part of it, so that it is another decision
        evidence=f"{decision.evidence.partition('@')[0]}@{release.id}",
        adapter_digest=release.adapter_digest,
        base_revision=release.base_revision,
        policy=policy.version,
        at="",
    )
    return permitted(
        anew,
        policy,
        book.spent(name, month) + book.reserved(name, policy.price),
        book.spent(None, month) + book.reserved(None, policy.price),
    )


def _blocked(then: Decision | None, settings: Settings) -> list[Alert]:
    if then is None or then.status != "blocked_by_budget":
        return []
    return [_alert(then, "blocked by the budget", then.reason, settings)]


def _since(at: str) -> datetime.timedelta:
    return datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(at)


def _alert(decision: Decision, what: str, text: str, settings: Settings) -> Alert:
    return Alert(
        id=f"{what}:{decision.id}",
        title=f"{decision.customization}: {decision.action} {what}",
        text=f"{decision.diagnosis} {text}",
        severity="error" if what.startswith("failed") else "warning",
        customization=decision.customization,
        url=asset_url(settings.dagster_url, decision.customization, "decision"),
    )


def tick_result(
    context: dg.SensorEvaluationContext,
    requests: Sequence[dg.RunRequest],
    lines: Sequence[str],
    cursor: str | None = None,
    events: Sequence[dg.AssetObservation] = (),
) -> dg.SensorResult:
    """What a tick gives back: its runs, or why there are none."""
    text = "; ".join(lines)
    if requests:
        context.log.info(f"{len(requests)} runs requested. {text}")
    return dg.SensorResult(
        run_requests=list(requests),
        skip_reason=None if requests else dg.SkipReason(shorten(text) or "nothing to do"),
        cursor=cursor,
        asset_events=list(events),
    )


def shorten(text: str, length: int = 1000) -> str:
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def listing(names: Sequence[str], shown: int = 5) -> str:
    """`a, b and 17 more`."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
