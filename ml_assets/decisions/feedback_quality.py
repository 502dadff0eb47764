"""Is the feedback what it used to be? Sudden changes that a person should look at before trusting it."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ml_assets.traffic.records import Judged

MIN_ROWS = 30
"""Feedback in the newest window and before it, from which a change can be told from chance."""
DOMINANT, RISE = 0.5, 0.3
"""One key gives most of the window, and its share rose by that much."""
FLOOD = 10.0
"""Feedback per hour, against what it was before."""


@dataclass(frozen=True)
class Finding:
    """Something about the feedback of one customization; `key_id` where it is one key's."""

    kind: str
    text: str
    key_id: str | None = None


def examine(judged: Sequence[Judged], window: int = 100) -> list[Finding]:
    """Compare the newest `window` of feedback (in order) with what was before. Nothing is found while either
    side has fewer than MIN_ROWS."""
    new, old = judged[-window:], judged[:-window]
    if len(new) < MIN_ROWS or len(old) < MIN_ROWS:
        return []
    return [*_dominant(new, old), *_contradicting(new, old), *_disagreeing(new, old), *_flood(new, old)]


def _dominant(new: Sequence[Judged], old: Sequence[Judged]) -> list[Finding]:
    counts, before = (Counter(one.feedback.key_id for one in some) for some in (new, old))
    found = []
    for key, count in counts.most_common(1):
        share, was = count / len(new), before[key] / len(old)
        if share >= DOMINANT and share - was >= RISE:
            found.append(
                Finding(
                    "one_key", f"key {key} gave {share:.0%} of the newest feedback, {was:.0%} before", key
                )
            )
    return found


def _contradicting(new: Sequence[Judged], old: Sequence[Judged]) -> list[Finding]:
    """Right answers that contradict what others said about the same question."""
    said: dict[str, set[str]] = defaultdict(set)
    for one in old:
        if one.feedback.right_answer is not None:
            said[_question(one)].add(_plain(one.feedback.right_answer))
    known = [one for one in new if one.feedback.right_answer is not None and _question(one) in said]
    wrong = [one for one in known if _plain(str(one.feedback.right_answer)) not in said[_question(one)]]
    if len(known) < 10 or len(wrong) < len(known) / 2:
        return []
    key, count = Counter(one.feedback.key_id for one in wrong).most_common(1)[0]
    text = f"{len(wrong)} of {len(known)} right answers contradict what was said about the same question"
    return [Finding("contradictions", f"{text}; {count} of them from key {key}", key)]


def _disagreeing(new: Sequence[Judged], old: Sequence[Judged]) -> list[Finding]:
    """A key whose right answers differ from the champion's answers much more often than everybody's did."""

    def share(some: Sequence[Judged]) -> float | None:
        labelled = [one for one in some if one.feedback.right_answer is not None]
        if len(labelled) < MIN_ROWS:
            return None
        return sum(_plain(str(o.feedback.right_answer)) != _plain(o.request.answer) for o in labelled) / len(
            labelled
        )

    before, found = share(old), []
    if before is None:
        return []
    by_key: dict[str, list[Judged]] = defaultdict(list)
    for one in new:
        by_key[one.feedback.key_id].append(one)
    others = {key: share([one for one in new if one.feedback.key_id != key]) for key in by_key}
    for key, some in by_key.items():
        now, elsewhere = share(some), others[key]
        # where all keys disagree more, the champion got worse, and that is the drift report's to say
        alone = elsewhere is None or elsewhere - before < RISE / 2
        if now is not None and now - before >= RISE and alone and len(by_key) > 1:
            text = (
                f"key {key} disagrees with {now:.0%} of the answers, {before:.0%} were disagreed with before"
            )
            found.append(Finding("disagreement", text, key))
    return found


def _flood(new: Sequence[Judged], old: Sequence[Judged]) -> list[Finding]:
    from datetime import datetime

    def per_hour(some: Sequence[Judged]) -> float:
        times = [datetime.fromisoformat(one.feedback.at) for one in some]
        return len(some) / max((max(times) - min(times)).total_seconds() / 3600, 1 / 60)

    now, before = per_hour(new), per_hour(old)
    if now < FLOOD * before:
        return []
    return [Finding("flood", f"{now:.0f} pieces of feedback an hour, {before:.1f} before")]


def _question(judged: Judged) -> str:
    return _plain(" ".join(message["content"] for message in judged.request.messages))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
