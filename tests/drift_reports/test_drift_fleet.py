"""The fleet's alarms: the rule itself, and its promise."""

import numpy as np
import pytest
from scipy import integrate

from ml_assets.drift_reports.fleet import calibrated, fleet_alarms


def test_as_many_are_named_as_their_evidence_carries() -> None:
    assert fleet_alarms({}, 0.1) == []
    assert fleet_alarms({"a": 9.9}, 0.1) == []
    assert fleet_alarms({"a": 10.0}, 0.1) == ["a"]
    # alone, 20 would not be enough among four
    assert fleet_alarms({"a": 20.0, "b": 1.0, "c": 20.0, "d": 0.0}, 0.1) == ["a", "c"]
    assert fleet_alarms({"a": 39.0, "b": 1.0, "c": 1.0, "d": 0.0}, 0.1) == []
    with pytest.raises(ValueError, match="q=1"):
        fleet_alarms({"a": 1.0}, 1)


def test_a_calibrated_p_value_is_an_e_value() -> None:
    total = integrate.quad(lambda x: calibrated(np.exp(-x)) * np.exp(-x), 0, 500, limit=500)[0]
    assert total == pytest.approx(1.0, abs=5e-3)  # the tail beyond exp(-500) is 1 / 500
    assert calibrated(1.0) == pytest.approx(calibrated(1 - 2e-4), abs=1e-3)
    values = [calibrated(p) for p in (1e-9, 1e-6, 1e-3, 0.1, 0.9, 1.0)]
    assert values == sorted(values, reverse=True)


def test_few_of_those_that_are_named_have_not_moved() -> None:
    """False discoveries among 50 of which 10 moved, with evidence that depends on a common disturbance."""
    random = np.random.default_rng(0)
    shares = []
    for _ in range(400):
        common = random.normal()
        z = 0.6 * common + 0.8 * random.normal(size=50)
        z[:10] += 5.0
        e = {str(i): float(np.exp(4 * v - 8)) for i, v in enumerate(z)}
        named = fleet_alarms(e, 0.2)
        shares.append(sum(int(name) >= 10 for name in named) / max(1, len(named)))
    assert np.mean(shares) <= 0.2
