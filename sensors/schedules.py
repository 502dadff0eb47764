"""Schedules of the customizations, from their YAML."""

from collections.abc import Mapping

import dagster as dg

from ml_assets.decisions.asset import asset_url
from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.diagnosis import Policy, paid, permitted, predict
from ml_assets.decisions.records import Alert, Decision, Rejected
from ml_assets.decisions.tags import CUSTOMIZATION_TAG
from ml_assets.endpoints.ledger import Ledger, Release, now
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec, ScheduleSpec
from resources.ledger import LedgerResource
from sensors.targets import Job


def build_schedules(spec: CustomizationSpec, jobs: Mapping[str, Job]) -> list[dg.ScheduleDefinition]:
    """The schedules of one customization; `jobs` are its own, by what is after `<name>__`.

    `observe` and `look` start at their time. `main` and `retrain` may train: they become decisions, which
    the sensors `stale_data` and `drift` start within the budget, when nothing else is at work on the
    customization.
    """
    return [_build(spec, index, block, jobs) for index, block in enumerate(spec.schedules)]


def _build(
    spec: CustomizationSpec, index: int, block: ScheduleSpec, jobs: Mapping[str, Job]
) -> dg.ScheduleDefinition:
    about = {
        "observe": "Looks whether the source has other rows.",
        "look": "Looks at the traffic: drift report and decision.",
        "main": "Brings the main job's assets up to date on the base revision that serves.",
        "retrain": "Trains from scratch on the base revision that serves.",
    }[block.run]
    name = f"{spec.name}__{block.run}__{index}"
    job = jobs[{"retrain": "update"}.get(block.run, block.run)]
    options = {
        "cron_schedule": block.cron,
        "execution_timezone": "UTC",
        "default_status": dg.DefaultScheduleStatus.RUNNING,
        "description": about,
    }
    if block.run in ("observe", "look"):
        return dg.ScheduleDefinition(name, job=job, tags={CUSTOMIZATION_TAG: spec.name}, **options)

    @dg.schedule(name=name, job=job, **options)
    def decide_at_its_time(context: dg.ScheduleEvaluationContext, ledger: LedgerResource) -> dg.SkipReason:
        at = context.scheduled_execution_time.strftime("%Y-%m-%dT%H:%M")
        with ledger.opened() as opened:
            release = opened.current(spec.name)
            if release is None:
                return dg.SkipReason(
                    f"{spec.name} serves nothing yet: run {spec.name}__main for a base revision"
                )
            made = scheduled(spec, block, at, release, opened)
            (made,) = DecisionBook(opened).record_all([made], _alerts(made))
        sensor = "stale_data" if made.action == "refresh_source" else "drift"
        then = f"the sensor {sensor} starts it" if made.status == "to_do" else "nothing is started"
        return dg.SkipReason(f"decided: {made.action} ({made.status}): {made.reason}; {then}")

    return decide_at_its_time


def _alerts(decision: Decision) -> list[Alert]:
    if decision.status != "blocked_by_budget":
        return []
    return [
        Alert(
            f"blocked_by_budget:{decision.id}",
            f"{decision.customization}: the {decision.action} of its schedule is blocked by the budget",
            f"{decision.diagnosis} {decision.reason}",
            customization=decision.customization,
            url=asset_url(Settings.from_env().dagster_url, decision.customization, "decision"),
        )
    ]


def scheduled(
    spec: CustomizationSpec, block: ScheduleSpec, at: str, release: Release, ledger: Ledger
) -> Decision:
    """The decision that a schedule makes at its time `at`."""
    settings, book, month = Settings.from_env(), DecisionBook(ledger), now()[:7]
    policy = Policy.of(spec, settings)
    dataset = book.notes(spec.name).get(spec.name, {}).get("dataset")
    rows = int(dataset.value["train_rows"]) if dataset else 0
    action = "refresh_source" if block.run == "main" else "full_retrain"
    costs = book.costs(spec.name)
    seconds = predict(costs, rows, 0, 0.0)[action]
    money = predict(costs, rows, 0, 0.0, paid(policy.price))[action] or 0.0
    decision = Decision(
        customization=spec.name,
        action=action,
        status="to_do",
        diagnosis=f"It is time: schedule `{block.cron}`, {block.run}.",
        reason="the YAML says so",
        evidence=f"schedule-{block.run}-{at}",
        dataset_digest=str(dataset.value["digest"]) if dataset else "",
        adapter_digest=release.adapter_digest,
        policy=policy.version,
        base_revision=release.base_revision,
        device_seconds=seconds,
        cost=None if seconds is None else round(seconds * policy.price + money, 4),
        currency=policy.currency,
        seen={"kind": "schedule"},
        rejected=(Rejected("watch", "the YAML asks for it at this time"),),
    )
    return permitted(
        decision,
        policy,
        book.spent(spec.name, month) + book.reserved(spec.name, policy.price),
        book.spent(None, month) + book.reserved(None, policy.price),
    )
