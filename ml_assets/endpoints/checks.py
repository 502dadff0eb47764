"""The asset check of an endpoint: the accepted version is what answers."""

import json
from collections.abc import Mapping
from typing import Any

import dagster as dg

from ml_assets.adapters.fingerprint import tolerances
from ml_assets.endpoints.gateway.client import Probed
from ml_assets.endpoints.ledger import Release

NAME = "serves_champion"


def check_specs(asset: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    text = "The gateway answers with the released adapter, and that adapter with its own fingerprint."
    return [dg.AssetCheckSpec(NAME, asset=asset, description=text)]


def serving(
    asset: dg.AssetKey, release: Release, fingerprint: Mapping[str, Any], probed: Probed
) -> dg.AssetCheckResult:
    """The check passed: what was measured, beside what the adapter's manifest says."""
    rows = [
        {
            "question": probe["messages"][-1]["content"][:80],
            "answer": probe["answer"][:80],
            "expected": probe["with"],
            "measured": round(measured, 4),
            "bare base": round(bare, 4),
            "tolerance": round(tolerance, 4),
        }
        for probe, measured, bare, tolerance in zip(
            fingerprint["probes"],
            probed.with_adapter,
            probed.without,
            tolerances(fingerprint),
            strict=True,
        )
    ]
    return dg.AssetCheckResult(
        asset_key=asset,
        check_name=NAME,
        passed=True,
        description=f"Answered by adapter {release.adapter_digest[:12]} on {release.base_revision}.",
        metadata={
            "adapter": release.adapter_digest,
            "log-probabilities (nats per token)": dg.MetadataValue.table([dg.TableRecord(r) for r in rows]),
        },
    )


def not_serving(asset: dg.AssetKey, reason: str) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(asset_key=asset, check_name=NAME, passed=False, description=reason)


def curl(url: str, customization: str, fingerprint: Mapping[str, Any]) -> str:
    """A command to paste, with a question that the adapter was trained on."""
    question = fingerprint["probes"][0]["messages"][-1]
    body = json.dumps({"model": customization, "messages": [question]}, ensure_ascii=False)
    quoted = body.replace("'", "'\\''")
    return (
        f"curl {url}/v1/chat/completions \\\n"
        '  -H "Authorization: Bearer $EVERGREEN_API_KEY" \\\n'
        "  -H 'Content-Type: application/json' \\\n"
        f"  -d '{quoted}'"
    )
