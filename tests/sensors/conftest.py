"""What the tests of sensors share."""

import pytest

from ml_assets.decisions.book import DecisionBook


@pytest.fixture
def dies_before_alerts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick that would raise an alert after what it is about was stored never gets there."""

    def die(*_: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(DecisionBook, "alert", die)
