"""The code location of the demonstration: two customizations that follow a base model in a directory."""

from pathlib import Path

import dagster as dg

from ml_assets.definitions import build_definitions


@dg.definitions
def defs() -> dg.Definitions:
    return build_definitions(Path(__file__).parent)
