"""The detectors: false alarms within their bound, changes found, and a state that can be carried on."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from ml_assets.drift_reports import ranks
from ml_assets.drift_reports.detectors import BLOCK, ClassifierDetector, Detector, ScoreDetector
from ml_assets.drift_reports.mmd import Kernel, MmdDetector, null_tails
from ml_assets.drift_reports.projection import Projection, contrasts

D = 6


def classifier(random: np.random.Generator, days: float, n: int = 150) -> Detector:
    held = random.normal(size=(n, D)).astype(np.float32)
    return ClassifierDetector(days, held, ranks.gaps_above(n))


def contrasted(random: np.random.Generator, days: float, n: int = 150) -> Detector:
    held = random.normal(size=(n, D)).astype(np.float32)
    return ClassifierDetector(days, held, ranks.gaps_above(n), np.eye(D, dtype=np.float32)[:2])


def mmd(random: np.random.Generator, days: float, n: int = 150) -> Detector:
    rows = random.normal(size=(n, D)).astype(np.float32)
    kernel = Kernel.fit(random.normal(size=(100, D)).astype(np.float32), np.ones(D))
    features = kernel.features(rows)
    return MmdDetector(days, kernel, features.mean(axis=0, dtype=float), null_tails(features, draws=300))


def share(random: np.random.Generator, days: float, n: int = 150) -> Detector:
    wrong = (random.random(n) < 0.1).astype(float)
    return ScoreDetector("outcome_feedback", days, wrong, ranks.gaps_above(n), "higher")


def length(random: np.random.Generator, days: float, n: int = 150) -> Detector:
    rows = np.round(random.gamma(2.0, 5.0, n))
    return ScoreDetector("outputs_length", days, rows, ranks.gaps_even(n), "any")


def mix(random: np.random.Generator, days: float, n: int = 150) -> Detector:
    rows = random.choice(4, n, p=SHARES).astype(float)
    return ScoreDetector("outputs_mix", days, rows, ranks.gaps_of_shares(n, [0.55, 0.3, 0.1, 0.05]), "any")


SHARES = [0.5, 0.3, 0.15, 0.05]
KINDS: dict[str, tuple[Callable[..., Detector], Callable[[np.random.Generator, float], np.ndarray]]] = {
    "classifier": (classifier, lambda r, shift: r.normal(size=(BLOCK, D)) + shift),
    "contrasted": (contrasted, lambda r, shift: r.normal(size=(BLOCK, D)) + shift),
    "mmd": (mmd, lambda r, shift: r.normal(size=(BLOCK, D)) + shift),
    "share": (share, lambda r, shift: (r.random(BLOCK) < 0.1 + 0.3 * shift).astype(float)),
    "length": (length, lambda r, shift: np.round(r.gamma(2.0, 5.0 * (1 + shift), BLOCK))),
    "mix": (mix, lambda r, shift: (r.choice(4, BLOCK, p=SHARES[:: -1 if shift else 1])).astype(float)),
}


def feed(detector: Detector, rows: np.ndarray, number: int, day: int = 1) -> None:
    seqs = list(range(number * BLOCK + 1, (number + 1) * BLOCK + 1))
    detector.block(rows.astype(np.float32) if rows.ndim == 2 else rows, seqs, day)


@pytest.mark.parametrize("kind", list(KINDS))
def test_quiet_streams_alarm_no_more_often_than_promised(kind: str) -> None:
    """With N such that the detector's share of the budget of one day is 1 in 10: at most a tenth of the
    streams of a day have an alarm, whatever their length, although the reference is small."""
    make, draw = KINDS[kind]
    runs, blocks, alarms = 150, 60, 0
    for run in range(runs):
        random = np.random.default_rng(run)
        detector = make(random, 1.0)
        detector.threshold = 10 * detector.share * len(detector.purses)
        for number in range(blocks):
            feed(detector, draw(random, 0.0), number)
        assert detector.spent <= detector.share * len(detector.purses) + 1e-9
        alarms += detector.alarm
    assert alarms / runs <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / runs)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_change_is_found_and_stays_found(kind: str) -> None:
    make, draw = KINDS[kind]
    random = np.random.default_rng(3)
    detector = make(random, 365.0, 600)
    for number in range(30):
        feed(detector, draw(random, 0.0), number)
    assert not detector.alarm
    for number in range(30, 70):
        feed(detector, draw(random, 1.0), number)
    assert detector.alarm
    at = detector.alarmed_at
    assert at is not None and at > 30 * BLOCK
    assert detector.p_value < 0.01
    feed(detector, draw(random, 0.0), 70)
    assert detector.alarmed_at == at


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_detector_goes_on_in_another_process_as_if_nothing_had_been(kind: str) -> None:
    make, draw = KINDS[kind]
    one = make(np.random.default_rng(4), 365.0)
    random = np.random.default_rng(5)
    blocks = [draw(random, 0.3 if i > 20 else 0.0) for i in range(40)]
    for number, rows in enumerate(blocks):
        feed(one, rows, number, day=1 + number // 10)
    other = make(np.random.default_rng(4), 365.0)
    for number, rows in enumerate(blocks):
        feed(other, rows, number, day=1 + number // 10)
        again = make(np.random.default_rng(4), 365.0)
        again.restore({name: value.copy() for name, value in other.state().items()})
        other = again
    mine, theirs = one.state(), other.state()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].tobytes() == theirs[name].tobytes(), name


def test_all_equal_rows_are_no_difficulty() -> None:
    held = np.zeros((100, D), dtype=np.float32)
    detector = ClassifierDetector(365.0, held, ranks.gaps_above(100))
    kernel = Kernel.fit(held, np.ones(D))
    features = kernel.features(held)
    other = MmdDetector(365.0, kernel, features.mean(axis=0, dtype=float), null_tails(features, draws=50))
    for number in range(20):
        for each in (detector, other):
            feed(each, np.zeros((BLOCK, D)), number)
    assert not detector.alarm and not other.alarm
    projection = Projection.fit(np.ones((30, 16), dtype=np.float32), np.ones((30, 5)))
    assert np.isfinite(projection.apply(np.full((2, 16), 1e6, np.float32), np.zeros((2, 5)))).all()


def rows_of_kinds(random: np.random.Generator, shares: list[float], n: int) -> tuple[np.ndarray, list[int]]:
    """Rows (n, 40) of kinds that differ in the first five numbers, and their kinds."""
    kinds = random.choice(len(shares), n, p=shares)
    centres = np.random.default_rng(9).normal(size=(len(shares), 40)) * (np.arange(40) < 5)
    return random.normal(size=(n, 40)) + centres[kinds], [int(kind) for kind in kinds]


def test_directions_in_which_kinds_differ() -> None:
    random = np.random.default_rng(0)
    rows, kinds = rows_of_kinds(random, [0.4, 0.3, 0.2, 0.1], 1000)
    rows = ((rows - rows.mean(axis=0)) / rows.std(axis=0)).astype(np.float32)
    found = contrasts(rows, kinds)
    assert 1 <= len(found) <= 3
    assert np.allclose(found @ found.T, np.eye(len(found)), atol=1e-5)
    assert (found[:, :5] ** 2).sum() > 0.8 * len(found)  # by chance 0.125
    assert contrasts(rows, [int(kind) for kind in random.permutation(kinds)]).shape == (0, 40)
    assert contrasts(rows, [0] * 1000).shape == contrasts(rows[:9], kinds[:9]).shape == (0, 40)


def test_a_changed_mix_of_kinds_is_found_sooner_where_they_are_known() -> None:
    before, after = [0.4, 0.3, 0.2, 0.1], [0.36, 0.27, 0.18, 0.19]
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(12):
        random = np.random.default_rng(seed)
        known, kinds = rows_of_kinds(random, before, 6000)
        asked = np.concatenate(
            [rows_of_kinds(random, before, 1000)[0], rows_of_kinds(random, after, 4000)[0]]
        )
        mean, scale = known[:2000].mean(axis=0), known[:2000].std(axis=0)
        known, asked = (((rows - mean) / scale).astype(np.float32) for rows in (known, asked))
        for told in found:
            directions = contrasts(known[:2000], kinds[:2000]) if told else None
            detector = ClassifierDetector(365.0, known[2000:], ranks.gaps_above(4000), directions)
            for number, block in enumerate(asked.reshape(-1, BLOCK, 40)):
                feed(detector, block, number, day=1 + number // 50)
            found[told].append(detector.alarmed_at or math.inf)
    assert all(at > 1000 for at in found[True])
    assert np.median(found[True]) < np.median(found[False])
    assert np.median(found[True]) <= 4000
