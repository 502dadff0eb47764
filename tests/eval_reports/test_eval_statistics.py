"""The gate's statistics keep what they promise: by exact enumeration and by simulation."""

import math
import sys

import numpy as np
import pytest
from scipy import stats

from ml_assets.eval_reports.statistics import (
    claim_probability,
    critical_value,
    design_effect,
    exact_size,
    mean_bounds,
    rows_needed,
    tango,
    tango_bounds,
)

ALPHA = 0.05
SIZES = (10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 1500, 2000)
MARGINS = (0.01, 0.02, 0.03, 0.05, 0.1)


def brute_size(n: int, difference: float, critical: float, steps: int = 400) -> float:
    """Size by summing the whole trinomial, cell by cell, on a fine grid."""
    gains, losses = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    possible = gains + losses <= n
    rejected = possible & (tango(gains, losses, n, difference) >= critical)
    b, c = gains[rejected], losses[rejected]
    worst = 0.0
    for loss in np.linspace(max(0.0, -difference), (1 - difference) / 2, steps):
        rates = np.array([loss + difference, loss, max(0.0, 1 - 2 * loss - difference)])
        cells = np.stack([b, c, n - b - c], axis=1)
        worst = max(worst, float(stats.multinomial.pmf(cells, n, np.clip(rates, 0, 1)).sum()))
    return worst


def test_tango_statistic_is_the_published_one() -> None:
    # recomputed from its definition, with the likelihood maximized numerically instead of by the closed form
    for gains, losses, n, difference in ((1, 0, 44, -0.02), (5, 9, 60, -0.05), (3, 3, 30, 0.1)):
        grid = np.linspace(max(0.0, -difference), (1 - difference) / 2, 2_000_001)[1:-1]
        likelihood = (
            gains * np.log(grid + difference)
            + losses * np.log(grid)
            + (n - gains - losses) * np.log1p(-2 * grid - difference)
        )
        loss_rate = grid[np.argmax(likelihood)]
        variance = n * (2 * loss_rate + difference - difference**2)
        expected = (gains - losses - n * difference) / math.sqrt(variance)
        assert float(tango(gains, losses, n, difference)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("n", "difference"), [(10, -0.1), (30, -0.03), (50, -0.02), (50, 0.0), (40, 0.05)])
def test_exact_size_is_that_of_a_brute_force_sum(n: int, difference: float) -> None:
    for critical in (1.5, 1.645, 1.8):
        assert exact_size(n, difference, critical) == pytest.approx(
            brute_size(n, difference, critical), abs=5e-4
        )


@pytest.mark.parametrize("sizes", [SIZES[:8], pytest.param(SIZES[8:], marks=pytest.mark.slow)])
def test_false_promotions_are_at_most_five_percent_exactly(
    sizes: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each n and margin at its worst share of flips, and at several shares."""
    worst, plain = (0.0, 0, 0.0), (0.0, 0, 0.0)
    for n in sizes:
        for margin in MARGINS:
            worst = max(worst, (exact_size(n, -margin, critical_value(n, -margin, ALPHA)), n, margin))
            plain = max(plain, (exact_size(n, -margin, stats.norm.isf(ALPHA)), n, margin))
            gaps = [claim_probability(n, d, d + margin, -margin) for d in (0.0, 0.005, 0.02, 0.08, 0.2, 0.4)]
            assert max(gaps) <= ALPHA
    with capsys.disabled():
        sys.stdout.write(f"\nworst exact size (size, n, margin): calibrated {worst}, plain Tango {plain}\n")
    assert worst[0] <= ALPHA
    assert plain[0] > ALPHA, "the calibration would be needless"
    assert worst[0] > 0.045, "the calibration wastes power"


@pytest.mark.slow
def test_false_promotions_by_simulation_beside_other_rules(capsys: pytest.CaptureFixture[str]) -> None:
    """10,000 evaluations per cell of a candidate that is worse by exactly the margin."""
    generator = np.random.default_rng(7)
    draws, lines, ours = 10_000, [], []
    for n in SIZES:
        for margin in MARGINS:
            critical = critical_value(n, -margin, ALPHA)
            for extra in (0.001, 0.05, 0.2):
                rates = [extra / 2, extra / 2 + margin, 1 - extra - margin]
                gains, losses, _ = generator.multinomial(n, rates, draws).T
                mean = (gains - losses) / n
                spread = np.sqrt(((gains + losses) / n - mean**2) / max(n - 1, 1))
                promoted = {
                    "ours": float(np.mean(tango(gains, losses, n, -margin) >= critical)),
                    "t": float(np.mean(mean - stats.t.isf(ALPHA / 2, n - 1) * spread > -margin)),
                    "bare": float(np.mean(mean >= -margin)),
                }
                ours.append(promoted["ours"])
                if (n, margin) in {(50, 0.02), (200, 0.02), (1000, 0.02)}:
                    shares = ", ".join(f"{name} {share:.1%}" for name, share in promoted.items())
                    lines.append(f"n={n} margin={margin:.0%} flips={extra + margin:.1%}: {shares}")
                if n == 50 and margin == 0.02 and extra == 0.001:
                    assert promoted["t"] > 0.3, "the t interval collapses when few rows flip"
                    assert promoted["bare"] > 0.7
    with capsys.disabled():
        sys.stdout.write("\nfalse promotions\n" + "\n".join(lines) + "\n")
    # 210 cells at a true rate of at most 5 %: 3.9 standard errors is the largest of so many
    assert max(ours) <= ALPHA + 3.9 * math.sqrt(ALPHA * (1 - ALPHA) / draws)
    assert np.mean(np.array(ours) > ALPHA) < 0.3


def test_power_of_an_equal_candidate() -> None:
    assert claim_probability(1000, 0.05, 0.05, -0.02) >= 0.62


def test_nothing_flips_and_nothing_is_shown_until_there_are_enough_rows() -> None:
    for margin in (0.02, 0.05, 0.1):
        for n in (10, 20, 40, 80, 120, 160):
            shown = float(tango(0, 0, n, -margin)) >= critical_value(n, -margin, ALPHA)
            assert not shown or (1 - margin) ** n <= ALPHA


@pytest.mark.parametrize(
    ("margin", "discordance"),
    [
        pytest.param(m, d, marks=[pytest.mark.slow] if d > 25 * m**1.5 or m == 0.02 else [])
        for m in (0.02, 0.03, 0.05, 0.1)
        for d in (0.02, 0.05, 0.1, 0.2, 0.4)
    ],
)
def test_rows_needed_give_the_power(discordance: float, margin: float) -> None:
    n = rows_needed(discordance, margin, ALPHA, 0.8)
    assert n is not None
    exact = claim_probability(n, discordance / 2, discordance / 2, -margin)
    assert exact >= 0.78
    # with few rows and few flips, power comes in jumps: then one row less must be too few
    assert exact <= 0.8 * 1.15 or claim_probability(n - 1, discordance / 2, discordance / 2, -margin) < 0.8
    gains, losses, _ = (
        np.random.default_rng(n).multinomial(n, [discordance / 2, discordance / 2, 1 - discordance], 20_000).T
    )
    simulated = float(np.mean(tango(gains, losses, n, -margin) >= critical_value(n, -margin, ALPHA)))
    assert simulated == pytest.approx(exact, abs=0.015)
    if discordance * n > 20:  # with 15 % fewer rows the power is missed: it does not ask for too many
        fewer = int(n / 1.15)
        assert claim_probability(fewer, discordance / 2, discordance / 2, -margin) < 0.8


def test_rows_needed_for_a_gain_and_for_the_impossible() -> None:
    n = rows_needed(0.3, 0.0, ALPHA, 0.8, 0.2)
    assert n is not None
    assert 0.78 <= claim_probability(n, 0.25, 0.05, 0.0) <= 0.9
    assert rows_needed(0.1, 0.02, ALPHA, 0.8, -0.02) is None
    assert rows_needed(0.1, -0.05, ALPHA, 0.8, 0.05) is None


def test_bounds_are_where_the_test_turns() -> None:
    for gains, losses, n in ((0, 0, 50), (3, 8, 120), (40, 2, 100), (0, 60, 60)):
        lower, upper = tango_bounds(gains, losses, n, 1.7)
        assert -1 <= lower <= (gains - losses) / n <= upper <= 1
        if lower > -0.999:
            assert float(tango(gains, losses, n, lower)) == pytest.approx(1.7, abs=1e-3)


def test_clustered_rows_promote_falsely_at_most_as_often() -> None:
    """40 clusters of 10 rows; in a flipped cluster each row flips with a probability of 70 %."""
    generator = np.random.default_rng(3)
    groups, size, margin, draws = 40, 10, 0.05, 3000
    clusters = np.repeat(np.arange(groups), size)
    names = [str(c) for c in clusters]
    adjusted = naive = 0
    for _ in range(draws):
        # expected loss per row: (0.06 + margin / 0.7 - 0.06) * 0.7 = margin
        kind = generator.choice([1, -1, 0], p=[0.06, 0.06 + margin / 0.7, 0.88 - margin / 0.7], size=groups)
        delta = kind[clusters] * (generator.random(groups * size) < 0.7)
        n, up, down = len(delta), np.sum(delta == 1), np.sum(delta == -1)
        naive += float(tango(up, down, n, -margin)) >= 1.66
        effect = design_effect(delta, names)
        wider = stats.t.isf(ALPHA, groups - 1) / stats.norm.isf(ALPHA)
        critical = 1.70 * wider
        adjusted += float(tango(up / effect, down / effect, n / effect, -margin)) >= critical
    assert naive / draws > 0.10
    assert adjusted / draws <= 0.055


def test_design_effect() -> None:
    independent = np.tile([1.0, 0.0, -1.0, 0.0], 50)
    assert design_effect(independent, [str(i) for i in range(200)]) == 1.0
    copies = np.repeat(independent, 5)
    assert design_effect(copies, [str(i // 5) for i in range(1000)]) == pytest.approx(5, rel=0.02)
    assert design_effect(np.zeros(20), [str(i // 4) for i in range(20)]) == 4.0
    one = np.zeros(400)
    one[0] = -1
    assert design_effect(one, [str(i // 10) for i in range(400)]) > 9, "one flip shows nothing"


def test_rare_flips_of_clustered_rows_promote_falsely_at_most_as_often() -> None:
    """One of 25 clusters is lost, and in one of 25 half of the rows are won."""
    generator = np.random.default_rng(4)
    groups, size, margin, draws = 40, 10, 0.02, 2000
    names = [str(c) for c in np.repeat(np.arange(groups), size)]
    wider = stats.t.isf(ALPHA, groups - 1) / stats.norm.isf(ALPHA)
    false = 0
    for _ in range(draws):
        kind = generator.random(groups)
        lost = np.repeat(kind < 0.04, size)
        won = np.repeat(kind > 0.96, size) & (generator.random(groups * size) < 0.5)
        delta = won.astype(float) - lost  # expected: 0.04 * 0.5 - 0.04 = -margin
        effect = design_effect(delta, names)
        n = len(delta) / effect
        critical = critical_value(max(1, math.floor(n)), -margin, ALPHA) * wider
        false += float(tango(np.sum(won) / effect, np.sum(lost) / effect, n, -margin)) >= critical
    assert false / draws <= 0.055


def test_a_loss_does_not_help_where_rows_are_clustered() -> None:
    names = [str(i // 10) for i in range(600)]
    wider = stats.t.isf(ALPHA, 59) / stats.norm.isf(ALPHA)

    def lower(losses: int) -> float:
        delta = np.zeros(600)
        delta[[10 * i for i in range(losses)]] = -1
        effect = design_effect(delta, names)
        n = 600 / effect
        critical = critical_value(math.floor(n), -0.05, ALPHA) * wider
        return tango_bounds(0, losses / effect, n, critical)[0]

    assert max(lower(losses) for losses in (1, 2, 3)) < lower(0) + 0.002, "the critical value wavers"
    assert lower(0) > lower(10) > lower(20)


def test_mean_bounds_do_not_collapse_and_are_exact_for_right_and_wrong() -> None:
    lower, upper = mean_bounds(np.zeros(100), 0, 1, alpha=ALPHA)
    assert (lower, upper) == (0.0, pytest.approx(1 - ALPHA ** (1 / 100)))
    lower, upper = mean_bounds([1.0] * 7 + [0.0] * 3, 0, 1, alpha=ALPHA)
    interval = stats.binomtest(7, 10).proportion_ci(0.9, "exact")
    assert (lower, upper) == (pytest.approx(interval.low), pytest.approx(interval.high))
    drawn = mean_bounds([0.5, *[0.0] * 99], 0, 1, alpha=ALPHA)
    again = mean_bounds([0.5, *[0.0] * 99], 0, 1, alpha=ALPHA)
    assert drawn == again
    assert 0 < drawn[0] < 0.005 < drawn[1] < 0.06
    assert mean_bounds([], -1, 1, alpha=ALPHA) == (-1, 1)
    with pytest.raises(ValueError, match="from 0 to 1"):
        mean_bounds([1.5], 0, 1, alpha=ALPHA)


@pytest.mark.parametrize("n", [20, 50, 200])
@pytest.mark.parametrize("rare", [0.02, 0.1, 0.5])
def test_graded_scores_promote_falsely_at_most_five_percent(n: int, rare: float) -> None:
    """Rare large losses, the case in which a studentized bound collapses on nearly identical rows."""
    generator = np.random.default_rng(n)
    draws, false, student = 1500, 0, 0
    loss = 0.7
    for _ in range(draws):
        delta = np.where(generator.random(n) < rare, -generator.beta(7, 3, n), generator.normal(0, 0.002, n))
        margin = rare * loss
        lower, _ = mean_bounds(np.clip(delta, -1, 1), -1, 1, alpha=ALPHA, draws=1000)
        false += lower > -margin
        student += delta.mean() - 1.7 * delta.std(ddof=1) / math.sqrt(n) > -margin
    assert false / draws <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / draws)
    if n * rare < 2:
        assert student / draws > 0.2
