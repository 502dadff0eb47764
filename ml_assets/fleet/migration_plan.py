"""Which customizations are carried to a new base revision, in which order, and what it is predicted to cost.

A plan is the decisions (action `migrate`) about one base revision. It is made from the book, the ledger and
the newest reports; what does not fit the budget, and what a person wants to launch, is in it as well.
"""

import dataclasses
import datetime
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ml_assets.adapters.rungs import Climb
from ml_assets.decisions.book import DecisionBook, History
from ml_assets.decisions.diagnosis import Policies, Policy, permitted, predict
from ml_assets.decisions.records import NOTHING, Decision, Note, Rejected, Spent
from ml_assets.endpoints.ledger import Release
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec

CLIMBS = 10
"""The newest climbs, from which a port is predicted."""


@dataclass(frozen=True)
class Stake:
    """What a customization is worth: `per_1000` requests, the value of what serves above that of the bare
    base, and `requests` in a month. None where it is not known."""

    per_1000: float | None = None
    requests: float | None = None

    @property
    def per_month(self) -> float | None:
        """Money a month that is at stake when it can't be carried over."""
        if self.per_1000 is None or self.requests is None:
            return None
        return round(max(0.0, self.per_1000) * self.requests / 1000, 4)

    @property
    def order(self) -> tuple[float, float]:
        """Sorts the most valuable first."""
        return -(self.per_month or 0.0), -(self.per_1000 or 0.0)


def plan_migration(
    revision: str,
    specs: Collection[CustomizationSpec],
    book: DecisionBook,
    serving: Mapping[str, Release],
    last_in_family: Mapping[str, str],
    policies: Policies,
    settings: Settings,
    month: str,
    stake_of: Callable[[CustomizationSpec], Stake],
) -> list[Decision]:
    """The decisions that are to be made about a base revision, most valuable customization first; not yet
    recorded. Empty when everything was decided.

    Left out: what does not follow the family, was never evaluated, or is on the revision already; what was on
    it when it left the family (`last_in_family`: the revision of the family that each served on last), so
    that it is not carried back; what was decided before, unless a budget was exhausted in an earlier month,
    the policy changed since, or the decision was overtaken by another revision that is gone again.
    """
    notes, past, family = book.notes(), book.migrations(revision), revision.rpartition("@")[0]
    void = _void(past, book.moved_away(revision))
    drafts = {
        spec.name: _draft(
            revision,
            spec,
            notes[spec.name],
            f"{month}-{len(void[spec.name])}" if spec.name in void else month,
            policies.of(spec.name, settings),
            release,
        )
        for spec in specs
        if family in spec.base_models
        and last_in_family.get(spec.name) != revision
        and to_carry(revision, notes.get(spec.name, {}), release := serving.get(spec.name))
        and not _was_started(spec.name, past, void.get(spec.name, set()))
    }
    known = {history.decision.id for history in past}
    stakes = {s.name: stake_of(s) for s in specs if s.name in drafts and drafts[s.name].id not in known}
    due = sorted((s for s in specs if s.name in stakes), key=lambda s: (*stakes[s.name].order, s.name))
    if not due:
        return []
    price, climbs, made = settings.device_second_price, book.climbs(), []
    costs, taken = book.costs_by(), book.spent_by(month)
    for name, more in book.reserved_by(price).items():
        taken[name] = taken.get(name, NOTHING) + more
    fleet = sum(taken.values(), NOTHING)
    for spec in due:
        policy = policies.of(spec.name, settings)
        stake = stakes[spec.name]
        dataset = notes[spec.name].get("dataset")
        rows = int(dataset.value["train_rows"]) if dataset else 0
        full = predict(costs.get(spec.name, []), rows, 0, 0.0)["full_retrain"]
        seconds, predicted_from = predict_port(full, spec.name, climbs)
        decision = dataclasses.replace(
            draft := drafts[spec.name],
            device_seconds=seconds,
            cost=None if seconds is None else round(seconds * price, 4),
            seen=draft.seen
            | {
                "full_seconds": full,
                "predicted_from": predicted_from,
                "value_per_1000": stake.per_1000,
                "requests_per_month": stake.requests,
                "value_at_stake": stake.per_month,
            },
        )
        decision = permitted(decision, policy, taken.get(spec.name, NOTHING), fleet)
        if decision.status == "to_do":
            fleet += Spent(seconds or 0.0, (seconds or 0.0) * price)
        made.append(decision)
    return made


def value_per_1000(summary: Mapping[str, Any]) -> float | None:
    """What an adapter is worth above the better of the bare base's arms, per 1,000 requests; from the
    summary.json of its report. None where values were not measured."""
    values = {arm: entry["value"]["mean"] for arm, entry in summary["arms"].items() if entry["value"]}
    bare = [values[arm] for arm in ("zero_shot", "few_shot") if arm in values]
    return None if "adapter" not in values or not bare else round(values["adapter"] - max(bare), 4)


def requests_per_month(times: Sequence[str], now: str) -> float | None:
    """Requests in 30 days, at the rate of the newest ones (UTC in ISO 8601, oldest first)."""
    if not times:
        return None
    age = datetime.datetime.fromisoformat(now) - datetime.datetime.fromisoformat(times[0])
    days = max(age.total_seconds() / 86400, 1.0)  # an hour of requests is not a month of them
    return round(len(times) / days * 30, 1)


def to_carry(revision: str, notes: Mapping[str, Note], release: Release | None) -> bool:
    """Whether a customization has something to carry to the revision, and is not there yet."""
    candidate = notes.get("candidate")
    if candidate is None:
        return False
    if release is None:
        return candidate.value["base_revision"] != revision
    return release.base_revision != revision


def _void(past: Sequence[History], moved_away: Mapping[str, str]) -> dict[str, set[str]]:
    """{customization: ids of the decisions about a revision that hold no more}: dropped before they began, or
    from before the customization moved away to another revision of the family."""
    void: dict[str, set[str]] = {}
    for history in past:
        decision, end = history.decision, history.end
        moved = decision.at < moved_away.get(decision.customization, "")
        if end is not None and (end.step == "dropped" or moved):
            void.setdefault(decision.customization, set()).add(decision.id)
    return void


def _was_started(name: str, past: Sequence[History], void: Collection[str]) -> bool:
    """Whether a decision about it that still holds was, or is going to be, carried out."""
    return any(
        history.decision.customization == name
        and history.decision.status == "to_do"
        and history.decision.id not in void
        and (history.end is None or history.end.step != "blocked_by_budget")
        for history in past
    )


def _draft(
    revision: str,
    spec: CustomizationSpec,
    notes: Mapping[str, Note],
    when: str,
    policy: Policy,
    release: Release | None,
) -> Decision:
    dataset = notes.get("dataset")
    before = release.base_revision if release else notes["candidate"].value["base_revision"]
    return Decision(
        customization=spec.name,
        action="migrate",
        status="to_do",
        diagnosis=f"Base revision {revision} is new; the newest adapter is on {before}.",
        reason="it is carried over by the cheapest rung of the port ladder that the gate accepts",
        # a budget that is exhausted is another one next month
        evidence=f"base-{revision}-{when}",
        dataset_digest=str(dataset.value["digest"]) if dataset else "",
        adapter_digest=release.adapter_digest if release else "",
        policy=policy.version,
        base_revision=revision,
        currency=policy.currency,
        seen={"kind": "migration", "from": before},
        rejected=(Rejected("watch", f"it would stay on {before}"),),
    )


def predict_port(full: float | None, customization: str, climbs: Sequence[Climb]) -> tuple[float | None, str]:
    """(device seconds of carrying a customization over, evaluations included; what that is predicted from).
    `full`: a full training and its evaluation. The median share of it that climbs took: of the customization
    itself, else of the fleet; without any, all of it."""
    own = [climb for climb in climbs if climb.customization == customization]
    for some, whose in ((own, "its own"), (list(climbs), "the fleet's")):
        shares = [climb.seconds / climb.full_seconds for climb in some if climb.full_seconds][-CLIMBS:]
        if shares and full is not None:
            return round(full * median(shares), 3), f"{whose} last {len(shares)} climbs"
    return full, "a full training" if full is not None else "nothing"


def plan_row(decision: Decision, state: str) -> dict[str, str | float]:
    """A line of the plan."""

    def known(value: float | None) -> str | float:
        return "unknown" if value is None else value

    return {
        "customization": decision.customization,
        "from": str(decision.seen.get("from", "")),
        "to": str(decision.base_revision),
        "state": state,
        "predicted device seconds": known(decision.device_seconds),
        "predicted from": str(decision.seen.get("predicted_from", "")),
        "value at stake a month": known(decision.seen.get("value_at_stake")),
        "currency": decision.currency,
        "reason": decision.reason,
    }


def predicted_seconds(decisions: Sequence[Decision]) -> float:
    """Device seconds of what is going to be started."""
    return round(sum(d.device_seconds or 0.0 for d in decisions if d.status == "to_do"), 3)


def by_value(histories: Sequence[Decision]) -> list[Decision]:
    """The decisions in the order in which they are carried out."""

    def order(decision: Decision) -> tuple[float, float, str]:
        stake = Stake(decision.seen.get("value_per_1000"), decision.seen.get("requests_per_month"))
        return (*stake.order, decision.customization)

    return sorted(histories, key=order)


def carried_out_in_order(book: DecisionBook, revision: str, names: Collection[str]) -> list[str]:
    """The customizations by the value at stake in the newest decisions about the revision; those about which
    there is none come last, by name."""
    newest: dict[str, Decision] = {}
    for history in book.migrations(revision):
        newest.setdefault(history.decision.customization, history.decision)
    planned = [d.customization for d in by_value(list(newest.values())) if d.customization in names]
    return [*planned, *sorted(set(names) - set(planned))]
