"""Right answers of users as rows of the dataset's columns."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ml_assets.artifacts import canonical_json, sha256_bytes
from ml_assets.datasets.admission import Said
from ml_assets.datasets.snapshot import normalize, same_target
from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.records import Judged
from ml_assets.traffic.rows import row_of


@dataclass(frozen=True)
class FeedbackRows:
    """What users said was right. `unusable` are texts of right answers (or of conversations) that do not have
    the form of the prompt; `version` names all of it, and is "" when there is nothing."""

    said: list[Said] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    version: str = ""


def feedback_rows(spec: CustomizationSpec, judged: Sequence[Judged]) -> FeedbackRows:
    """The right answers among `judged` as rows; none where `feedback.use` is `nothing`. A rating says nothing
    about what would have been right, so it makes no row."""
    said: list[Said] = []
    unusable: list[str] = []
    used = judged if spec.feedback.use == "labels" else ()
    for one in sorted(used, key=lambda one: one.feedback.seq or 0):
        right, request = one.feedback.right_answer, one.request
        if right is None:
            continue
        row = row_of(spec, request, right)
        if row is None:
            asked = " / ".join(message["content"] for message in request.messages)
            unusable.append(f"{asked} → {right}")
            continue
        cluster = spec.evaluation.cluster
        if cluster and not row[cluster]:  # not known: a cluster of its own, or all of them would be one
            row[cluster] = f"request {request.id}"
        origin = "champion" if same_answer(right, request.answer, spec.evaluation.task) else "feedback"
        said.append(Said(row, one.feedback.key_id, one.feedback.seq or 0, origin))
    if not said and not unusable:
        return FeedbackRows()
    content = [[one.row, one.key_id, one.seq, one.origin] for one in said]
    return FeedbackRows(said, unusable, sha256_bytes(canonical_json([content, unusable])))


def same_answer(one: str, other: str, task: str = "text") -> bool:
    """Whether two answers say the same: as text, as JSON, or to the scores of the task."""
    return normalize(one) == normalize(other) or any(
        same_target(how, one) == same_target(how, other) for how in ("json", task)
    )
