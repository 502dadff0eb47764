"""Maximum mean discrepancy between the last requests and the reference, for windows of several lengths.

Gretton et al., 'A kernel two-sample test', JMLR 13 (2012), with random Fourier features (Rahimi and Recht,
NeurIPS 2007), so that a window is the mean of its rows' features and costs nothing to move. What the squared
distance is in windows without a change is found by drawing such windows from the reference; the far tail,
where the thresholds of 'one false alarm in a year' are, is extrapolated from them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml_assets.drift_reports.detectors import BLOCK, MMD_WINDOWS, Detector, State
from ml_assets.drift_reports.ranks import Floats, Integers

FEATURES = 128
"""Frequencies; each gives a cosine and a sine."""
DRAWS = 1000
TAIL = 0.1
"""Share of the drawn windows from which the tail is fitted."""
LARGEST_PART = 0.25
"""Of the reference, that a window may be long."""


@dataclass(frozen=True)
class Kernel:
    """Random features of a Gaussian kernel: frequencies (d, FEATURES)."""

    frequencies: NDArray[np.float32]

    @classmethod
    def fit(cls, rows: NDArray[np.float32], weights: Floats, seed: int = 0) -> "Kernel":
        """Of distances between `rows` (n, d) with their columns multiplied by `weights`; the width is the
        median of such distances."""
        random = np.random.default_rng(seed)
        some = rows[random.permutation(len(rows))[:400]] * weights
        half = len(some) // 2
        distances = np.linalg.norm(some[:half] - some[half : 2 * half], axis=1) if half else np.ones(1)
        width = float(np.median(distances)) or 1.0
        frequencies = random.standard_normal((rows.shape[1], FEATURES)) / width * weights[:, None]
        return cls(frequencies.astype(np.float32))

    def features(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, 2 FEATURES) of rows (n, d)."""
        angles = rows.astype(np.float32) @ self.frequencies
        both = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        return (both / np.float32(np.sqrt(FEATURES))).astype(np.float32, copy=False)


@dataclass(frozen=True)
class Tails:
    """Null distribution of the squared distance for each window: (W, 5) gamma shape and scale, the point from
    which the tail counts, its share, and its mean excess."""

    windows: tuple[int, ...]
    values: Floats

    def log_p(self, index: int, distance: float) -> float:
        """Log-probability of a distance at least this large in a window without a change."""
        from scipy.special import gammaincc

        shape, scale, start, share, excess = self.values[index]
        gamma = float(np.log(max(gammaincc(shape, distance / scale), 1e-300)))
        tail = float(np.log(share) - (distance - start) / excess) if distance > start else 0.0
        return max(gamma, min(tail, 0.0)) if distance > start else gamma


def null_tails(features: NDArray[np.float32], seed: int = 0, draws: int = DRAWS) -> Tails:
    """From the reference's features (n, 2 FEATURES): windows are drawn from it without replacement and
    compared with what is left."""
    random = np.random.default_rng(seed)
    n = len(features)
    windows = tuple(w for w in MMD_WINDOWS if w * BLOCK <= LARGEST_PART * n)
    total = features.sum(axis=0, dtype=float)
    values = []
    for blocks in windows:
        size = blocks * BLOCK
        distances = np.empty(draws)
        for i in range(draws):
            window = features[random.choice(n, size, replace=False, shuffle=False)].sum(axis=0, dtype=float)
            distances[i] = np.sum((window / size - (total - window) / (n - size)) ** 2)
        mean, variance = float(distances.mean()), float(distances.var(ddof=1)) or 1e-12
        start = float(np.quantile(distances, 1 - TAIL))
        above = distances[distances > start] - start
        # a mean excess estimated too small would shorten the tail: take its upper end
        excess = float(above.mean()) * (1 + 2 / np.sqrt(len(above))) if len(above) else variance**0.5
        values.append([mean**2 / variance, variance / mean if mean else 1e-12, start, TAIL, excess])
    return Tails(windows, np.array(values).reshape(-1, 5))


class MmdDetector(Detector):
    """Windows of the last requests against the whole held-out reference."""

    def __init__(self, days: float, kernel: Kernel, mean: Floats, tails: Tails, name: str = "inputs_mmd"):
        super().__init__(name, days, max(1, len(tails.windows)))
        self.kernel, self.mean, self.tails = kernel, mean, tails
        self.sums = np.zeros((0, len(mean)))
        self.distances = np.zeros(len(tails.windows))

    def _update(self, rows: Floats, seqs: Integers) -> None:
        total = self.kernel.features(rows).sum(axis=0, dtype=float)  # type: ignore[arg-type]
        longest = max(self.tails.windows, default=1)
        self.sums = np.concatenate([self.sums[-longest + 1 :], total[None]])
        current = []
        for index, blocks in enumerate(self.tails.windows):
            if self.blocks + 1 >= blocks and (self.blocks + 1) % max(1, blocks // 4) == 0:
                distance = self.sums[-blocks:].sum(axis=0) / (blocks * BLOCK) - self.mean
                self.distances[index] = float(distance @ distance)
                current.append(np.log(self._take(index)) - self.tails.log_p(index, self.distances[index]))
        self.log_evidence = float(max(current, default=self.log_evidence))

    def state(self) -> State:
        return super().state() | {"sums": self.sums, "distances": self.distances}

    def restore(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        super().restore(state)
        self.sums, self.distances = state["sums"], state["distances"]  # type: ignore[assignment]
