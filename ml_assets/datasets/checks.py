"""Asset checks of a dataset. The blocking ones refuse it: it is not published, and the one before stays."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from ml_assets.spec import CustomizationSpec

MAJORITY = 0.9
"""Largest share of the training rows that one class may have without a warning."""

BLOCKING = {
    "no_leakage": "No training row is, nearly is, or belongs together with an evaluation row (measured again "
    "on the finished snapshot, by another method than the one that removed them).",
    "enough_rows": "Both sides have the rows that dataset.min_train_rows and dataset.min_evaluation_rows ask "
    "for.",
    "both_splits": "Neither side is empty.",
}
WARNING = {
    "class_balance": f"No class has more than {MAJORITY:.0%} of the training rows, and every class is on "
    "both sides (classification only).",
    "bad_rows": "Every row of the source could be used.",
    "conflicting_labels": "No input has several targets.",
    "feedback": "What users say is right contradicts neither the source nor other users, and no API key gave "
    "more than its share.",
}
SUSPICIOUS = (
    "feedback_conflict",
    "feedback_disagrees",
    "feedback_distrusted",
    "feedback_doubtful",
    "feedback_share",
)
"""Reasons why a right answer was left out that somebody should look at."""


def check_specs(asset: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    return [
        dg.AssetCheckSpec(name, asset=asset, description=text, blocking=name in BLOCKING)
        for name, text in (BLOCKING | WARNING).items()
    ]


def dataset_checks(
    asset: dg.AssetKey, spec: CustomizationSpec, record: Mapping[str, Any]
) -> list[dg.AssetCheckResult]:
    """Results of `check_specs` from the record of a build."""
    rows, measured, removed = record["rows"], record["measured"], record["removed"]
    needed = {"train": spec.dataset.min_train_rows, "evaluation": spec.dataset.min_evaluation_rows}
    empty = [side for side, number in rows.items() if not number]
    bad, conflicts = removed.get("bad_row", 0), measured["conflicting_inputs"]
    findings: dict[str, tuple[bool, str, dict[str, Any]]] = {
        "no_leakage": (
            not any(measured["leaks"].values()),
            "training rows that repeat evaluation rows: "
            + ", ".join(f"{number} {how}" for how, number in measured["leaks"].items()),
            measured["leaks"],
        ),
        "enough_rows": (
            all(rows[side] >= number for side, number in needed.items()),
            "; ".join(f"{rows[side]} {side} rows, {number} needed" for side, number in needed.items()),
            {},
        ),
        "both_splits": (
            not empty,
            f"no {' and no '.join(empty)} rows" if empty else "both sides have rows",
            {},
        ),
        "class_balance": _class_balance(measured.get("classes"), rows["train"]),
        "bad_rows": (not bad, f"{bad} rows of the source could not be used and were left out", {}),
        "conflicting_labels": (
            not conflicts,
            f"{conflicts} inputs have several targets; {removed.get('conflicting_label', 0)} rows were left "
            "out",
            {},
        ),
        "feedback": _feedback(record.get("feedback") or {}, removed),
    }
    return [
        dg.AssetCheckResult(
            asset_key=asset,
            check_name=name,
            passed=passed,
            severity=dg.AssetCheckSeverity.ERROR if name in BLOCKING else dg.AssetCheckSeverity.WARN,
            description=text,
            metadata=metadata,
        )
        for name, (passed, text, metadata) in findings.items()
    ]


def _feedback(said: Mapping[str, Any], removed: Mapping[str, int]) -> tuple[bool, str, dict[str, Any]]:
    suspicious = {reason: removed[reason] for reason in SUSPICIOUS if removed.get(reason)}
    if not said:
        return True, "no right answers from users", {}
    text = f"{said['given']} right answers from users, {sum(said['rows'].values())} in the rows"
    if suspicious:
        text += "; left out: " + ", ".join(f"{number} {reason}" for reason, number in suspicious.items())
    if liars := [key for key, state in said["keys"].items() if not state["believed"]]:
        text += f"; keys that are not believed: {', '.join(sorted(liars))}"
    table = [dg.TableRecord({"key": key, **state}) for key, state in sorted(said["keys"].items())]
    return not suspicious, text, {"keys": dg.MetadataValue.table(table)} if table else {}


def _class_balance(
    classes: Mapping[str, Mapping[str, int]] | None, train_rows: int
) -> tuple[bool, str, dict[str, Any]]:
    if not classes:
        return True, "not a classification", {}
    name = max(classes, key=lambda name: classes[name]["train"])
    share = classes[name]["train"] / max(1, train_rows)
    lonely = sorted(name for name, sides in classes.items() if not all(sides.values()))
    text = f"{len(classes)} classes; the largest, {name!r}, has {share:.0%} of the training rows"
    if lonely:
        text += f"; only on one side: {', '.join(map(repr, lonely[:10]))}"
    table = [dg.TableRecord({"class": name, **sides}) for name, sides in classes.items()]
    return share <= MAJORITY and not lonely, text, {"classes": dg.MetadataValue.table(table)}
