"""Asset checks of an adapter. (One that changes nothing is refused before it is published.)"""

from collections.abc import Sequence

import dagster as dg

from ml_assets.base_models.partitions import BASE_MODELS

LEARNED_SHARE = 0.8
"""The last tenth of the steps must have at most this share of the first tenth's loss."""


def check_specs(asset: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    return [
        dg.AssetCheckSpec(
            "learned",
            asset=asset,
            partitions_def=BASE_MODELS,
            description="The loss fell during training.",
        ),
    ]


def adapter_checks(
    asset: dg.AssetKey, losses: Sequence[float], rung: str = "full_training"
) -> list[dg.AssetCheckResult]:
    """Results of `check_specs` from the losses (nats per target token, by step; none without weights). What
    came from another base knew the job before its first step: the gate judges it."""
    if rung in ("copy", "tune", "distil"):
        return [
            dg.AssetCheckResult(
                asset_key=asset,
                check_name="learned",
                passed=True,
                description=f"carried over from another base ({rung}); the eval report says how well",
            )
        ]
    if not losses:
        return [
            dg.AssetCheckResult(
                asset_key=asset,
                check_name="learned",
                passed=True,
                description="nothing to learn: a prompt",
            )
        ]
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return [
        dg.AssetCheckResult(
            asset_key=asset,
            check_name="learned",
            passed=last <= LEARNED_SHARE * first,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"loss fell from {first:.3f} to {last:.3f} nats per target token",
            metadata={"first": first, "last": last},
        ),
    ]
