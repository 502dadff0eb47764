"""From embeddings to the few numbers that detectors compare."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml_assets.drift_reports.ranks import Floats

COMPONENTS = 48
SURFACE = 5
CONTRASTS = 8
FEWEST_OF_A_KIND = 10
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Projection:
    """Principal components of embeddings, scaled to variance 1, and the surface of the text beside them.

    Fitted on rows that are compared with nothing afterwards: components chosen to spread the compared rows
    would make any other rows look different.
    """

    mean: Floats
    axes: NDArray[np.float32]
    scale: Floats
    surface_mean: Floats
    surface_scale: Floats

    @classmethod
    def fit(cls, embeddings: Vectors, surface: Floats, components: int = COMPONENTS) -> "Projection":
        """embeddings (n, D), surface (n, SURFACE)."""
        rows = embeddings.astype(np.float64)
        mean = rows.mean(axis=0)
        _, singular, axes = np.linalg.svd(rows - mean, full_matrices=False)
        variance = singular**2 / max(1, len(rows) - 1)
        keep = max(
            1, min(components, len(rows) // 8, int(np.sum(variance > 1e-8 * variance.max(initial=1e-30))))
        )
        # small components of a small sample are underestimated: shrink towards the mean variance
        floor = 0.02 * float(variance[:keep].mean())
        return cls(
            mean,
            axes[:keep].T.astype(np.float32),
            np.sqrt(variance[:keep] + floor + 1e-12),
            surface.mean(axis=0),
            surface.std(axis=0) + 1e-3,
        )

    def apply(self, embeddings: Vectors, surface: Floats) -> Vectors:
        """(n, components + SURFACE), each with mean 0 and variance about 1 on rows like those of the fit."""
        components = (embeddings - self.mean) @ self.axes / self.scale
        beside = np.clip((surface - self.surface_mean) / self.surface_scale, -8, 8)
        return np.concatenate([components, beside], axis=1).astype(np.float32)

    @property
    def weights(self) -> Floats:
        """What undoes the scaling of `apply`, for distances: the surface counts as much as a small
        component."""
        small = np.full(len(self.surface_mean), float(self.scale.min()))
        return np.concatenate([self.scale, small])

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        return dict(vars(self))

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[np.generic]]) -> "Projection":
        names = ("mean", "axes", "scale", "surface_mean", "surface_scale")
        return cls(*(arrays[name] for name in names))  # type: ignore[arg-type]


def contrasts(rows: Vectors, kinds: Sequence[int]) -> Vectors:
    """(r, d) orthonormal directions in which rows (n, d) of variance 1 differ by their kind (n,), at most
    CONTRASTS and the clearest first (Fisher 1936, Rao 1948: the means of the kinds, here in features that are
    whitened already); r = 0 where they do not differ by more than chance makes them."""
    labels = np.asarray(kinds)
    names, counts = np.unique(labels, return_counts=True)
    names = names[counts >= FEWEST_OF_A_KIND]
    if len(names) < 2:
        return np.zeros((0, rows.shape[1]), np.float32)
    centre = rows.mean(axis=0, dtype=float)
    means = [np.sqrt(np.sum(labels == name)) * (rows[labels == name].mean(axis=0) - centre) for name in names]
    _, singular, axes = np.linalg.svd(np.array(means, dtype=float), full_matrices=False)
    # the largest singular value of so many rows of noise
    clear = int(np.sum(singular > np.sqrt(rows.shape[1]) + np.sqrt(len(names))))
    return axes[: min(clear, len(names) - 1, CONTRASTS)].astype(np.float32)


def surface_of(texts: Sequence[str]) -> Floats:
    """(n, SURFACE): length, length of words, and shares of digits, punctuation and letters beyond ASCII."""
    found = np.zeros((len(texts), SURFACE))
    for i, text in enumerate(texts):
        some = text[:4000]
        n = max(1, len(some))
        words = max(1, len(some.split()))
        marks = sum(unicodedata.category(c)[0] in "PS" for c in some)
        digits = sum(c.isdigit() for c in some)
        foreign = sum(ord(c) > 127 and c.isalpha() for c in some)
        found[i] = np.log1p(len(text)), np.log1p(n / words), digits / n, marks / n, foreign / n
    return found
