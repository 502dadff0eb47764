"""Which right answers of users may become rows of a dataset.

Anybody with an API key can send feedback, so it is a claim: what the source (or a frozen evaluation row) says
about nearly the same input wins, a key that contradicts the source again and again is not believed at all, no
key may give more than its share, and where keys contradict one another none is believed.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ml_assets.datasets.duplicates import NearIndex, fold, shingles
from ml_assets.spec import FeedbackSpec

Row = dict[str, str]
Origin = Literal["source", "feedback", "champion"]

CONTRADICTIONS, CONTRADICTING_SHARE = 5, 0.3
"""A key with so many rows, and such a share of its rows, against the source is not believed."""
BASELINE, RARE = 0.2, 0.01
"""A small change of an input is taken for the same input where the source's own rows rarely change their
target with it: at most this share of those that have such a neighbour, or of all."""
SHORT = 256
"""Characters of an input up to which small changes are looked for; in longer ones shingles show them."""
SAMPLE, CHUNK = 500, 2000
"""Rows of the source that tell what small changes mean; inputs that are compared at a time, for memory."""


@dataclass(frozen=True)
class Said:
    """A right answer as a row. `origin` is `champion` where it is what the model answered itself."""

    row: Row
    key_id: str
    seq: int
    origin: Origin


@dataclass
class Admitted:
    """The rows that may join; and by key: rows given, those against the source, whether it is believed."""

    rows: list[Said] = field(default_factory=list)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)


def admit(
    said: Sequence[Said],
    known: Sequence[Row],
    rules: FeedbackSpec,
    threshold: float,
    input_text: Callable[[Row], str],
    target_text: Callable[[Row], str],
    remove: Callable[[str, Row, str], None],
) -> Admitted:
    """The rows among `said` that may join the rows that are `known`, in an order of their own.

    `threshold` is the Jaccard similarity from which two inputs are one; `target_text` gives two targets one
    text where they are the same answer (`ml_assets.datasets.snapshot.same_target`);
    `remove(reason, row, why)` is told about every row that is left out.
    """
    wanted = _newest_of_each_key(said, input_text, remove)
    inputs = [input_text(row) for row in known] + [input_text(one.row) for one in wanted]
    signatures = [shingles(text) for text in inputs]
    source = _Known(known, inputs[: len(known)], signatures, threshold, target_text)
    result = Admitted()
    unknown: list[tuple[Said, frozenset[str]]] = []
    conflicts: Counter[str] = Counter()
    new, targets = signatures[len(known) :], [target_text(one.row) for one in wanted]
    verdicts = source.judge(inputs[len(known) :], new, targets)
    for one, signature, (verdict, other) in zip(wanted, new, verdicts, strict=True):
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
            unknown.append((one, signature))
    for key, state in result.keys.items():
        state["contradictions"] = n = conflicts[key]
        state["believed"] = n < CONTRADICTIONS or n < CONTRADICTING_SHARE * state["rows"]
    believed = []
    for one, signature in unknown:
        if result.keys[one.key_id]["believed"]:
            believed.append((one, signature))
        else:
            n = conflicts[one.key_id]
            remove(
                "feedback_distrusted", one.row, f"{n} other rows of key {one.key_id} contradict the source"
            )
    own = _without_near(believed, threshold, lambda one: f"{one.key_id} {target_text(one.row)}", remove)
    shared = _without_near(
        _within_share(own, rules, remove), threshold, lambda one: target_text(one.row), remove
    )
    result.rows = _without_disagreement(shared, threshold, input_text, target_text, remove)
    for one in result.rows:
        result.keys[one.key_id]["taken"] += 1
    return result


def loose(text: str) -> str:
    """Letters and digits alone: punctuation, case and spaces do not make an input another one."""
    return "".join(re.findall(r"\w+", fold(text))) or fold(text)


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
        self.index = NearIndex(threshold, signatures)
        self.same: dict[str, set[str]] = defaultdict(set)
        for number, (text, target) in enumerate(zip(inputs, self.targets, strict=True)):
            self.index.add(str(number), signatures[number])
            self.same[loose(text)].add(target)
        sample = range(0, len(inputs), max(1, len(inputs) // SAMPLE))
        self.changes = [
            change for change in (_one_word_less, _one_character_less) if self._keeps_targets(change, sample)
        ]

    def judge(
        self, texts: Sequence[str], signatures: Sequence[frozenset[str]], targets: Sequence[str]
    ) -> list[tuple[Literal["repeats", "contradicts", "is new"], str]]:
        """What each input with a target is to the source, and a target that the source has for it."""
        changed = [self._near(texts, change) for change in self.changes]
        verdicts = []
        for number, (text, target) in enumerate(zip(texts, targets, strict=True)):
            found = set(self.same.get(loose(text), ()))
            found.update(self.targets[int(near)] for near in self.index.similar(signatures[number]))
            if target in found:
                verdicts.append(("repeats", target))
                continue
            for near in changed:
                if target not in near[number]:
                    found |= near[number]
            verdicts.append(("contradicts", min(found)) if found else ("is new", ""))
        return verdicts

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
            for text, target in zip(self.inputs, self.targets, strict=True):
                words = _words(text)
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

    def _keeps_targets(self, change: "_Change", sample: Sequence[int]) -> bool:
        """Whether the source's own rows mostly keep their target when their input changes that little."""
        near = self._near([self.inputs[n] for n in sample], change)
        known = [(self.targets[n], targets) for n, targets in zip(sample, near, strict=True) if targets]
        against = sum(target not in targets for target, targets in known)
        return against <= max(BASELINE * len(known), RARE * len(sample))


_Change = Callable[[str], Iterable[str]]


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", fold(text)))


def _one_word_less(text: str) -> Iterable[str]:
    words = text.split()
    return (" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))) if len(words) > 2 else ()


def _one_character_less(text: str) -> Iterable[str]:
    """Without one letter or space: another digit is another number, not a slip."""
    if len(text) <= 8:
        return ()
    return (text[:i] + text[i + 1 :] for i, char in enumerate(text) if not char.isdigit())


def _without_near(
    said: Sequence[tuple[Said, frozenset[str]]],
    threshold: float,
    group: Callable[[Said], str],
    remove: Callable[[str, Row, str], None],
) -> list[tuple[Said, frozenset[str]]]:
    """Of nearly the same inputs in one group the first; one that is not the model's own answer before one
    that is."""
    index = NearIndex(threshold, [signature for _, signature in said])
    kept = []
    for one, signature in sorted(said, key=lambda pair: (pair[0].origin == "champion", pair[0].seq)):
        if index.find(signature, group(one)) is None:
            index.add(str(one.seq), signature, group(one))
            kept.append((one, signature))
        else:
            remove("feedback_repeats", one.row, "nearly another feedback row, with the same target")
    return kept


def _within_share(
    said: Sequence[tuple[Said, frozenset[str]]], rules: FeedbackSpec, remove: Callable[[str, Row, str], None]
) -> list[tuple[Said, frozenset[str]]]:
    """No key gives more than its share of what all the others give, but `min_rows_per_key` in any case: the
    newest ones."""
    given = Counter(one.key_id for one, _ in said)
    share = rules.max_share_per_key
    kept = []
    taken: Counter[str] = Counter()
    for one, signature in sorted(said, key=lambda pair: -pair[0].seq):
        others = given.total() - given[one.key_id]
        most = given.total() if share == 1 else max(rules.min_rows_per_key, int(share / (1 - share) * others))
        if taken[one.key_id] < most:
            taken[one.key_id] += 1
            kept.append((one, signature))
        else:
            remove("feedback_share", one.row, f"key {one.key_id} gave {given[one.key_id]} rows, {most} count")
    return kept


def _without_disagreement(
    said: Sequence[tuple[Said, frozenset[str]]],
    threshold: float,
    input_text: Callable[[Row], str],
    target_text: Callable[[Row], str],
    remove: Callable[[str, Row, str], None],
) -> list[Said]:
    """Nobody can say which of several targets of one input is right: none stays."""
    index = NearIndex(threshold, [signature for _, signature in said])
    targets: dict[str, set[str]] = defaultdict(set)
    for number, (one, signature) in enumerate(said):
        index.add(str(number), signature)
        targets[loose(input_text(one.row))].add(target_text(one.row))
    kept = []
    for one, signature in said:
        others = {target_text(said[int(number)][0].row) for number in index.similar(signature)}
        others |= targets[loose(input_text(one.row))]
        others.discard(target_text(one.row))
        if others:
            remove("feedback_disagrees", one.row, f"other feedback says {min(others)}")
        else:
            kept.append(one)
    return sorted(kept, key=lambda one: one.seq)
