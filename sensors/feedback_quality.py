"""Notices feedback that is not what it used to be, and tells people."""

import json
from collections.abc import Sequence

import dagster as dg

from ml_assets.decisions.asset import asset_url
from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.diagnosis import Policy
from ml_assets.decisions.feedback_quality import Finding, examine
from ml_assets.decisions.records import Alert, Decision, Rejected
from ml_assets.endpoints.ledger import Release
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from resources.ledger import LedgerResource
from resources.traffic_log import TrafficLogResource
from sensors.dispatch import listing, tick_result

PER_TICK = 20
"""Customizations whose feedback one tick reads."""
WINDOW = 100
"""New feedback of a customization between two examinations."""


def build_feedback_quality_sensor(
    specs: Sequence[CustomizationSpec], window: int = WINDOW
) -> dg.SensorDefinition:
    """The sensor over all customizations. It reads the feedback only of those with enough that is new."""
    by_name = {spec.name: spec for spec in specs}

    @dg.sensor(
        name="feedback_quality",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Tells people when one key gives most of the feedback, when right answers contradict "
        "one another, when one key disagrees with everything, or when feedback comes in a flood. What one "
        "key may give to training is capped by `feedback.max_share_per_key` in any case.",
    )
    def feedback_quality(
        context: dg.SensorEvaluationContext, ledger: LedgerResource, traffic_log: TrafficLogResource
    ) -> dg.SensorResult:
        examined: dict[str, int] = json.loads(context.cursor or "{}")
        lines = []
        with traffic_log.opened() as log, ledger.opened() as opened:
            book, serving, settings = DecisionBook(opened), opened.current_all(), Settings.from_env()
            last = {name: head.last_feedback_seq for name, head in log.heads().items() if name in by_name}
            since = {name: examined.get(name, 0) for name in last if last[name] > examined.get(name, 0)}
            new = log.count_feedback(since)
            # the most first: those that never reach a window must not keep the others waiting
            due = sorted((n for n in new if new[n] >= window), key=lambda n: -new[n])
            for name in due[:PER_TICK]:
                judged = log.feedback(name)
                fresh = sum((one.feedback.seq or 0) > since[name] for one in judged)
                # all that is new, so that a flood is not compared with itself; at first, all is new
                findings = examine(judged, fresh if since[name] else window)
                # what was raised is in the book before the cursor moves on, and there only once
                if findings:
                    newest = judged[-1].feedback.seq or 0
                    decision = suspicion(by_name[name], serving.get(name), findings, newest, settings)
                    book.alert(_alert(book.record(decision), settings))
                    lines.append(f"{name}: {decision.diagnosis}")
                else:
                    lines.append(f"{name}: {fresh} pieces of feedback, nothing unusual")
                examined[name] = last[name]
        if len(due) > PER_TICK:
            lines.append(f"{len(due) - PER_TICK} are left to the next tick")
        if few := [f"{name} ({count} of {window})" for name, count in new.items() if count < window]:
            lines.append(f"too little new feedback to judge: {listing(few)}")
        if not lines:
            lines.append("no new feedback")
        return tick_result(context, [], lines, json.dumps(examined))

    return feedback_quality


def suspicion(
    spec: CustomizationSpec,
    release: Release | None,
    findings: Sequence[Finding],
    last_seq: int,
    settings: Settings,
) -> Decision:
    """The decision to watch feedback that is not what it used to be."""
    policy = Policy.of(spec, settings)
    return Decision(
        customization=spec.name,
        action="watch",
        status="no_action",
        diagnosis=f"Unusual feedback: {'; '.join(finding.text for finding in findings)}.",
        reason="a person should look; what one key may give to training is capped, and contradictions are "
        "left out",
        evidence=f"feedback-{last_seq}",
        dataset_digest="",
        adapter_digest=release.adapter_digest if release else "",
        policy=policy.version,
        currency=policy.currency,
        device_seconds=0.0,
        seen={
            "kind": "feedback",
            "findings": [finding.kind for finding in findings],
            "keys": sorted({finding.key_id for finding in findings if finding.key_id}),
        },
        rejected=(Rejected("extend_dataset", "this feedback may not be right"),),
    )


def _alert(decision: Decision, settings: Settings) -> Alert:
    return Alert(
        id=f"feedback:{decision.id}",
        title=f"{decision.customization}: unusual feedback",
        text=f"{decision.diagnosis} Revoke a key with `evergreen keys revoke` if it is misused.",
        customization=decision.customization,
        url=asset_url(settings.dagster_url, decision.customization, "decision"),
    )
