"""The statistics of the gate: paired right/wrong differences, bounded means, rows needed.

Right/wrong. `gains` are rows that the candidate got right and the reference wrong, `losses` the reverse,
out of `n` pairs. Differences of proportions are judged by Tango's score statistic (Tango 1998, Statistics
in Medicine 17:891-908), which does not collapse when nothing flips: an interval of the differences' mean
and standard error is [0, 0] then, however few the rows. As an approximation it is slightly liberal in some
cells, so its critical value is calibrated: the exact size, by enumeration over the trinomial of (gains,
losses) and maximized over the nuisance parameter (the share of flips), is at most alpha. This is the exact
unconditional test on Tango's statistic (Sidik 2003, Statistics in Medicine 22:265-278).

Scores between two ends, and money. `mean_bounds` is the Bayesian bootstrap over the rows and one pseudo-row
at the bad end (Gaffke 2005; Learned-Miller and Thomas 2020, arXiv 1905.06208). Percentile, BCa and
studentized bootstraps collapse on identical rows; this one does not, and on right/wrong data it is Clopper
and Pearson's exact bound.

Clusters. Rows of one cluster are not independent: counts are divided by the design effect (Rao and Scott
1992, Biometrics 48:577-585), and the bootstrap draws clusters.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
MAX_ROWS = 1_000_000


# -- paired right/wrong --------------------------------------------------------------------------------


def tango(gains: ArrayLike, losses: ArrayLike, n: float, difference: ArrayLike) -> Floats:
    """Tango's score statistic for H0: P(gain) - P(loss) = `difference`; large when the difference is larger.

    Arguments broadcast; counts may be fractions (clusters). 0 when nothing speaks either way.
    """
    b, c, d = (np.asarray(x, dtype=float) for x in (gains, losses, difference))
    linear = -b - c + (2 * n - b + c) * d
    root = np.sqrt(np.maximum(linear**2 + 8 * n * c * d * (1 - d), 0.0))
    loss_rate = (root - linear) / (4 * n)  # its maximum-likelihood estimate under H0
    variance = np.maximum(n * (2 * loss_rate + d * (1 - d)), 0.0)
    excess = b - c - n * d
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.where(np.abs(excess) < 1e-9, 0.0, excess / np.sqrt(variance))
    return statistic


def tango_bounds(
    gains: float, losses: float, n: float, z_lower: float, z_upper: float | None = None
) -> tuple[float, float]:
    """The differences at which Tango's statistic is `z_lower` and -`z_upper`: a lower and an upper bound."""
    z_upper = z_lower if z_upper is None else z_upper

    def solve(target: float) -> float:
        low, high = -1.0, 1.0
        for _ in range(60):  # the statistic falls as the difference rises
            middle = (low + high) / 2
            if tango(gains, losses, n, middle) >= target:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    return solve(z_lower), solve(-z_upper)


def _thresholds(n: int, difference: float, critical: float) -> NDArray[np.int64]:
    """For each count of losses 0..n, the fewest gains with statistic >= critical (n - losses + 1: none)."""
    losses = np.arange(n + 1)
    low, high = np.zeros(n + 1, dtype=np.int64), n - losses + 1
    while np.any(low < high):
        middle = (low + high) // 2
        enough = tango(middle, losses, n, difference) >= critical
        high = np.where(enough, middle, high)
        low = np.where(enough, low, np.minimum(middle + 1, high))
    return high


def _claim_probability(
    thresholds: NDArray[np.int64], n: int, gain_rate: ArrayLike, loss_rate: ArrayLike
) -> Floats:
    """Exact P(gains >= thresholds[losses]) under each trinomial (gain_rate, loss_rate)."""
    from scipy import special, stats

    result = []
    for gain, loss in zip(np.atleast_1d(gain_rate), np.atleast_1d(loss_rate), strict=True):
        spread = 8 * math.sqrt(n * loss * (1 - loss)) + 12
        losses = np.arange(max(0, math.floor(n * loss - spread)), min(n, math.ceil(n * loss + spread)) + 1)
        weight = stats.binom.pmf(losses, n, loss)
        need, rest = thresholds[losses], n - losses
        share = min(max(gain, 0.0) / (1 - loss), 1.0) if loss < 1 else 0.0
        tail = np.where(
            need <= 0,
            1.0,
            special.betainc(np.clip(need, 1, None), np.maximum(rest - need + 1, 1e-300), share),
        )
        result.append(float(np.sum(weight * np.where(need > rest, 0.0, tail))))
    return np.array(result)


def claim_probability(
    n: int, gain_rate: float, loss_rate: float, difference: float, alpha: float = 0.05
) -> float:
    """Exact probability that `n` rows show a difference above `difference` when these are the true rates."""
    limits = _thresholds(n, difference, critical_value(n, difference, alpha))
    return float(_claim_probability(limits, n, gain_rate, loss_rate)[0])


def exact_size(n: int, difference: float, critical: float) -> float:
    """The largest probability, over all shares of flips, that the statistic reaches `critical` although the
    true difference is `difference`."""
    limits = _thresholds(n, difference, critical)
    # the arcsine scale makes the waves of the size about equally wide; a second pass refines the highest
    least, most = max(0.0, -difference), (1 - difference) / 2
    points = np.linspace(
        math.asin(math.sqrt(least)), math.asin(math.sqrt(most)), int(min(40 + 4 * math.sqrt(n), 250))
    )
    size = 0.0
    for _ in range(2):
        rates = np.clip(np.sin(points) ** 2, least, most)
        sizes = _claim_probability(limits, n, rates + difference, rates)
        best = int(np.argmax(sizes))
        size = float(sizes[best])
        points = np.linspace(points[max(best - 1, 0)], points[min(best + 1, len(points) - 1)], 9)
    return size


@lru_cache(maxsize=4096)
def critical_value(n: int, difference: float, alpha: float) -> float:
    """The smallest value (to 0.002) of Tango's statistic at which its exact size is at most `alpha`."""
    from scipy import stats

    normal = float(stats.norm.isf(alpha))
    low, high = normal - 0.4, normal + 0.2
    while exact_size(n, difference, high) > alpha:
        low, high = high, high + 0.4
        if high > normal + 8:  # so few rows that every outcome is likelier than alpha
            return math.inf
    while high - low > 0.002:
        middle = (low + high) / 2
        if exact_size(n, difference, middle) <= alpha:
            high = middle
        else:
            low = middle
    return high


@lru_cache(maxsize=1024)
def rows_needed(
    discordance: float, margin: float, alpha: float, power: float, difference: float = 0.0
) -> int | None:
    """Rows at which a candidate whose true difference is `difference`, and whose share of flips (gains and
    losses) is `discordance`, is shown better than -`margin` with probability `power` (exact).

    A negative margin asks for a gain. None when no number of rows up to a million does.
    """
    from scipy import stats

    if difference <= -margin:
        return None
    discordance = min(max(discordance, abs(difference)), 1.0)
    gain, loss = (discordance + difference) / 2, (discordance - difference) / 2

    def reaches(n: int, critical: float) -> bool:
        return _claim_probability(_thresholds(n, -margin, critical), n, gain, loss)[0] >= power

    critical = float(stats.norm.isf(alpha))
    n = 0
    for _ in range(2):  # the first pass finds the scale, the second uses the critical value of that scale
        low, high = 1, 8
        while not reaches(high, critical):
            low, high = high, high * 2
            if low > MAX_ROWS:
                return None
        while high - low > max(1, high // 200):
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(middle, critical) else (middle, high)
        n = high
        critical = critical_value(min(n, 20_000), -margin, alpha)
        if math.isinf(critical):
            critical = critical_value(4 * n, -margin, alpha)
    for _ in range(20):  # critical values differ a little between neighbouring n
        if n > 20_000 or claim_probability(n, gain, loss, -margin, alpha) >= power - 0.02:
            break
        n += max(1, n // 50)
    return n


def design_effect(differences: ArrayLike, clusters: Sequence[Any]) -> float:
    """How much larger the variance of the mean difference is because rows come in clusters (at least 1).

    Few flips tell little about it. So one cluster of mean size that flips as a whole is thought to be there:
    without any flip rows of one cluster count as one row, and it takes many flips to show that they need not.
    """
    values = np.asarray(differences, dtype=float)
    _, member = np.unique([str(c) for c in clusters], return_inverse=True)
    sizes = np.bincount(member)
    groups, n = len(sizes), len(values)
    if groups == n:
        return 1.0
    spread = values - values.mean()
    independent = float(np.sum(spread**2))
    size = n / groups
    if groups == 1:
        return size
    clustered = groups / (groups - 1) * float(np.sum(np.bincount(member, weights=spread) ** 2))
    return max(1.0, (clustered + size**2) / (independent + size))


# -- means of bounded values ---------------------------------------------------------------------------


def mean_bounds(
    values: ArrayLike,
    low: float,
    high: float,
    *,
    alpha: float,
    clusters: Sequence[Any] | None = None,
    seed: int = 0,
    draws: int = 10_000,
) -> tuple[float, float]:
    """A lower and an upper bound of the mean of values between `low` and `high`, each with error `alpha`.

    (low, high) without values. Right/wrong values without clusters take the closed form.
    """
    from scipy import stats

    data = np.asarray(values, dtype=float)
    if not data.size:
        return low, high
    if data.min() < low - 1e-9 or data.max() > high + 1e-9:
        raise ValueError(f"expected values from {low} to {high}, found {data.min()} to {data.max()}")
    if high <= low:
        return low, high
    if clusters is None and np.all((data == low) | (data == high)):
        hits, n = int(np.sum(data == high)), len(data)
        lower = 0.0 if hits == 0 else float(stats.beta.ppf(alpha, hits, n - hits + 1))
        upper = 1.0 if hits == n else float(stats.beta.isf(alpha, hits + 1, n - hits))
        return low + lower * (high - low), low + upper * (high - low)
    if clusters is None:
        sums, counts = data, np.ones(len(data))
    else:
        _, member = np.unique([str(c) for c in clusters], return_inverse=True)
        sums, counts = np.bincount(member, weights=data), np.bincount(member).astype(float)
    size = counts.mean()
    # equal rows are drawn together: the sum of k exponential weights is a gamma weight of shape k
    (sums, counts), times = np.unique(np.stack([sums, counts]), axis=1, return_counts=True)
    shapes = np.append(times, 1.0)
    lowers, uppers = [], []
    generator = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // len(shapes))
    for start in range(0, draws, chunk):
        weights = generator.standard_gamma(shapes, (min(chunk, draws - start), len(shapes)))
        total = weights[:, :-1] @ sums
        weight = weights[:, :-1] @ counts + weights[:, -1] * size
        extra = weights[:, -1] * size
        lowers.append((total + extra * low) / weight)
        uppers.append((total + extra * high) / weight)
    lower = float(np.quantile(np.concatenate(lowers), alpha))
    upper = float(np.quantile(np.concatenate(uppers), 1 - alpha))
    return lower, upper
