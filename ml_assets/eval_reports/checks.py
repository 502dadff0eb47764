"""Asset checks of an eval report: the gate's verdict, and the must-pass rows. They don't block: the endpoint
decides from the stored decision."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.eval_reports.report import headline


def check_specs(asset: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    texts = {
        "gate": "The candidate is shown to be good enough to serve.",
        "must_pass": "The candidate answers every must-pass row right.",
    }
    return [
        dg.AssetCheckSpec(name, asset=asset, description=text, partitions_def=BASE_MODELS)
        for name, text in texts.items()
    ]


def check_results(asset: dg.AssetKey, decision: Mapping[str, Any]) -> list[dg.AssetCheckResult]:
    """Results of `check_specs` from a decision.json."""
    verdict, must_pass = decision["verdict"], decision["must_pass"]
    metadata: dict[str, Any] = {
        "verdict": verdict,
        "reference": decision["reference"],
        "reasons": dg.MetadataValue.md("\n".join(f"- {reason}" for reason in decision["reasons"])),
    }
    if decision["needs_rows"] is not None:
        metadata |= {"needs_rows": decision["needs_rows"], "more_rows": decision["more_rows"]}
    wrong, count = len(must_pass["wrong"]), must_pass["rows"]
    return [
        dg.AssetCheckResult(
            asset_key=asset,
            check_name="gate",
            passed=verdict == "promote",
            severity=dg.AssetCheckSeverity.ERROR if verdict == "reject" else dg.AssetCheckSeverity.WARN,
            description=" ".join([headline(decision), *decision["reasons"]]),
            metadata=metadata,
        ),
        dg.AssetCheckResult(
            asset_key=asset,
            check_name="must_pass",
            passed=not wrong,
            severity=dg.AssetCheckSeverity.ERROR,
            description=f"{wrong} of {count} must-pass rows are wrong"
            if count
            else "no must-pass rows are declared",
            metadata={"rows": count, "wrong": wrong, "wrong_rows": must_pass["wrong"]},
        ),
    ]
