"""The partitions of everything that depends on a base model: one for each base revision."""

import dagster as dg

BASE_MODELS = dg.DynamicPartitionsDefinition(name="base_models")
"""Keys `family@<12 hex>`, as `ml_assets.base_models.identity.revision_key` makes them."""
