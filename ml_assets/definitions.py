"""The code location: everything below a defs folder, with this deployment's resources."""

from pathlib import Path

import dagster as dg

from ml_assets.mistakes import SpecError


def build_definitions(project: Path) -> dg.Definitions:
    """The definitions of the project around `project` (a path below its pyproject.toml or dg.toml).

    Raises SpecError, one line for each mistake in its files.
    """
    try:
        folder = dg.load_from_defs_folder(path_within_project=project)
    except Exception as error:
        # Dagster wraps what a component raises in one exception for each folder above it
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SpecError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause.with_traceback(None) from None
    # one process for each run: the heavy imports and the base model are loaded once, not for every step
    return dg.Definitions.merge(folder, dg.Definitions(executor=dg.in_process_executor))


@dg.definitions
def defs() -> dg.Definitions:
    return build_definitions(Path(__file__).parent)
