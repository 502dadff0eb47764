"""A link from an asset to the code that makes it, as Dagster's UI shows it."""

import sys
import warnings
from typing import Any

import dagster as dg


def code_link() -> dict[str, Any]:
    """Metadata that links to the line that calls this: `metadata=code_link()` in the asset's decorator.

    `dg.with_source_code_references` links to the function, reads its whole source for that, and builds every
    asset again: a second for each thousand customizations."""
    caller = sys._getframe(1)
    with warnings.catch_warnings():  # links are in beta
        warnings.simplefilter("ignore", dg.BetaWarning)
        link = dg.LocalFileCodeReference(file_path=caller.f_code.co_filename, line_number=caller.f_lineno)
        return {"dagster/code_references": dg.CodeReferencesMetadataValue(code_references=[link])}
