"""A comparison of requests with a finite reference that is exact, however long it goes on.

A rule that was fixed without the reference rows gives every row one number. If nothing has changed, reference
rows and requests are exchangeable. Cut the line at k - 1 of the n ordered reference numbers, at ranks fixed
beforehand: the chances that a request falls between two cuts are then Dirichlet distributed with the number
of gaps in each bin as parameters, whatever the distribution of the numbers is. So the bins of the requests
are draws from Polya's urn, a law without unknowns: the probability of bin j after t requests is (gaps_j +
counts_j) / (n + 1 + t). Betting against it gives a test martingale: the likelihood of the counts under a
mixture of alternatives, over their likelihood in the urn. By Ville's inequality it ever reaches c with a
probability of at most 1 / c, at any time and after any number of looks, and the finite size of the
reference is accounted for without a bound or a margin.

This is the betting form of predictive two-sample testing (Podkopaev and Ramdas, NeurIPS 2023) with the bets
placed on conformal ranks, as in conformal test martingales (Vovk, Gammerman and Shafer 2005) conditional on a
fixed reference (Shaer et al., arXiv 2602.13848). Equal numbers are put in order by a second, random one.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Direction = Literal["higher", "any"]

TAILS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.025, 0.01, 0.004)
"""Shares of the reference above each cut, where higher numbers are what is looked for."""
EVEN = 10
"""Bins of equal size, where any change is looked for."""
LIFTED = (0.5, 0.3, 0.2, 0.1, 0.05, 0.025, 0.01, 0.004)
TILTS = (0.4, 0.8, 1.4, 2.2)
SHARES = (0.03, 0.1, 0.25, 0.5, 0.9)
CONCENTRATIONS = (5.0, 20.0, 80.0, 320.0)


def random_order(keys: Integers, seed: int) -> Floats:
    """A uniform number in [0, 1) for each key, always the same (splitmix64, Steele et al. 2014)."""
    z = (keys.astype(np.uint64) + np.uint64(seed << 40)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53


def gaps_above(n: int, tails: Sequence[float] = TAILS) -> Integers:
    """(k,) gaps in each bin for `n` reference rows cut at these upper shares; small references have fewer
    bins, the highest of them one gap."""
    above = sorted({max(1, round(tail * (n + 1))) for tail in tails if tail * (n + 1) >= 0.5}, reverse=True)
    edges = [n + 1, *above, 0]
    return np.array([a - b for a, b in itertools.pairwise(edges) if a > b], dtype=np.int64)


def gaps_even(n: int, bins: int = EVEN) -> Integers:
    """(k,) gaps in bins of about equal size."""
    edges = np.unique(np.round(np.linspace(0, n + 1, min(bins, n + 1) + 1)).astype(np.int64))
    return np.diff(edges)


def gaps_of_shares(n: int, shares: Sequence[float]) -> Integers:
    """(k,) gaps in proportion to `shares`, which were found on other rows; each bin has at least one."""
    edges = [0]
    for total in np.cumsum(np.asarray(shares, dtype=float) / float(np.sum(shares)))[:-1]:
        at = min(round(float(total) * (n + 1)), n)
        if edges[-1] < at:
            edges.append(at)
    return np.diff(np.array([*edges, n + 1], dtype=np.int64))


def cuts(scores: Floats, order: Floats, gaps: Integers) -> Floats:
    """(k - 1, 2): number and second number of the reference rows at which the line is cut."""
    ranks = np.cumsum(gaps)[:-1] - 1
    sorted_ = np.argsort(scores)
    if (
        scores[sorted_[1:]] == scores[sorted_[:-1]]
    ).any():  # else ten times faster without the second numbers
        sorted_ = np.lexsort((order, scores))
    at = sorted_[ranks]
    return np.stack([scores[at], order[at]], axis=1)


def bins_of(scores: Floats, order: Floats, edges: Floats) -> Integers:
    """The bin of each score. Shapes: scores (..., n), order (n,), edges (..., k - 1, 2); gives (..., n)."""
    s, e = scores[..., :, None], edges[..., None, :, 0]
    return np.sum((s > e) | ((s == e) & (order[:, None] > edges[..., None, :, 1])), axis=-1)


def log_urn(counts: NDArray[np.integer], gaps: Integers) -> Floats:
    """Log-probability of a sequence with these counts (..., k) in Polya's urn."""
    from scipy.special import gammaln

    c, g = np.asarray(counts, dtype=float), np.asarray(gaps, dtype=float)
    return np.sum(gammaln(g + c) - gammaln(g), axis=-1) - gammaln(g.sum() + c.sum(axis=-1)) + gammaln(g.sum())


@dataclass(frozen=True)
class Bets:
    """What is bet on against the urn: `log_odds` (alternatives, k) of fixed distributions, or, where any
    change counts, urns that learn faster (Dirichlet priors around the reference's shares)."""

    gaps: Integers
    log_odds: Floats | None

    @classmethod
    def on(cls, gaps: Integers, direction: Direction) -> "Bets":
        return cls(gaps, _higher(gaps) if direction == "higher" else None)

    def log_evidence(self, counts: NDArray[np.integer]) -> Floats:
        """(...,) log e-values of counts (..., k)."""
        if self.log_odds is not None:
            bets = counts @ self.log_odds.T
        else:
            shares = self.gaps / self.gaps.sum()
            bets = np.stack([log_urn(counts, c * shares) for c in CONCENTRATIONS], axis=-1)  # type: ignore[arg-type]
        most = bets.max(axis=-1)
        mean = np.exp(bets - most[..., None]).mean(axis=-1)
        return most + np.log(mean) - log_urn(counts, self.gaps)


def _higher(gaps: Integers) -> Floats:
    """Log of bin probabilities (alternatives, k) that lean to high numbers: a share of the requests that
    comes from the upper end, or from a distribution tilted upwards."""
    from scipy.special import ndtri

    p = gaps / gaps.sum()
    above = np.cumsum(p[::-1])[::-1]  # share in the bin and above it
    middle = ndtri(np.clip(1 - above + p / 2, 1e-9, 1 - 1e-9))
    shapes = [np.where(above <= tail * 1.0001, p, 0.0) for tail in LIFTED]
    shapes += [p * np.exp(tilt * middle) for tilt in TILTS]
    found = {
        tuple(np.round((1 - share) * p + share * shape / shape.sum(), 12))
        for shape in shapes
        if shape.sum() > 0 and not np.allclose(shape / shape.sum(), p)
        for share in SHARES
    }
    return np.log(np.array(sorted(found or {tuple(p)})))
