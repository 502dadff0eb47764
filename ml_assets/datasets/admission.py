"""Which right answers of users may become rows of a dataset.

Anybody with an API key can send feedback, so it is a claim: what the source says about nearly the same input
wins, a key that contradicts the source again and again is not believed at all, no key may give more than its
share, and where keys contradict one another none is believed. The operator's labels are bound by the source
alone.
"""

import heapq
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from zlib import crc32

from ml_assets.datasets.duplicates import NearIndex, fold, shingles
from ml_assets.spec import FeedbackSpec
from ml_assets.traffic.records import OPERATOR

Row = dict[str, str]
Origin = Literal["source", "feedback", "champion"]

CONTRADICTIONS, CONTRADICTING_SHARE = 5, 0.3
"""A key with so many rows, and such a share of its rows, against the source is not believed."""
BASELINE, RARE = 0.2, 0.01
"""A small change of an input is taken for the same input where the source's own rows rarely change their
target with it: at most this share of those that have such a neighbour, or of all."""
SHORT, LONGEST_WORD = 256, 32
"""Characters of an input, and of a word, up to which small changes are looked for; in longer inputs shingles
show them."""
SAMPLE, CHUNK = 500, 2000
"""Rows of the source that tell what small changes mean; inputs that are compared at a time, for memory."""
CLAIMS, SKETCH = 200, 2048
"""Newest answers of a key that are looked at where its share allows fewer; shingles of a text that are
compared: no single key can make a build run out of time or memory."""
ALIKE, LONGEST = 0.75, 1024
"""Inputs are alike from this share of the source's trigrams; characters up to which they are looked at."""
LEEWAY, UNUSUAL, FEW = 2, 0.005, 5
"""A key may answer otherwise than the source does for the inputs most like its own: so many times as often as
the source itself does. Beyond that all keys together may so many rows, as a share of the source's rows and of
all such answers, or these few: a flood is no larger for a large source."""


@dataclass(frozen=True)
class Said:
    """A right answer as a row. `origin` is `champion` where it is what the model answered itself."""

    row: Row
    key_id: str
    seq: int
    origin: Origin


@dataclass
class Admitted:
    """The rows that may join; those from before that the operator's labels contradict; and by key: rows
    looked at, those against the source, whether it is believed."""

    rows: list[Said] = field(default_factory=list)
    overruled: list[Said] = field(default_factory=list)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)


def admit(
    said: Sequence[Said],
    known: Sequence[Row],
    standing: Sequence[Said],
    rules: FeedbackSpec,
    threshold: float,
    input_text: Callable[[Row], str],
    target_text: Callable[[Row], str],
    evaluates: Callable[[Row], bool],
    remove: Callable[[str, Row, str], None],
) -> Admitted:
    """The rows among `said` that may join the source's, which are `known`, in an order of their own.

    `standing` are evaluation rows that came from feedback before. They stay, and count in what their keys may
    give for evaluation (`evaluates` tells of a row whether it would), but are no more than claims: who
    contradicts them does not contradict the source.
    `threshold` is the Jaccard similarity from which two inputs are one; `target_text` gives two targets one
    text where they are the same answer (`ml_assets.datasets.snapshot.same_target`);
    `remove(reason, row, why)` is told about every row that is left out.
    """
    wanted = _newest_of_each_key(said, input_text, remove)
    wanted = _no_more_than_could_join(wanted, rules, remove)
    inputs = [*map(input_text, known), *(input_text(one.row) for one in wanted)]
    signatures = [_signature(text) for text in inputs]
    source = _Known(known, inputs[: len(known)], signatures, threshold, target_text)
    result = Admitted()
    unknown: list[_Claim] = []
    conflicts: Counter[str] = Counter()
    new = [
        _Claim(one, text, signature, target_text(one.row))
        for one, text, signature in zip(wanted, inputs[len(known) :], signatures[len(known) :], strict=True)
    ]
    for claim, (verdict, other) in zip(new, source.judge(new), strict=True):
        one = claim.said
        state = result.keys.setdefault(
            one.key_id, {"rows": 0, "contradictions": 0, "believed": True, "taken": 0}
        )
        state["rows"] += 1
        if verdict == "repeats":
            remove("feedback_repeats", one.row, "the source has it")
        elif verdict == "contradicts":
            conflicts[one.key_id] += 1
            remove("feedback_conflict", one.row, f"the source says {other}")
        else:
            unknown.append(claim)
    for key, state in result.keys.items():
        state["contradictions"] = n = conflicts[key]
        few = n < CONTRADICTIONS or n < CONTRADICTING_SHARE * state["rows"]
        state["believed"] = few or key == OPERATOR
    believed: list[_Claim] = []
    for claim in unknown:
        key = claim.said.key_id
        if result.keys[key]["believed"]:
            believed.append(claim)
        else:
            why = f"{conflicts[key]} other rows of key {key} contradict the source"
            remove("feedback_distrusted", claim.said.row, why)
    before = [
        _Claim(one, text, _signature(text), target_text(one.row))
        for one, text in ((one, input_text(one.row)) for one in standing)
    ]
    trusted = [claim for claim in believed if claim.said.key_id == OPERATOR]
    result.overruled = [one.said for one, other in _contradicted(before, trusted, threshold) if other]
    stays = [one for one, other in _contradicted(before, trusted, threshold) if not other]
    believed = _without_disagreement(believed, stays, threshold, remove)
    own = _without_near(believed, stays, threshold, lambda one: f"{one.said.key_id} {one.target}", remove)
    own = _within_doubt(own, source, remove)
    shared = _within_share(own, Counter(one.said.key_id for one in stays), rules, evaluates, remove)
    shared = _without_near(shared, stays, threshold, lambda one: one.target, remove)
    agreed = _without_disagreement(shared, shared, threshold, remove)
    result.rows = [claim.said for claim in sorted(agreed, key=lambda claim: claim.said.seq)]
    for one in result.rows:
        result.keys[one.key_id]["taken"] += 1
    return result


@dataclass(frozen=True)
class _Claim:
    """A right answer with its input, the shingles of that, and its target, as they are compared."""

    said: Said
    text: str
    signature: frozenset[str]
    target: str


def _signature(text: str) -> frozenset[str]:
    """The shingles of a text; of a long one a sample that is the same for nearly the same text (the bottom-k
    sketch of Broder 1997)."""
    found = shingles(_plain(text).replace("_", " "))
    if len(found) <= SKETCH:
        return found
    return frozenset(heapq.nsmallest(SKETCH, found, key=lambda shingle: (crc32(shingle.encode()), shingle)))


def loose(text: str) -> str:
    """Letters and digits alone, with digits as the letters that they resemble: punctuation, case, spaces,
    marks and alphabets do not make an input another one."""
    return _words(text).replace(" ", "").translate(_DIGITS) or fold(text)


def _plain(text: str) -> str:
    """In lower case, without marks and invisible characters, and with Latin letters for those of other forms
    and alphabets that look like them (the commonest of Unicode's confusables, UTS 39)."""
    if text.isascii():
        return fold(text)
    folded = unicodedata.normalize("NFKD", fold(unicodedata.normalize("NFKD", text)))
    shown = (char for char in _MARKS.sub("", folded) if unicodedata.category(char) != "Cf")
    return "".join(shown).translate(_LETTERS)


_MARKS = re.compile(
    "[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)
"""Marks on letters; those of Indic scripts and the like are no ornament."""
_LETTERS = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u04bb\u0501\u051b\u051d\u043a\u043c\u043d\u0442\u0432"
    "\u03b1\u03bf\u03c1\u03b5\u03bd\u03b9\u03ba\u03c4\u03c5\u03c7\u03b3\u0131\u0251\u0261\u00f8\u0142\u0111",
    "aeopcyxijshdqwkmhtbaopeviktuxyiagold",
)
_DIGITS = str.maketrans("013457", "oieast")


def _newest_of_each_key(
    said: Sequence[Said], input_text: Callable[[Row], str], remove: Callable[[str, Row, str], None]
) -> list[Said]:
    newest: dict[tuple[str, str], Said] = {}
    for one in sorted(said, key=lambda one: one.seq):
        place = one.key_id, loose(input_text(one.row))
        if place in newest:
            remove("feedback_repeats", newest[place].row, "the same key said it again, or something else")
        newest[place] = one
    return sorted(newest.values(), key=lambda one: one.seq)


def _no_more_than_could_join(
    said: Sequence[Said], rules: FeedbackSpec, remove: Callable[[str, Row, str], None]
) -> list[Said]:
    """Of each key the newest of what it said: many more than could join."""
    given = Counter(one.key_id for one in said)
    looked_at: Counter[str] = Counter()
    kept: list[Said] = []
    for one in reversed(said):
        key = one.key_id
        most = max(CLAIMS, 20 * rules.min_rows_per_key, 2 * _share(given.total() - given[key], rules))
        if key == OPERATOR or rules.max_share_per_key == 1 or looked_at[key] < most:
            looked_at[key] += 1
            kept.append(one)
        else:
            remove("feedback_share", one.row, f"key {key} gave {given[key]} rows, {most} are looked at")
    return kept[::-1]


def _share(others: int, rules: FeedbackSpec) -> int:
    """Rows that a key may give beside those of the others; its share is below 1."""
    share = min(rules.max_share_per_key, 0.999)
    return max(rules.min_rows_per_key, int(share / (1 - share) * others))


class _Known:
    """What the source says about inputs, or about nearly the same ones."""

    def __init__(
        self,
        rows: Sequence[Row],
        inputs: Sequence[str],
        signatures: Sequence[frozenset[str]],
        threshold: float,
        target_text: Callable[[Row], str],
    ) -> None:
        self.targets = [target_text(row) for row in rows]
        self.inputs = list(inputs)
        self.words = [_words(text) for text in inputs]
        self.index = NearIndex(threshold, signatures)
        self.same: dict[str, set[str]] = defaultdict(set)
        for number, (text, target) in enumerate(zip(inputs, self.targets, strict=True)):
            self.index.add(str(number), signatures[number])
            self.same[loose(text)].add(target)
        self.vocabulary = Counter(word for words in self.words for word in set(words.split()))
        self.spellings: dict[str, list[str]] = defaultdict(list)
        for word, _ in sorted(self.vocabulary.items(), key=lambda pair: (-pair[1], pair[0])):
            if len(word) <= LONGEST_WORD:
                for part in {word, *_letter_less(word)}:
                    self.spellings[part].append(word)
        self.sample = range(0, len(inputs), max(1, len(inputs) // SAMPLE))
        self.changes = [
            change for change in (_one_word_less, _one_character_less) if self._keeps_targets(change)
        ]
        self.misspells = self._respelling_keeps_targets()
        self.grams: dict[str, Any] | None = None
        self.sizes: Any = None

    def judge(
        self, claims: Sequence["_Claim"]
    ) -> list[tuple[Literal["repeats", "contradicts", "is new"], str]]:
        """What each claim is to the source, and a target that the source has for its input."""
        changed = [self._near([claim.text for claim in claims], change) for change in self.changes]
        verdicts = []
        for number, claim in enumerate(claims):
            target = claim.target
            found = set(self.same.get(loose(claim.text), ()))
            found.update(self.targets[int(near)] for near in self.index.similar(claim.signature))
            if self.misspells and (spelled := self._respelled(_words(claim.text))):
                found |= self.same.get(loose(spelled), set())
            if target in found:
                verdicts.append(("repeats", target))
                continue
            for near in changed:
                if target not in near[number]:
                    found |= near[number]
            verdicts.append(("contradicts", min(found)) if found else ("is new", ""))
        return verdicts

    def is_against(self, text: str, target: str, but: int | None = None) -> bool:
        """Whether the source (`but` for one row) has inputs like this one, and another target for those that
        are most like it."""
        import numpy as np

        if self.grams is None:
            found = [_grams(one) for one in self.inputs]
            rows: dict[str, list[int]] = defaultdict(list)
            for number, some in enumerate(found):
                for gram in some:
                    rows[gram].append(number)
            self.grams = {gram: np.array(numbers) for gram, numbers in rows.items()}
            self.sizes = np.array([max(1, len(some)) for some in found])
        wanted = _grams(text)
        common = np.zeros(len(self.inputs))
        for gram in wanted & self.grams.keys():
            common[self.grams[gram]] += 1
        # words around a known input leave it alike; a short one is in many a long one
        alike = common / np.maximum(self.sizes, 0.6 * len(wanted))
        if but is not None:
            alike[but] = 0
        best = alike.max(initial=0)
        if best < ALIKE:
            return False
        return target not in {self.targets[number] for number in np.flatnonzero(alike == best)}

    def usual_doubt(self) -> float:
        """How many of the source's own rows it is against in this way, for each that it is not."""
        against = sum(self.is_against(self.inputs[n], self.targets[n], but=n) for n in self.sample)
        return against / max(1, len(self.sample) - against)

    def _near(self, texts: Sequence[str], less: "_Change") -> list[set[str]]:
        """For each text the targets of the source's inputs that are one change away (the deletion
        neighbourhood of Mor and Fraenkel 1982)."""
        near: list[set[str]] = [set() for _ in texts]
        for start in range(0, len(texts), CHUNK):
            whole: dict[str, list[int]] = defaultdict(list)
            shorter: dict[str, list[int]] = defaultdict(list)
            wholes = {n: _words(texts[n]) for n in range(start, min(start + CHUNK, len(texts)))}
            for number, words in wholes.items():
                if len(words) <= SHORT:
                    whole[words].append(number)
                    for part in set(less(words)):
                        shorter[part].append(number)
            for words, target in zip(self.words, self.targets, strict=True):
                if len(words) > SHORT + 1:
                    continue
                found = [*shorter.get(words, ())]
                for part in less(words):
                    found += whole.get(part, ())
                    if less is _one_character_less:  # another character in its place
                        found += shorter.get(part, ())
                for number in found:
                    if wholes[number] != words:
                        near[number].add(target)
        return near

    def _respelled(self, words: str, seen: int = 1) -> str:
        """The words with those that fewer rows of the source have than `seen` as its own that differ by a
        letter, or as two of them where a letter stands for a space; "" when there are none."""
        spelled: list[str] = []
        for word in words.split():
            if self.vocabulary[word] >= seen or len(word) > LONGEST_WORD or not word.isalpha():
                spelled.append(word)
                continue
            parts = (word, *_letter_less(word))
            others = (other for part in parts for other in self.spellings.get(part, ()) if other != word)
            halves = (
                f"{word[:i]} {word[i + 1 :]}"
                for i in range(1, len(word) - 1)
                if word[:i] in self.vocabulary and word[i + 1 :] in self.vocabulary
            )
            spelled.append(next(others, None) or next(halves, word))
        result = " ".join(spelled)
        return result if result != words else ""

    def _respelling_keeps_targets(self) -> bool:
        """Whether the source's own rows mostly keep their target when a rare word is taken for a slip."""
        known = [
            (self.targets[n], self.same[loose(spelled)])
            for n in self.sample
            if (spelled := self._respelled(self.words[n], seen=2)) and loose(spelled) in self.same
        ]
        return self._few(sum(target not in targets for target, targets in known), len(known))

    def _few(self, against: int, known: int) -> bool:
        return against <= max(BASELINE * known, RARE * len(self.sample))

    def _keeps_targets(self, change: "_Change") -> bool:
        """Whether the source's own rows mostly keep their target when their input changes that little."""
        near = self._near([self.inputs[n] for n in self.sample], change)
        known = [(self.targets[n], targets) for n, targets in zip(self.sample, near, strict=True) if targets]
        return self._few(sum(target not in targets for target, targets in known), len(known))


_Change = Callable[[str], Iterable[str]]


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", _plain(text)))


def _grams(text: str) -> frozenset[str]:
    padded = f" {_words(text)} "
    return frozenset(padded[i : i + 3] for i in range(len(padded) - 2) if len(padded) <= LONGEST)


def _letter_less(word: str) -> Iterable[str]:
    return (word[:i] + word[i + 1 :] for i in range(len(word))) if len(word) > 2 else ()


def _one_word_less(text: str) -> Iterable[str]:
    words = text.split()
    return (" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))) if len(words) > 2 else ()


def _one_character_less(text: str) -> Iterable[str]:
    """Without one letter or space: another digit is another number, not a slip."""
    if len(text) <= 8:
        return ()
    return (text[:i] + text[i + 1 :] for i, char in enumerate(text) if not char.isdigit())


def _without_near(
    claims: Sequence[_Claim],
    standing: Sequence[_Claim],
    threshold: float,
    group: Callable[[_Claim], str],
    remove: Callable[[str, Row, str], None],
) -> list[_Claim]:
    """Of nearly the same inputs in one group the first, where none is in `standing`; the operator's before
    others, and one that is not the model's own answer before one that is."""
    index = NearIndex(threshold, [claim.signature for claim in [*claims, *standing]])
    for claim in standing:
        index.add(str(claim.said.seq), claim.signature, group(claim))
    kept = []

    def order(claim: _Claim) -> tuple[bool, bool, int]:
        return claim.said.key_id != OPERATOR, claim.said.origin == "champion", claim.said.seq

    for claim in sorted(claims, key=order):
        if index.find(claim.signature, group(claim)) is None:
            index.add(str(claim.said.seq), claim.signature, group(claim))
            kept.append(claim)
        else:
            remove("feedback_repeats", claim.said.row, "nearly another feedback row, with the same target")
    return kept


def _within_doubt(
    claims: Sequence[_Claim], source: _Known, remove: Callable[[str, Row, str], None]
) -> list[_Claim]:
    """Honest answers to new inputs differ from those to the inputs most like them about as often as the
    source's own. More of them look like changed inputs with a wrong target: of those few stay, however many
    keys send them, first from the keys that send the fewest."""
    doubtful = [
        claim
        for claim in claims
        if claim.said.key_id != OPERATOR and source.is_against(claim.text, claim.target)
    ]
    if not doubtful:
        return list(claims)
    given, doubted = (Counter(claim.said.key_id for claim in some) for some in (claims, doubtful))
    usual = LEEWAY * source.usual_doubt()
    most = {key: int(usual * (given[key] - doubted[key])) for key in doubted}
    more = max(FEW, int(UNUSUAL * min(len(source.inputs), len(doubtful))))
    taken: Counter[str] = Counter()
    gone: set[int] = set()
    for claim in sorted(
        doubtful, key=lambda one: (doubted[one.said.key_id] / given[one.said.key_id], -one.said.seq)
    ):
        key = claim.said.key_id
        if taken[key] < most[key]:
            taken[key] += 1
        elif more:
            more -= 1
        else:
            gone.add(claim.said.seq)
            why = (
                f"{doubted[key]} of {given[key]} rows of key {key} differ from the source's inputs like them"
            )
            remove("feedback_doubtful", claim.said.row, why)
    return [claim for claim in claims if claim.said.seq not in gone]


def _within_share(
    claims: Sequence[_Claim],
    standing: Counter[str],
    rules: FeedbackSpec,
    evaluates: Callable[[Row], bool],
    remove: Callable[[str, Row, str], None],
) -> list[_Claim]:
    """No key gives more than its share of what all the others give, but `min_rows_per_key` in any case: the
    newest ones. Its evaluation rows are no more with those from before, which stay for ever; these leave its
    training rows alone, or in the end all that it says would evaluate and nothing would train."""
    given = standing + Counter(claim.said.key_id for claim in claims)
    taken: Counter[str] = Counter()
    evaluating = standing.copy()
    kept = []
    for claim in sorted(claims, key=lambda claim: -claim.said.seq):
        key = claim.said.key_id
        most = _share(given.total() - given[key], rules)
        held_out = evaluates(claim.said.row)
        fits = taken[key] < most and not (held_out and evaluating[key] >= most)
        if key == OPERATOR or rules.max_share_per_key == 1 or fits:
            taken[key] += 1
            evaluating[key] += held_out
            kept.append(claim)
        else:
            remove("feedback_share", claim.said.row, f"key {key} gave {given[key]} rows, {most} count")
    return kept


def _without_disagreement(
    claims: Sequence[_Claim],
    others: Sequence[_Claim],
    threshold: float,
    remove: Callable[[str, Row, str], None],
) -> list[_Claim]:
    """Nobody can say which of several targets of one input is right: no claim stays that one of the `others`
    contradicts. The operator can."""
    trusted = [claim for claim in others if claim.said.key_id == OPERATOR]
    kept: list[_Claim] = []
    for of_operator, among in ((True, trusted), (False, others)):
        some = [claim for claim in claims if (claim.said.key_id == OPERATOR) is of_operator]
        for claim, other in _contradicted(some, among, threshold):
            if other is None:
                kept.append(claim)
            else:
                remove("feedback_disagrees", claim.said.row, f"other feedback says {other}")
    return kept


def _contradicted(
    claims: Sequence[_Claim], others: Sequence[_Claim], threshold: float
) -> Iterable[tuple[_Claim, str | None]]:
    """Each claim, and another target that one of the `others` has for nearly the same input, if any has."""
    index = NearIndex(threshold, [claim.signature for claim in [*claims, *others]])
    targets: dict[str, set[str]] = defaultdict(set)
    for number, claim in enumerate(others):
        index.add(str(number), claim.signature)
        targets[loose(claim.text)].add(claim.target)
    for claim in claims:
        found = {others[int(number)].target for number in index.similar(claim.signature)}
        found |= targets.get(loose(claim.text), set())
        yield claim, min(found - {claim.target}, default=None)
