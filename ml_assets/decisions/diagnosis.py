"""From what was seen to what is done about it: the cheapest action that is sufficient, within the budget.

Everything here is a pure function of evidence and policy, so that a decision can be made again from what it
recorded. An action is not chosen without a reason, and every other one is rejected with one.
"""

import dataclasses
import datetime
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from ml_assets.artifacts import canonical_json, sha256_bytes
from ml_assets.decisions.book import History
from ml_assets.decisions.records import (
    MAX_ATTEMPTS,
    NO_LIMITS,
    NOTHING,
    TRAINING,
    Action,
    Cost,
    Decision,
    Limits,
    Rejected,
    Spent,
    Status,
)
from ml_assets.drift_reports.findings import DriftFindings
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec, MaintenanceSpec

CODE_VERSION = "3"
"""Raise when the same evidence and YAML lead to other decisions."""

LADDER: tuple[Action, ...] = (
    "watch",
    "extend_dataset",
    "incremental_update",
    "full_retrain",
    "ask_for_labels",
)
"""Cheapest first; people's time costs more than the device's."""

ASK_AGAIN_DAYS = 7
LONGEST_BACK_OFF = 5
"""The cooldown doubles with each failed run in a row, so many times."""

Kind = Literal["quiet", "unconfirmed", "drift", "acceptable", "loss", "unknown_loss"]


@dataclass(frozen=True)
class Policy:
    """What may be done, and what it may cost: the `maintenance` block and this deployment's limits."""

    maintenance: MaintenanceSpec
    margin: float
    """Loss of accuracy that the gate accepts, so nothing to repair."""
    value_of_right: float
    """Money between a right and a wrong answer."""
    currency: str
    uses_labels: bool
    price: float = 0.0
    """Money for a device second."""
    fleet: Limits = NO_LIMITS
    migration_mode: Literal["automatic", "record"] = "automatic"

    @classmethod
    def of(cls, spec: CustomizationSpec, settings: Settings) -> "Policy":
        value = spec.evaluation.value
        return cls(
            maintenance=spec.maintenance,
            margin=spec.evaluation.gate.margin,
            value_of_right=value.right - value.wrong,
            currency=value.currency,
            uses_labels=spec.feedback.use == "labels",
            price=settings.device_second_price,
            fleet=Limits(settings.fleet_device_seconds, settings.fleet_money),
            migration_mode=spec.migration.mode,
        )

    @property
    def own(self) -> Limits:
        return Limits(self.maintenance.device_seconds_per_month, self.maintenance.money_per_month)

    @functools.cached_property
    def version(self) -> str:
        """8 hex: another policy may decide otherwise on the same evidence."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"maintenance": self.maintenance.model_dump(), "fleet": dataclasses.asdict(self.fleet)}
        return sha256_bytes(canonical_json([CODE_VERSION, values]))[:8]


class Policies:
    """The policies of a fleet, by customization; made again when the deployment's settings change."""

    def __init__(self, specs: Sequence[CustomizationSpec]):
        self._specs = {spec.name: spec for spec in specs}
        self._settings: Settings | None = None
        self._made: dict[str, Policy] = {}

    def of(self, name: str, settings: Settings) -> Policy:
        if settings != self._settings:
            self._settings, self._made = settings, {}
        if name not in self._made:
            self._made[name] = Policy.of(self._specs[name], settings)
        return self._made[name]


@dataclass(frozen=True)
class Past:
    """An earlier decision about the customization, and how it ended."""

    action: Action
    state: str
    """As `History.state`."""
    adapter_digest: str
    at: str
    ended_at: str | None = None
    verdict: str | None = None
    """The gate's, about its candidate."""
    labelled: int = 0
    """Right answers from users that there were then."""
    asked: int = 0

    @classmethod
    def of(cls, history: History) -> "Past":
        decision, end = history.decision, history.end
        return cls(
            action=decision.action,
            state="open" if history.is_open else history.state,
            adapter_digest=decision.adapter_digest,
            at=decision.at,
            ended_at=end.at if end else None,
            verdict=history.verdict,
            labelled=int(decision.seen.get("labelled") or 0),
            asked=int(decision.seen.get("asked") or 0),
        )


@dataclass(frozen=True)
class Evidence:
    """All that a decision about drift rests on.

    `new_rows` are labelled rows that the champion was not trained on, `generation` counts the incremental
    updates since its last training from scratch, `past` is newest first, `predicted` holds device seconds of
    an action with its evaluation. The money and seconds spent include what is reserved for actions under way.
    """

    findings: DriftFindings
    dataset_digest: str
    train_rows: int
    new_rows: int
    now: str
    generation: int = 0
    past: tuple[Past, ...] = ()
    predicted: dict[str, float | None] = dataclasses.field(default_factory=dict)
    paid: dict[str, float | None] = dataclasses.field(default_factory=dict)
    """Money that an action pays to somebody else, as `predicted`."""
    serving: str | None = None
    """Digest of the adapter that serves; None where it is not known."""
    spent: Spent = NOTHING
    fleet_spent: Spent = NOTHING
    fleet_size: int = 1
    """Customizations that were looked at, this one included."""
    stands_out: bool = True
    """Whether its evidence counts among as many (e-BH): each has its own rate of false alarms, and those of a
    fleet add up."""


@dataclass(frozen=True)
class Diagnosis:
    """What the findings mean. `text` says it to the operator."""

    kind: Kind
    text: str


# -- what it means -------------------------------------------------------------------------------------


def diagnose(
    findings: DriftFindings, policy: Policy, fleet_size: int = 1, stands_out: bool = True
) -> Diagnosis:
    """Is something wrong, is it confirmed, and does it do harm?

    A look failed when the report says that harm was done. K of the last N looks and the newest must have
    failed, and the evidence must stand out among `fleet_size` customizations. Moved inputs or outputs alone
    are common and mostly harmless, so they are a warning.
    """
    alarms = [signal for signal in findings.signals if signal.alarm]
    errors = [signal for signal in alarms if signal.severity == "error"]
    names = ", ".join(signal.name for signal in [*errors, *(s for s in alarms if s not in errors)])
    if not alarms:
        return Diagnosis("quiet", f"No signal is in alarm after {findings.requests} requests.")
    newest_failed = bool(findings.looks) and findings.looks[-1].failed
    if not errors and not newest_failed:
        return Diagnosis("drift", f"The traffic has moved ({names}), and the answers are not worse for it.")
    rules = policy.maintenance
    window = findings.looks[-rules.of_looks :]
    failed = sum(look.failed for look in window)
    if failed < rules.failed_looks or not newest_failed:
        return Diagnosis(
            "unconfirmed",
            f"In alarm: {names}; {failed} of the last {len(window)} looks failed, {rules.failed_looks} of "
            f"{rules.of_looks} and the newest one confirm it.",
        )
    if not stands_out:
        return Diagnosis(
            "unconfirmed",
            f"In alarm: {names}; {failed} of the last {len(window)} looks failed. The evidence is not enough "
            f"yet to stand out among {fleet_size} customizations: of so many, some alarm by chance.",
        )
    outcome = findings.outcome
    if outcome.loss is None:
        return Diagnosis("unknown_loss", f"In alarm: {names}; what it costs can't be told without labels.")
    accuracy = outcome.accuracy if outcome.measured else outcome.estimated_accuracy
    how = "estimated from confidence"
    if outcome.measured:
        how = f"measured on {outcome.measured_on} right answers"
    interval = outcome.loss_interval
    between = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    text = f"In alarm: {names}. Accuracy {_share(accuracy)} ({how}), {_share(outcome.reference_accuracy)} "
    text += f"on the evaluation rows: a loss of {outcome.loss:.3f}{between}"
    if outcome.loss <= policy.margin:
        if any(signal.group == "outputs" for signal in errors):
            return Diagnosis("unknown_loss", f"{text}; but the answers themselves are worse.")
        return Diagnosis("acceptable", f"{text}, within the {policy.margin} that the gate accepts.")
    return Diagnosis("loss", f"{text}, more than the {policy.margin} that the gate accepts.")


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


# -- what is done about it -----------------------------------------------------------------------------


def decide(evidence: Evidence, policy: Policy) -> Decision:
    """The first action of the ladder that is sufficient and possible.

    Only a loss that is confirmed and larger than the gate's margin is repaired; when nothing can repair it,
    the decision is to watch, and says why.
    """
    found = diagnose(evidence.findings, policy, evidence.fleet_size, evidence.stands_out)
    verdicts: dict[Action, tuple[bool, str]] = {
        action: CHECKS[action](evidence, policy, found) for action in LADDER
    }
    sufficient: list[Action] = [action for action in LADDER if verdicts[action][0]]
    chosen: Action = sufficient[0] if sufficient else "watch"
    rejected = [
        Rejected(
            action,
            reason if not enough else f"not needed: {chosen} is enough, and cheaper",
            evidence.predicted.get(action),
        )
        for action, (enough, reason) in verdicts.items()
        if action != chosen
    ]
    reason = verdicts[chosen][1]
    if not sufficient:
        reason = f"{reason}, but nothing can repair it now: see why the others were not chosen"
    seconds = evidence.predicted.get(chosen) if chosen in TRAINING else 0.0
    findings, outcome = evidence.findings, evidence.findings.outcome
    decision = Decision(
        customization=findings.customization,
        action=chosen,
        status="no_action",
        diagnosis=found.text,
        reason=reason,
        evidence=f"look-{findings.evidence}",
        dataset_digest=evidence.dataset_digest,
        adapter_digest=findings.adapter_digest,
        policy=policy.version,
        base_revision=findings.base_revision,
        device_seconds=seconds,
        cost=None if seconds is None else _cost(evidence, policy, chosen),
        gain=_gain(evidence, policy, chosen),
        currency=policy.currency,
        seen={
            "kind": found.kind,
            "requests": findings.requests,
            "to_seq": findings.to_seq,
            "labelled": outcome.labelled,
            "new_rows": evidence.new_rows,
            "loss": outcome.loss,
            "generation": evidence.generation,
            "alarms": [signal.name for signal in findings.signals if signal.alarm],
            "asked": min(len(findings.unlabelled), policy.maintenance.ask_for_labels)
            if chosen == "ask_for_labels"
            else 0,
        },
        rejected=tuple(rejected),
    )
    return permitted(decision, policy, evidence.spent, evidence.fleet_spent)


def permitted(decision: Decision, policy: Policy, spent: Spent, fleet_spent: Spent) -> Decision:
    """The decision with its status: whether it is done, or would have been. `spent` includes reservations."""
    status: Status = "to_do"
    reason = decision.reason
    mode, field = policy.maintenance.mode, "maintenance"
    if decision.action == "migrate":
        mode, field = policy.migration_mode, "migration"
    if decision.action == "watch":
        status = "no_action"
    elif mode == "record":
        status, reason = "record_only", f"{reason} (would have: {field}.mode is record)"
    elif decision.action in TRAINING:
        seconds = decision.device_seconds or 0.0
        money = seconds * policy.price if decision.cost is None else decision.cost
        planned = Spent(seconds, money)
        for whose, limits, used in (
            ("of this customization", policy.own, spent),
            ("of the fleet", policy.fleet, fleet_spent),
        ):
            if exceeded := limits.exceeded_by(used, planned):
                status = "blocked_by_budget"
                reason = f"{reason} (would have: the budget {whose} is exhausted: {exceeded})"
                break
    left = {"budget_left": policy.own.left(spent), "fleet_budget_left": policy.fleet.left(fleet_spent)}
    return dataclasses.replace(decision, status=status, reason=reason, seen=decision.seen | left)


def escalated(
    decision: Decision,
    why: str,
    seconds: float | None,
    policy: Policy,
    spent: Spent,
    fleet_spent: Spent,
    paid: float | None = None,
) -> Decision | None:
    """What follows when an incremental update can't repair the loss (`why`): a retrain from scratch, on the
    same evidence. None for other actions and after too many attempts. `seconds` and `paid` (money beside the
    device) are predicted."""
    if decision.action != "incremental_update" or decision.attempt >= MAX_ATTEMPTS:
        return None
    before = Rejected("incremental_update", why, decision.device_seconds)
    others = tuple(one for one in decision.rejected if one.action != "full_retrain")
    followed = dataclasses.replace(
        decision,
        action="full_retrain",
        attempt=decision.attempt + 1,
        reason=f"the update of decision {decision.id} is not enough: {why}",
        device_seconds=seconds,
        cost=None if seconds is None else round(seconds * policy.price + (paid or 0.0), 4),
        rejected=(*others, before),
        at="",
    )
    return permitted(followed, policy, spent, fleet_spent)


def again(decision: Decision, failure: str) -> Decision | None:
    """The next attempt after a run that failed; None when there were enough."""
    if decision.attempt >= MAX_ATTEMPTS:
        return None
    reason = f"attempt {decision.attempt} failed ({failure}); {decision.reason}"
    return dataclasses.replace(decision, attempt=decision.attempt + 1, reason=reason, at="")


# -- why, and why not: (is it sufficient and possible, the reason) --------------------------------------

Check = Callable[[Evidence, Policy, Diagnosis], tuple[bool, str]]


def _watch(evidence: Evidence, policy: Policy, found: Diagnosis) -> tuple[bool, str]:
    # people who were asked hold nothing up; and a request that failed halfway stays open
    under_way = next((p for p in evidence.past if p.state == "open" and p.action != "ask_for_labels"), None)
    if under_way:
        return True, f"{under_way.action}, decided at {under_way.at[:16]}, is under way"
    about = evidence.findings.adapter_digest
    if evidence.serving not in (None, about):
        return True, f"the report is about adapter {about[:12]}, and {str(evidence.serving)[:12]} serves now"
    match found.kind:
        case "quiet":
            return True, "nothing is wrong"
        case "unconfirmed":
            return True, "one look can be chance"
        case "drift" | "acceptable":
            if _unused(evidence) >= policy.maintenance.min_new_rows and policy.uses_labels:
                return (
                    False,
                    "the evaluation rows do not show the new traffic, so a later loss might be missed",
                )
            return True, "no harm is done"
    until = _cooldown(evidence, policy)
    if until and until > evidence.now and evidence.new_rows >= policy.maintenance.min_new_rows:
        return True, f"the cooldown since the last training lasts until {until[:16]}"
    lost = _lost_per_month(evidence, policy)
    about = f"{lost:.2f} {policy.currency} a month" if lost else "an unknown amount"
    return False, f"the loss is confirmed, and waiting costs {about}"


def _extend(evidence: Evidence, policy: Policy, found: Diagnosis) -> tuple[bool, str]:
    rows, needed = _unused(evidence), policy.maintenance.min_new_rows
    if not policy.uses_labels:
        return False, "feedback.use is nothing: right answers do not join the dataset"
    if found.kind in ("quiet", "unconfirmed"):
        return False, "nothing has moved for sure"
    if found.kind in ("loss", "unknown_loss"):
        return False, "more rows alone do not make the champion answer better"
    if rows < needed:
        return False, f"{rows} labelled rows that the dataset lacks, {needed} are needed"
    if reason := _gave_up("extend_dataset", evidence, needed):
        return False, reason
    return True, f"{rows} labelled rows join the dataset, so that the evaluation shows the new traffic"


def _incremental(evidence: Evidence, policy: Policy, found: Diagnosis) -> tuple[bool, str]:
    if reason := _cannot_train("incremental_update", evidence, policy, found):
        return False, reason
    if evidence.generation >= policy.maintenance.full_after:
        return False, f"{evidence.generation} incremental updates in a row; it is time for a retrain"
    if any(
        past.verdict == "reject" and past.action == "incremental_update"
        for past in evidence.past
        if past.adapter_digest == evidence.findings.adapter_digest
    ):
        return False, "the gate rejected an incremental candidate against this champion"
    replay = f"{policy.maintenance.replay:.0%} of the old ones"
    return True, f"{evidence.new_rows} new labelled rows and {replay} are enough to learn what is new"


def _full(evidence: Evidence, policy: Policy, found: Diagnosis) -> tuple[bool, str]:
    if reason := _cannot_train("full_retrain", evidence, policy, found):
        return False, reason
    return True, f"a retrain on {evidence.train_rows + evidence.new_rows} rows learns old and new together"


def _ask(evidence: Evidence, policy: Policy, found: Diagnosis) -> tuple[bool, str]:
    if found.kind not in ("loss", "unknown_loss"):
        return False, "no loss that labels could explain or repair"
    if not evidence.findings.unlabelled:
        return False, "every request that would say something has a label"
    labelled = evidence.findings.outcome.labelled
    asked = [p for p in evidence.past if p.action == "ask_for_labels" and p.state == "succeeded"]
    last = next((past for past in asked if past.adapter_digest == evidence.findings.adapter_digest), None)
    if last and labelled - last.labelled < last.asked / 2:
        again_at = _after(last.at, datetime.timedelta(days=ASK_AGAIN_DAYS))
        if evidence.now < again_at:
            came = max(0, labelled - last.labelled)
            return False, f"{last.asked} were asked for at {last.at[:16]}, and {came} came since"
    number = min(len(evidence.findings.unlabelled), policy.maintenance.ask_for_labels)
    return True, f"{number} labels of the most informative requests would say what to learn"


CHECKS: dict[Action, Check] = {
    "watch": _watch,
    "extend_dataset": _extend,
    "incremental_update": _incremental,
    "full_retrain": _full,
    "ask_for_labels": _ask,
}


def _cannot_train(action: Action, evidence: Evidence, policy: Policy, found: Diagnosis) -> str | None:
    if found.kind != "loss":
        return "no confirmed loss to repair" if found.kind != "unknown_loss" else "the loss is not known"
    rows, needed = evidence.new_rows, policy.maintenance.min_new_rows
    if rows < needed:
        return f"{rows} new labelled rows, {needed} are needed"
    # a candidate that did not convince the gate will not do so again without more rows; where the gate asked
    # for rows, neither will any other
    for past in evidence.past:
        more = evidence.findings.outcome.labelled - past.labelled
        same = past.adapter_digest == evidence.findings.adapter_digest and more < needed
        if same and (past.verdict == "undecided" or (past.verdict == "reject" and past.action == action)):
            said = "rejected a candidate" if past.verdict == "reject" else "asked for more rows"
            return f"the gate {said} at {(past.ended_at or past.at)[:16]}, and {more} labels came since"
    if reason := _gave_up(action, evidence, needed):
        return reason
    gain = _gain(evidence, policy, action)
    if gain is not None and gain <= 0:
        return f"it costs more than it gains in a month ({gain:.2f} {policy.currency})"
    return None


def _gave_up(action: Action, evidence: Evidence, needed: int) -> str | None:
    """Why an action that failed for good is not tried again: fewer than `needed` labels came since."""
    for past in evidence.past:
        more = evidence.findings.outcome.labelled - past.labelled
        same = past.action == action and past.adapter_digest == evidence.findings.adapter_digest
        if same and past.state == "gave_up" and more < needed:
            return f"it failed for good at {(past.ended_at or past.at)[:16]}, and {more} labels came since"
    return None


def _unused(evidence: Evidence) -> int:
    """Right answers that came since an action last took them into the dataset, and that it would take."""
    taken = [
        past.labelled
        for past in evidence.past
        if past.state == "succeeded"
        and past.action in ("extend_dataset", *TRAINING)
        and past.adapter_digest == evidence.findings.adapter_digest
    ]
    outcome = evidence.findings.outcome
    new = outcome.labelled - max(taken, default=0)
    return new if outcome.usable is None else min(new, outcome.usable)


def _cooldown(evidence: Evidence, policy: Policy) -> str | None:
    return cooldown(evidence.past, policy)


def cooldown(past: Sequence[Past], policy: Policy) -> str | None:
    """When the next training may begin, after those in `past` (newest first); longer after runs that
    failed."""
    ended = ("succeeded", "failed", "canceled", "gave_up")
    trainings = [one for one in past if one.action in TRAINING and one.state in ended]
    if not trainings:
        return None
    failures = 0
    while failures < len(trainings) and trainings[failures].state in ("failed", "gave_up"):
        failures += 1
    factor = 2 ** min(failures, LONGEST_BACK_OFF)
    return _after(trainings[0].ended_at or trainings[0].at, duration(policy.maintenance.cooldown) * factor)


def _lost_per_month(evidence: Evidence, policy: Policy) -> float | None:
    """Money that the loss costs in a month, where it can be told."""
    findings, outcome = evidence.findings, evidence.findings.outcome
    requests = policy.maintenance.requests_per_month or findings.requests_per_day * 30
    worth, before = outcome.value_per_1000, outcome.reference_value_per_1000
    if outcome.measured and worth is not None and before is not None:
        per_request = (before - worth) / 1000
    elif outcome.loss is not None:
        per_request = outcome.loss * policy.value_of_right
    else:
        return None
    return max(0.0, per_request) * requests


def _gain(evidence: Evidence, policy: Policy, action: Action) -> float | None:
    """Money that a training gains in a month, after its cost."""
    lost = _lost_per_month(evidence, policy)
    if action not in TRAINING or lost is None:
        return None
    return round(lost - _cost(evidence, policy, action), 4)


def _cost(evidence: Evidence, policy: Policy, action: Action) -> float:
    """Money for a training with its evaluation, as far as it is known; other actions cost nothing."""
    if action not in TRAINING:
        return 0.0
    seconds, paid = evidence.predicted.get(action) or 0.0, evidence.paid.get(action) or 0.0
    return round(seconds * policy.price + paid, 4)


# -- predictions ---------------------------------------------------------------------------------------


def device_seconds(cost: Cost) -> float:
    return cost.device_seconds


def paid(price: float) -> Callable[[Cost], float]:
    """What a cost was beside the device, whose second costs `price`."""
    return lambda cost: max(0.0, cost.money - cost.device_seconds * price)


def predict(
    costs: Sequence[Cost],
    train_rows: int,
    new_rows: int,
    replay: float,
    of_cost: Callable[[Cost], float] = device_seconds,
) -> dict[str, float | None]:
    """Device seconds (or what `of_cost` says) of an action with its evaluation, from what the like of it cost
    before (newest first; the last ten, by row): {"incremental_update", "full_retrain", "refresh_source"};
    None without a past."""

    def per_row(*kinds: str) -> float | None:
        for kind in kinds:
            some = [of_cost(c) / c.rows for c in costs if c.kind == kind and c.rows > 0][:10]
            if some:
                return median(some)
        return None

    evaluations = [of_cost(c) for c in costs if c.kind == "evaluation" and c.rows > 0][:10]
    evaluation = median(evaluations) if evaluations else 0.0

    def of(cost_per_row: float | None, rows: float) -> float | None:
        return None if cost_per_row is None else round(cost_per_row * rows + evaluation, 3)

    full = of(per_row("training"), train_rows + new_rows)
    return {
        "incremental_update": of(per_row("incremental", "training"), new_rows + replay * train_rows),
        "full_retrain": full,
        "refresh_source": full,
    }


def duration(text: str) -> datetime.timedelta:
    """Of a text such as `90m`, `36h` or `7d`."""
    unit = {"m": "minutes", "h": "hours", "d": "days"}[text[-1]]
    return datetime.timedelta(**{unit: int(text[:-1])})


def _after(at: str, delay: datetime.timedelta) -> str:
    return (datetime.datetime.fromisoformat(at) + delay).isoformat(timespec="microseconds")


def summary(decision: Decision) -> dict[str, Any]:
    """The decision in a few words each, for tables and alerts."""
    return {
        "action": decision.action,
        "status": decision.status,
        "diagnosis": decision.diagnosis,
        "reason": decision.reason,
        "predicted device seconds": decision.device_seconds,
        f"predicted cost ({decision.currency})": decision.cost,
        f"predicted gain a month ({decision.currency})": decision.gain,
    }
