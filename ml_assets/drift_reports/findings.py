"""What a look at the traffic found: written by the drift report, read by its checks and by the decision."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Group = Literal["inputs", "outputs", "outcome"]
Severity = Literal["warn", "error"]


@dataclass(frozen=True)
class Signal:
    """One detector after one look.

    `e_value` is the evidence against 'nothing changed' (an alarm when it reaches `threshold`, at any time and
    after any number of looks), `p_value` a p-value that holds at any time, where the detector has one.
    `effect` is in the unit that `effect_unit` names, with `effect_interval` where it is known. `rows` are the
    requests that show it best: {"request": id, "prompt": ..., "answer": ..., "why": ...}.
    """

    name: str
    group: Group
    alarm: bool
    severity: Severity
    statistic: float
    e_value: float
    threshold: float
    description: str
    p_value: float | None = None
    effect: float | None = None
    effect_unit: str = ""
    effect_interval: tuple[float, float] | None = None
    alarmed_at: int | None = None
    """`seq` of the request at which it alarmed; stays until the reference changes."""
    rows: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """How good the champion is on the traffic. Accuracies are 0..1, None where nothing is known."""

    labelled: int
    """Requests with a right answer from users."""
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None
    estimated_accuracy: float | None
    """From calibrated confidence, over all requests; assumes that what an answer means did not change."""
    reference_accuracy: float | None
    """Of the champion, on the frozen evaluation rows."""
    value_per_1000: float | None
    reference_value_per_1000: float | None
    loss: float | None
    """Accuracy lost against the reference: `measured`, or estimated."""
    loss_interval: tuple[float, float] | None = None
    measured: bool = False
    """Whether there are enough right answers from users to measure the loss."""
    measured_on: int = 0
    """Right answers that `accuracy` and `value_per_1000` are of: the newest, and of no key more than its
    share."""
    usable: int | None = None
    """Right answers that a dataset would take by its share per key; None in reports that do not say it."""


@dataclass(frozen=True)
class Look:
    """One of the last looks, for hysteresis: it failed when an error-severity signal was in alarm."""

    to_seq: int
    at: str
    failed: bool
    signals: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DriftFindings:
    """`report.json` of a drift report artifact."""

    customization: str
    adapter_digest: str
    base_revision: str
    dataset_digest: str
    from_seq: int
    """First request of this reference; everything since then was looked at, each request once."""
    to_seq: int
    requests: int
    requests_per_day: float
    at: str
    signals: list[Signal]
    outcome: Outcome
    looks: list[Look]
    unlabelled: list[str] = field(default_factory=list)
    """Ids of the requests without a right answer that a label would say most about, best first."""
    feedback_seq: int = 0
    """The newest feedback that was looked at."""

    @property
    def evidence(self) -> str:
        """Names this look: equal for the same champion, dataset, request and feedback."""
        said = f"-f{self.feedback_seq}" if self.feedback_seq else ""
        return f"{self.adapter_digest[:12]}-{self.dataset_digest[:12]}-{self.to_seq}{said}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "DriftFindings":
        def pair(value: Any) -> tuple[float, float] | None:
            return None if value is None else (value[0], value[1])

        signals = [Signal(**s | {"effect_interval": pair(s["effect_interval"])}) for s in values["signals"]]
        outcome = values["outcome"]
        intervals = {name: pair(outcome[name]) for name in ("accuracy_interval", "loss_interval")}
        looks = [Look(**look) for look in values["looks"]]
        return cls(**values | {"signals": signals, "outcome": Outcome(**outcome | intervals), "looks": looks})
