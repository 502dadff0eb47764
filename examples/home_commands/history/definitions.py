"""The code location of the demonstration: one customization that lives through the history of its product."""

from pathlib import Path

import dagster as dg

from ml_assets.definitions import build_definitions


@dg.definitions
def defs() -> dg.Definitions:
    return build_definitions(Path(__file__).parent)
