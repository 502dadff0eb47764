"""The partitions of everything that depends on a base model: one for each base revision."""

from collections.abc import Sequence

import dagster as dg
from sqlalchemy.exc import IntegrityError

BASE_MODELS = dg.DynamicPartitionsDefinition(name="base_models")
"""Keys `family@<12 hex>`, as `ml_assets.base_models.identity.revision_key` makes them."""


def add_revisions(instance: dg.DagsterInstance, revisions: Sequence[str]) -> None:
    """Make partitions of those revisions that are none yet, also while the sensor `base_updates` does so."""
    try:
        instance.add_dynamic_partitions(str(BASE_MODELS.name), revisions)
    except IntegrityError:  # Dagster looks and then inserts: another process came in between
        instance.add_dynamic_partitions(str(BASE_MODELS.name), revisions)
