from hypothesis import given
from hypothesis import strategies as st

from ml_assets.datasets.split import is_evaluation


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_only_moves_rows_to_evaluation(key, one, other):
    low, high = sorted((one, other))
    assert is_evaluation(key, low) <= is_evaluation(key, high)
    assert not is_evaluation(key, 0)
    assert is_evaluation(key, 1)


def test_the_share_is_what_was_asked_for():
    for share in (0.05, 0.2, 0.5):
        found = sum(is_evaluation(f"row {number}", share) for number in range(20_000)) / 20_000
        assert abs(found - share) < 0.01


def test_sides_are_the_same_for_ever():
    """Another function would move rows of every dataset that exists."""
    assert "".join(str(int(is_evaluation(f"row {n}", 0.3))) for n in range(24)) == "000101000101000110101010"
