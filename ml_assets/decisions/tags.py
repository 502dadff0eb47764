"""Run tags that tell what a run is for."""

import dagster as dg

from ml_assets.decisions.records import Cost, CostKind

DECISION_TAG = "evergreen/decision"
"""The id of the decision that started the run."""
CUSTOMIZATION_TAG = "evergreen/customization"
ACTION_TAG = "evergreen/action"
MIGRATION_TAG = "evergreen/migration"
"""The backfill that carries customizations to a base revision, and its runs."""
REVISION_TAG = "evergreen/base_revision"


def run_cost(run: dg.DagsterRun, customization: str, kind: CostKind, partition: str) -> Cost:
    """The cost of one asset partition in a run, before it is known: for `ml_assets.decisions.meter`."""
    return Cost(
        customization=customization,
        kind=kind,
        partition=partition,
        run_id=run.run_id,
        device_seconds=0.0,
        rows=0,
        decision_id=run.tags.get(DECISION_TAG),
    )
