"""Texts that are nearly the same: Jaccard similarity of their character 5-grams.

Characters rather than words, so that one changed word in a long text still counts as the same text, and one
changed word in a short command (which is another command) does not.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from zlib import crc32

SHINGLE = 5

Shingles = frozenset[str]


def fold(text: str) -> str:
    """Case and white space do not make a text another one."""
    return " ".join(text.casefold().split())


def shingles(text: str) -> Shingles:
    """The character 5-grams of a text (the text itself when it is shorter)."""
    padded = f" {fold(text)} "
    return frozenset(padded[i : i + SHINGLE] for i in range(max(1, len(padded) - SHINGLE + 1)))


def jaccard(one: Shingles, other: Shingles) -> float:
    """Size of the intersection over size of the union, 0 to 1."""
    common = len(one & other)
    return common / (len(one) + len(other) - common)


class NearIndex:
    """Finds a text that is at least `threshold` similar to a given one; misses none.

    Prefix filter with a length filter (Bayardo, Ma, Srikant: Scaling up all pairs similarity search, WWW
    2007): with shingles ordered from rare to frequent, two sets can only be `threshold` similar if they share
    one of their first n - ceil(threshold n) + 1 shingles. `everything` holds all sets in question.
    """

    def __init__(self, threshold: float, everything: Iterable[Shingles]) -> None:
        self.threshold = threshold
        frequency = Counter(shingle for item in everything for shingle in item)
        ordered = sorted(frequency, key=lambda shingle: (frequency[shingle], shingle))
        self.rank = {shingle: number for number, shingle in enumerate(ordered)}
        self.items: list[Shingles] = []
        self.keys: list[str] = []
        self.index: dict[tuple[str, str], list[int]] = defaultdict(list)

    def add(self, key: str, item: Shingles, group: str = "") -> None:
        """Put a text in; it is found only for texts of the same group."""
        for shingle in self._prefix(item):
            self.index[group, shingle].append(len(self.items))
        self.items.append(item)
        self.keys.append(key)

    def find(self, item: Shingles, group: str = "") -> str | None:
        """The key of a similar text, the first one added; or None."""
        return next(self.similar(item, group), None)

    def similar(self, item: Shingles, group: str = "") -> Iterator[str]:
        """The keys of all similar texts, in the order in which they were added."""
        candidates: set[int] = set()
        for shingle in self._prefix(item):
            candidates.update(self.index.get((group, shingle), ()))
        low, high = self.threshold * len(item), len(item) / self.threshold
        for number in sorted(candidates):
            other = self.items[number]
            if low <= len(other) <= high and jaccard(item, other) >= self.threshold:
                yield self.keys[number]

    def _prefix(self, item: Shingles) -> list[str]:
        length = len(item) - math.ceil(self.threshold * len(item) - 1e-9) + 1
        return sorted(item, key=self.rank.__getitem__)[:length]


def count_leaks(train: Sequence[str], evaluation: Sequence[str], threshold: float) -> int:
    """Training texts that are nearly an evaluation text, measured by other means than `NearIndex`: MinHash
    and locality-sensitive hashing find the candidates (Broder 1997; datasketch), which are then compared
    exactly."""
    from datasketch import MinHash, MinHashLSH

    if not train or not evaluation:
        return 0
    # candidates well below the threshold, because the hashes estimate
    index = MinHashLSH(threshold=max(0.1, threshold - 0.15), num_perm=64)
    held_out = [shingles(text) for text in evaluation]
    encoded = ([shingle.encode() for shingle in item] for item in held_out)
    with index.insertion_session() as session:
        for number, signature in enumerate(MinHash.generator(encoded, num_perm=64, hashfunc=crc32)):
            session.insert(str(number), signature)
    trained = [shingles(text) for text in train]
    encoded = ([shingle.encode() for shingle in item] for item in trained)
    return sum(
        any(jaccard(item, held_out[int(str(number))]) >= threshold for number in index.query(signature))
        for item, signature in zip(
            trained, MinHash.generator(encoded, num_perm=64, hashfunc=crc32), strict=True
        )
    )
