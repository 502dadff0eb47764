"""Three ways to be behind, told from notes and ledger: the source has other rows, the dataset is past its
age, the endpoint lags behind its newest accepted adapter. Each leads to another action."""

import dataclasses
import datetime
from collections.abc import Mapping
from dataclasses import dataclass

from ml_assets.decisions.book import DecisionBook
from ml_assets.decisions.diagnosis import Policy, duration, permitted
from ml_assets.decisions.records import Action, Decision, Note, Rejected, Spent
from ml_assets.endpoints.ledger import Release
from ml_assets.spec import CustomizationSpec


@dataclass(frozen=True)
class Stale:
    """Something that is behind, and the action that brings it up to date."""

    action: Action
    evidence: str
    diagnosis: str
    reason: str
    base_revision: str | None
    waits: bool = False
    """For a person: it is written down, and nothing is started."""


def waits_for_a_person(spec: CustomizationSpec, revision: str, release: Release | None) -> bool:
    """Whether an accepted adapter of a base revision may only be released by a person's click: the endpoint
    would move to another base revision, and `migration.move` is `manual`."""
    return spec.migration.move == "manual" and release is not None and release.base_revision != revision


def note_candidate(book: DecisionBook, customization: str, facts: dict[str, str]) -> None:
    """Write down the newest evaluated adapter (`adapter`, `base_revision`, `dataset`, `source_version`,
    `verdict`), and the newest accepted one: it is that until it is evaluated again and not accepted."""
    book.note(customization, "candidate", facts)
    accepted = book.notes(customization)[customization].get("accepted")
    if facts["verdict"] == "promote":
        if accepted is None or accepted.value["adapter"] != facts["adapter"]:
            book.note(customization, "accepted", facts)
    elif accepted and accepted.value["adapter"] == facts["adapter"]:
        book.note(customization, "accepted", facts | {"adapter": ""})


def observe_due(spec: CustomizationSpec, notes: Mapping[str, Note], now: str) -> int | None:
    """The number of the interval in which the source is to be looked at now; None when that was done."""
    if spec.freshness.source is None:
        return None
    every = duration(spec.freshness.source)
    seen = notes.get("source")
    if seen is not None and _age(seen.at, now) < every:
        return None
    return int(datetime.datetime.fromisoformat(now).timestamp() // every.total_seconds())


def find_stale(
    spec: CustomizationSpec, notes: Mapping[str, Note], newest: Release | None, now: str
) -> list[Stale]:
    """What is behind, the most urgent first: what is accepted and does not serve, what the source has and no
    adapter was made of, what is too old. `newest` is the ledger's last row, also a withdrawal."""
    release = None if newest is None or newest.action == "withdraw" else newest
    found: list[Stale] = []
    source, dataset, candidate = (notes.get(name) for name in ("source", "dataset", "candidate"))
    accepted = notes.get("accepted")
    if accepted and accepted.value["adapter"]:
        adapter = str(accepted.value["adapter"])
        serves = release.adapter_digest if release else None
        waits = waits_for_a_person(spec, str(accepted.value["base_revision"]), release)
        # a move after the verdict was somebody's choice, such as a rollback or a withdrawal
        if adapter != serves and (newest is None or newest.at < accepted.at):
            found.append(
                Stale(
                    "release",
                    # again the next day, if it does not succeed before
                    f"accepted-{adapter[:12]}-{'by-hand' if waits else now[:10]}",
                    f"Adapter {adapter[:12]} was accepted at {accepted.at[:16]}, and "
                    f"{serves[:12] if serves else 'nothing'} serves.",
                    "the endpoint lags behind its newest accepted adapter",
                    str(accepted.value["base_revision"]),
                    waits,
                )
            )
    made_of = candidate or dataset
    if candidate and dataset and dataset.value["digest"] == candidate.value["dataset"]:
        made_of = dataset  # it knows the newest of the versions that have these same rows
    if release and source and made_of and source.value["version"] != made_of.value["source_version"]:
        version = str(source.value["version"])
        found.append(
            Stale(
                "refresh_source",
                # again when another adapter serves, and in a new month, which has a budget of its own
                f"source-{version[:12]}-{release.adapter_digest[:12]}-{now[:7]}",
                f"The source has other rows since {source.at[:16]} (version {version[:12]}) than the newest "
                f"adapter was made of ({str(made_of.value['source_version'])[:12]}).",
                "dataset, adapter, evaluation and endpoint are brought up to date; what did not change costs "
                "nothing",
                release.base_revision,
            )
        )
    limit = spec.freshness.dataset
    if limit and dataset and _age(dataset.at, now) >= duration(limit):
        found.append(
            Stale(
                "extend_dataset",
                f"age-{dataset.at[:19]}-{now[:10]}",
                f"The dataset is from {dataset.at[:16]}, older than {limit}.",
                "the dataset is built again, with what source and feedback hold now",
                None,
            )
        )
    return found


def to_decision(
    customization: str,
    stale: Stale,
    dataset_digest: str,
    release: Release | None,
    policy: Policy,
    device_seconds: float | None,
    spent: Spent,
    fleet_spent: Spent,
    paid: float | None = None,
) -> Decision:
    """The decision to bring something up to date. What it may cost at most (`device_seconds`, and `paid`,
    money beside the device) counts for the budget: whether anything changed is known only afterwards."""
    seconds = device_seconds if stale.action == "refresh_source" else 0.0
    decision = Decision(
        customization=customization,
        action=stale.action,
        status="to_do",
        diagnosis=stale.diagnosis,
        reason=stale.reason,
        evidence=stale.evidence,
        dataset_digest=dataset_digest,
        adapter_digest=release.adapter_digest if release else "",
        policy=policy.version,
        base_revision=stale.base_revision,
        device_seconds=seconds,
        cost=None if seconds is None else round(seconds * policy.price + (paid or 0.0), 4),
        currency=policy.currency,
        seen={"kind": "stale"},
        rejected=(Rejected("watch", "it does not become fresh by itself"),),
    )
    if stale.waits:
        reason = f"{stale.reason}; it waits for a person who materializes {customization}/endpoint"
        return dataclasses.replace(
            decision, status="record_only", reason=f"{reason} (migration.move is manual)"
        )
    return permitted(decision, policy, spent, fleet_spent)


def _age(at: str, now: str) -> datetime.timedelta:
    return datetime.datetime.fromisoformat(now) - datetime.datetime.fromisoformat(at)
