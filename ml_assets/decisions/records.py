"""A decision about one customization, as it is stored and shown."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ml_assets.artifacts import sha256_bytes

Action = Literal[
    "watch",
    "extend_dataset",
    "incremental_update",
    "full_retrain",
    "ask_for_labels",
    "refresh_source",
    "release",
    "migrate",
]
TRAINING: tuple[Action, ...] = ("incremental_update", "full_retrain", "refresh_source", "migrate")
"""Actions that may compute on the device; the budget and the cooldown are about them."""

Status = Literal["no_action", "to_do", "record_only", "blocked_by_budget"]
"""`record_only` and `blocked_by_budget` are 'would have': the action is named, and nothing is started."""

Step = Literal[
    "started",
    "judged",
    "impossible",
    "succeeded",
    "failed",
    "canceled",
    "dropped",
    "blocked_by_budget",
    "gave_up",
]
FINAL: tuple[Step, ...] = ("succeeded", "failed", "canceled", "dropped", "blocked_by_budget", "gave_up")
"""After one of these steps nothing more happens to a decision."""

MAX_ATTEMPTS = 3
"""Runs for the same evidence, dataset and policy, before a person has to look."""


@dataclass(frozen=True)
class Rejected:
    """An action that was not chosen."""

    action: Action
    reason: str
    device_seconds: float | None = None
    """What it would have cost, where that is known."""


@dataclass(frozen=True)
class Decision:
    """What was seen, what it means, what is to be done about it, and why nothing else.

    `device_seconds` and `cost` (money) are predicted, `gain` is money a month after that cost; None where
    there is nothing to predict from. `seen` holds the figures that it rests on. `at` is UTC in ISO 8601, set
    by the book.
    """

    customization: str
    action: Action
    status: Status
    diagnosis: str
    reason: str
    evidence: str
    dataset_digest: str
    adapter_digest: str
    """The champion that it is about."""
    policy: str
    """Version of the policy that decided."""
    base_revision: str | None = None
    attempt: int = 1
    device_seconds: float | None = None
    cost: float | None = None
    gain: float | None = None
    currency: str = ""
    seen: dict[str, Any] = field(default_factory=dict)
    rejected: tuple[Rejected, ...] = ()
    at: str = ""

    @property
    def key(self) -> str:
        """The run key: what was seen, not what was chosen, so that the same evidence is acted on once."""
        parts = (self.customization, self.evidence, self.dataset_digest[:12], self.policy, str(self.attempt))
        return ":".join(parts)

    @property
    def id(self) -> str:
        """16 hex."""
        return sha256_bytes(self.key.encode())[:16]


@dataclass(frozen=True)
class Spent:
    """What maintenance cost: computing (seconds) and its price when it was spent."""

    device_seconds: float = 0.0
    money: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.device_seconds + other.device_seconds, self.money + other.money)


@dataclass(frozen=True)
class Limits:
    """Most that may be spent in a calendar month (UTC); None: no limit."""

    device_seconds: float | None = None
    money: float | None = None

    def exceeded_by(self, spent: Spent, planned: Spent) -> str | None:
        """What does not fit any more, or None. A plan of zero (nothing to predict from) needs something to be
        left."""
        for name, unit in (("device_seconds", "device seconds"), ("money", "money")):
            limit, used, more = getattr(self, name), getattr(spent, name), getattr(planned, name)
            if limit is not None and (used + more > limit or used >= limit):
                return f"{more:.4g} {unit} more than the {used:.4g} of this month exceed {limit:.4g}"
        return None

    def left(self, spent: Spent) -> dict[str, float | None]:
        """What is left of each limit."""
        return {
            name: None if limit is None else max(0.0, round(limit - used, 4))
            for name, limit, used in (
                ("device_seconds", self.device_seconds, spent.device_seconds),
                ("money", self.money, spent.money),
            )
        }


NOTHING, NO_LIMITS = Spent(), Limits()


CostKind = Literal["training", "incremental", "port", "evaluation", "look"]


@dataclass(frozen=True)
class Cost:
    """Computing for one asset partition in one run. `rows`: rows trained on, or evaluated."""

    customization: str
    kind: CostKind
    partition: str
    run_id: str
    device_seconds: float
    rows: int
    money: float = 0.0
    decision_id: str | None = None
    at: str = ""


@dataclass(frozen=True)
class Claim:
    """The right to act on a customization, held by one decision until its run has ended."""

    customization: str
    decision: Decision
    at: str


@dataclass(frozen=True)
class StepRow:
    """Something that happened to a decision after it was made."""

    decision_id: str
    step: Step
    detail: str
    run_id: str
    at: str


@dataclass(frozen=True)
class Note:
    """The newest fact about a customization that an asset wrote down."""

    value: dict[str, Any]
    at: str


@dataclass(frozen=True)
class Alert:
    """A message to people; `id` makes it one message, however often it is raised."""

    id: str
    title: str
    text: str
    severity: Literal["info", "warning", "error"] = "warning"
    customization: str | None = None
    url: str | None = None
    at: str = ""
