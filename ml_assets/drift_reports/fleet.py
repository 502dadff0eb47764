"""Alarms over a whole fleet: which customizations stand out although there are many to look at."""

import math
from collections.abc import Mapping

from ml_assets.drift_reports.budget import SHARES
from ml_assets.drift_reports.findings import DriftFindings

FALSE_SHARE = 0.1
"""Of the customizations that stand out, at most this share has not moved."""


def fleet_alarms(e_values: Mapping[str, float], q: float = FALSE_SHARE) -> list[str]:
    """Names of the customizations that have moved, the strongest evidence first: among all that are named, at
    most a share `q` on average has not, whatever the dependence between them.

    e-BH (Wang and Ramdas, JRSS B 84, 2022): the k largest e-values are taken for the largest k with
    k * e_(k) >= number / q.
    """
    if not 0 < q < 1:
        raise ValueError(f"q={q}: expected a share between 0 and 1")
    ordered = sorted(e_values, key=lambda name: (-e_values[name], name))
    limit = len(ordered) / q
    kept = max((k for k, name in enumerate(ordered, 1) if k * e_values[name] >= limit), default=0)
    return ordered[:kept]


def e_value_of(findings: DriftFindings) -> float:
    """One e-value of a drift report: the mean of its signals', by their shares of the budget, each from the
    p-value that holds at any time."""
    known = {s.name: s.p_value for s in findings.signals if s.p_value is not None}
    total = sum(SHARES[name] for name in known)
    return sum(SHARES[name] * calibrated(p) for name, p in known.items()) / total if total else 1.0


def calibrated(p: float) -> float:
    """An e-value from a p-value: the mixture of all power calibrators (Vovk and Wang, Annals of Statistics
    49, 2021)."""
    if p >= 1:
        return 0.5  # the limit
    p = max(p, 1e-300)
    log = math.log(p)
    return 0.5 if p > 1 - 1e-4 else (1 - p + p * log) / (p * log * log)
