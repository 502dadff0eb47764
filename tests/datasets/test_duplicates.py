import random

from hypothesis import given, settings
from hypothesis import strategies as st

from ml_assets.datasets.duplicates import NearIndex, count_leaks, jaccard, shingles

TEXTS = st.lists(st.text("abc ", min_size=0, max_size=24), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from([0.2, 1 / 3, 0.5, 0.6, 0.75, 0.9, 1.0]))
def test_index_finds_exactly_what_comparing_all_pairs_finds(texts, threshold):
    items = [shingles(text) for text in texts]
    index = NearIndex(threshold, items)
    for number, item in enumerate(items):
        near = [n for n in range(number) if jaccard(items[n], item) >= threshold]
        found = index.find(item)
        assert found == (str(near[0]) if near else None)
        index.add(str(number), item)


def test_only_the_same_group_is_found():
    item = shingles("turn on the kitchen light")
    index = NearIndex(0.9, [item])
    index.add("a", item, "on")
    assert index.find(item, "on") == "a"
    assert index.find(item, "off") is None


def test_similarity_is_of_what_a_reader_sees():
    assert shingles("Turn  ON the\nlight ") == shingles("turn on the light")
    assert jaccard(shingles("hi"), shingles("hi")) == 1
    assert jaccard(shingles(""), shingles("")) == 1
    assert jaccard(shingles("abcdef"), shingles("uvwxyz")) == 0


def news(count: int, seed: int) -> list[str]:
    """Texts of 40 words, each drawn on its own."""
    rng = random.Random(seed)
    vocabulary = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)
    ]
    return [" ".join(rng.choices(vocabulary, k=40)) for _ in range(count)]


def test_planted_near_duplicates_are_found_and_clean_pairs_are_not():
    evaluation, train = news(400, 1), news(1600, 2)
    assert count_leaks(train, evaluation, 0.9) == 0
    rng = random.Random(3)
    planted = []
    for text in evaluation[:200]:
        words = text.split()
        short = [n for n, word in enumerate(words) if len(word) <= 5]
        words[rng.choice(short)] = "x"
        planted.append(" ".join(words))
    index = NearIndex(0.9, [shingles(text) for text in [*evaluation, *planted]])
    for text in evaluation:
        index.add(text, shingles(text))
    found = [index.find(shingles(text)) for text in planted]
    assert found == evaluation[:200], "one changed word in forty"
    # the independent measure works on estimates: it may miss a few, and invents none
    assert 190 <= count_leaks([*train, *planted], evaluation, 0.9) <= 200
    assert count_leaks(evaluation[:7], evaluation, 1.0) == 7
    assert count_leaks([], evaluation, 0.9) == count_leaks(train, [], 0.9) == 0
