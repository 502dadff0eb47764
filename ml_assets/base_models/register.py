"""Which base revision each family has now, and making them known as partitions."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_assets.base_models import sources
from ml_assets.base_models.identity import revision_key
from ml_assets.base_models.sources import HubAccess
from ml_assets.settings import Settings
from ml_assets.spec import BaseFamily


def current_revision(family: BaseFamily, root: Path, settings: Settings, hub: HubAccess | None = None) -> str:
    """The revision `family@<12 hex>` of what the family's source holds now. A source that was not seen before
    is downloaded and hashed, one whose files did not change since costs milliseconds.

    Raises BaseModelError as `ml_assets.base_models.sources.fetch` does.
    """
    return revision_key(family.name, sources.current_identity(family.source, root, settings, hub))


def register_revisions(
    families: Sequence[BaseFamily],
    root: Path,
    settings: Settings,
    instance_add: Callable[[list[str]], None],
    hub: HubAccess | None = None,
) -> list[str]:
    """Hand the current revision of each family to `instance_add` (such as adding dynamic partitions) and
    return them, in the order of the families. Raises BaseModelError at the first that cannot be read, before
    anything is added."""
    revisions = [current_revision(family, root, settings, hub) for family in families]
    instance_add(revisions)
    return revisions
