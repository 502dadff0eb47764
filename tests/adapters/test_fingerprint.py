"""How far a measured value may be from a fingerprint."""

from hypothesis import assume, given
from hypothesis import strategies as st

from ml_assets.adapters.fingerprint import MIN_EFFECT, TOLERANCE, make_fingerprint, matches, tolerances

logprobs = st.floats(-60, -0.001)
pairs = st.lists(st.tuples(logprobs, logprobs), min_size=1, max_size=4)


@given(pairs)
def test_the_bare_base_is_never_taken_for_the_adapter(values: list[tuple[float, float]]) -> None:
    assume(max(abs(a - b) for a, b in values) >= MIN_EFFECT)
    with_adapter, without = [a for a, _ in values], [b for _, b in values]
    fingerprint = make_fingerprint([{"answer": "x"}] * len(values), with_adapter, without)
    assert matches(fingerprint, with_adapter) and matches(fingerprint, without, "without")
    assert not matches(fingerprint, without) and not matches(fingerprint, with_adapter, "without")


def test_an_unlikely_answer_may_differ_by_more() -> None:
    probes = [{"answer": "x"}] * 3
    fingerprint = make_fingerprint(probes, [-0.2, -3.0, -4.0], [-3.6, -4.0, -4.22])
    # 2 % of an unlikely answer, but at most a quarter of what the adapter changes
    assert [round(one, 4) for one in tolerances(fingerprint)] == [TOLERANCE, 0.06, 0.055]
    assert [round(one, 4) for one in tolerances(fingerprint, "without")] == [0.072, 0.08, 0.055]
    assert matches(fingerprint, [-0.24, -3.05, -4.05]) and not matches(fingerprint, [-0.26, -3.05, -4.05])
    assert not matches(fingerprint, [-0.2, -3.0])
