"""The law of the ranks, exactly, and the promise that follows from it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_assets.drift_reports import ranks
from ml_assets.drift_reports.budget import SHARES, Purse


@pytest.mark.parametrize("direction", ["higher", "any"])
@given(n=st.integers(1, 400), t=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_the_evidence_is_one_on_average_over_all_that_can_happen(
    direction: ranks.Direction, n: int, t: int
) -> None:
    gaps = ranks.gaps_above(n, (0.5, 0.1, 0.01)) if direction == "higher" else ranks.gaps_even(n, 4)
    bets = ranks.Bets.on(gaps, direction)
    every = np.array(
        [np.bincount(bins, minlength=len(gaps)) for bins in itertools.product(range(len(gaps)), repeat=t)]
    )
    chance = np.exp(ranks.log_urn(every, gaps))
    assert math.isclose(chance.sum(), 1.0, rel_tol=1e-9)
    assert math.isclose(float(chance @ np.exp(bets.log_evidence(every))), 1.0, rel_tol=1e-9)


@given(st.integers(1, 5000))
def test_bins_cover_every_gap_once(n: int) -> None:
    for gaps in (
        ranks.gaps_above(n),
        ranks.gaps_even(n),
        ranks.gaps_of_shares(n, [0.6, 0.3, 0.0999, 0.0001]),
    ):
        assert gaps.sum() == n + 1
        assert gaps.min() >= 1


def test_the_urn_is_the_law_of_ranks_whatever_the_numbers_are() -> None:
    """Bins of new numbers among reference numbers, over many references: skewed, and with many ties."""
    random = np.random.default_rng(1)
    gaps = np.array([3, 2, 1])
    n, runs = 5, 6000
    counts = np.zeros((runs, 3), dtype=int)
    for run in range(runs):
        rows = np.floor(random.exponential(2.0, n + 2))  # two thirds of them are 0 or 1
        keys = random.integers(0, 2**40, n + 2)
        order = ranks.random_order(keys, 0)
        edges = ranks.cuts(rows[:n], order[:n], gaps)
        counts[run] = np.bincount(ranks.bins_of(rows[n:], order[n:], edges), minlength=3)
    both_low = np.mean(counts[:, 0] == 2)
    assert abs(both_low - 3 * 4 / (6 * 7)) < 0.02  # a fixed threshold of the same share would give (1/2)^2
    assert abs(np.mean(counts[:, 2] == 2) - 1 * 2 / (6 * 7)) < 0.012


@pytest.mark.parametrize("n", [20, 200])
def test_evidence_that_is_looked_at_after_every_request_rarely_gets_far(n: int) -> None:
    """Ville's inequality: at most 1 in 20 runs ever reaches 20; here with a reference so small that its own
    errors are far larger than what a thousand requests could show."""
    random = np.random.default_rng(2)
    gaps = ranks.gaps_above(n)
    bets = ranks.Bets.on(gaps, "higher")
    runs, length = 800, 400
    ever = 0
    for _ in range(runs):
        order = random.random(n)
        edges = ranks.cuts(random.normal(size=n), order, gaps)
        bins = ranks.bins_of(random.normal(size=length), random.random(length), edges)
        counts = np.cumsum(bins[:, None] == np.arange(len(gaps)), axis=0)
        ever += bool((bets.log_evidence(counts) >= math.log(20)).any())
    assert ever / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 60)), min_size=1, max_size=40))
def test_no_more_is_spent_than_days_have_passed(history: list[tuple[int, int]]) -> None:
    purse, passed, spent = Purse(), 0, 0.0
    for days, comparisons in history:
        purse.add(days, 0.25)
        passed += days
        for _ in range(comparisons):
            weight = purse.take()
            assert weight > 0
            spent += weight
            assert spent <= 0.25 * passed + 1e-9


def test_the_shares_of_the_signals_are_the_whole_budget() -> None:
    assert math.isclose(sum(SHARES.values()), 1.0)
