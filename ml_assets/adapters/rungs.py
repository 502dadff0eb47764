"""What climbing the port ladder says about each of its rungs: for the ledger, the reports and the plan."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ml_assets.spec import RungName

RungVerdict = Literal["promote", "reject", "undecided", "skipped", "not shown"]
"""The gate's word; `skipped`: it can't apply here; `not shown`: the validation rows said that looking at the
frozen rows would be a waste. `reason` says why."""


@dataclass(frozen=True)
class RungResult:
    """One rung that was tried, or why it was not.

    `start` names what it began from (`zero_shot`, `few_shot`, `copy`, `rescaled copy`,
    `layer copy`, `rescaled layer copy`, `mapped`, `tune`, `scratch`).
    `candidate`, `reference`, `bare`: mean of the deciding metric of the candidate, the champion on its own
    base, and the better of the new base's own arms, on the frozen rows. Seconds are those of the device;
    `screen_seconds` are those of `evaluation_seconds` that answered validation rows. `looks`: the looks at
    the frozen rows that the gate's error rate is divided among, 0 for a rung that had none; `look`: its own
    number among them. `rows_missing`: where the climb ended here undecided, because a higher rung would be no
    more certain, the evaluation rows that it would take.
    """

    rung: RungName
    start: str
    verdict: RungVerdict
    reason: str
    adapter_digest: str | None = None
    report_digest: str | None = None
    candidate: float | None = None
    reference: float | None = None
    bare: float | None = None
    negative_flips: int | None = None
    rows: int = 0
    steps: int = 0
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    screen_seconds: float = 0.0
    looks: int = 0
    look: int = 1
    rows_missing: int = 0


@dataclass(frozen=True)
class Climb:
    """How one customization was carried to a base revision.

    `climb` is the key (64 hex) of all that went in; the same inputs climb once. `full_seconds`: what a full
    training and its evaluation take, measured where it was done, else predicted from `full_from`.
    """

    climb: str
    customization: str
    base_revision: str
    champion_digest: str
    champion_base: str
    dataset_digest: str
    rungs: tuple[RungResult, ...]
    full_seconds: float | None = None
    full_from: str = ""
    run_id: str = ""
    at: str = ""

    @property
    def accepted(self) -> RungResult | None:
        """The rung at which the climb ended."""
        return next((rung for rung in self.rungs if rung.verdict == "promote"), None)

    @property
    def seconds(self) -> float:
        """Computing of all rungs and their evaluations."""
        return sum(rung.training_seconds + rung.evaluation_seconds for rung in self.rungs)

    @property
    def saved(self) -> float | None:
        """S = 1 - (all rungs and their evaluations) / (a full training and its evaluation)."""
        return None if not self.full_seconds else 1 - self.seconds / self.full_seconds

    def of(self, adapter_digest: str) -> RungResult | None:
        """The rung that gave an adapter."""
        return next((rung for rung in self.rungs if rung.adapter_digest == adapter_digest), None)

    def table(self) -> dict[str, Any]:
        """The climb as reports show it: without the run that happened to do it."""
        body = asdict(self) | {"seconds": self.seconds, "saved": self.saved}
        return {name: value for name, value in body.items() if name not in ("run_id", "at")}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "Climb":
        """The inverse of `dataclasses.asdict`."""
        fields: dict[str, Any] = {**body, "rungs": tuple(RungResult(**rung) for rung in body["rungs"])}
        return cls(**fields)
