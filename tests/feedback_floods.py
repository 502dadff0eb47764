"""Feedback as the traffic database would give it, and floods of it that mean harm."""

import random
from collections.abc import Callable, Sequence

from ml_assets.traffic.records import FeedbackRecord, Judged, TrafficRecord


class Said:
    """Feedback as the traffic database would give it."""

    def __init__(self) -> None:
        self.judged: list[Judged] = []

    def add(self, text: str, right: str | None, key: str = "key", answer: str = "?", **metadata: str) -> None:
        seq = len(self.judged) + 1
        request = TrafficRecord(
            id=f"chatcmpl-{seq}", at="2026-11-26T00:00:00+00:00", customization="home", key_id=key,
            adapter_digest="a", base_revision="b", messages=[{"role": "user", "content": text}],
            answer=answer, status=200, finish_reason="stop", prompt_tokens=1, completion_tokens=1,
            latency_ms=1.0, first_token_ms=1.0, mean_logprob=-0.1, metadata=metadata, seq=seq,
        )  # fmt: skip
        rating = None if right is not None else 1
        self.judged.append(
            Judged(request, FeedbackRecord(request.id, request.at, "home", key, rating, right, seq))
        )


def _typo(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text))
    return text[:at] + rng.choice("abcdefgh") + text[at + 1 :]


_CYRILLIC = str.maketrans("aeocpi", "\u0430\u0435\u043e\u0441\u0440\u0456")
_ACCENTS = str.maketrans({"a": "\u00e1", "e": "\u00e9"})
_BOLD = {ord("a") + n: chr(0x1D41A + n) for n in range(26)}
_WIDE = {n: chr(n + 0xFEE0) for n in range(0x21, 0x7F)}

DISGUISES: dict[str, Callable[[random.Random, str], str]] = {
    "same": lambda rng, text: text,
    "mark": lambda rng, text: text + rng.choice(["!", "?", " .", "..."]),
    "case": lambda rng, text: text.upper(),
    "polite": lambda rng, text: f"{rng.choice(['please', 'kindly', 'hey'])} {text}",
    "number": lambda rng, text: f"{text} {rng.randrange(1000)}",
    "typo": _typo,
    "without": lambda rng, text: text.replace(" the ", " ", 1),
    "cyrillic": lambda rng, text: text.translate(_CYRILLIC),
    "full width": lambda rng, text: text.translate(_WIDE),
    "bold": lambda rng, text: text.translate(_BOLD),
    "accents": lambda rng, text: text.translate(_ACCENTS),
    "struck": lambda rng, text: "".join(f"{char}\u0335" if char.isalpha() else char for char in text),
    "dotless": lambda rng, text: text.replace("i", "\u0131"),
    "leet": lambda rng, text: text.replace("o", "0").replace("i", "1"),
    "underscores": lambda rng, text: text.replace(" ", "_"),
    "backwards": lambda rng, text: " ".join(reversed(text.split())),
    "words around": lambda rng, text: f"hey please {text} thanks",
    "two typos": lambda rng, text: _typo(rng, _typo(rng, text)),
    "twice": lambda rng, text: f"{text} {text.split()[-1]}",
}


def poison(
    said: Said,
    rng: random.Random,
    known: Sequence[tuple[str, str]],
    labels: Sequence[str],
    disguise: str,
    count: int = 1000,
    keys: int = 1,
) -> set[tuple[str, str]]:
    """Let `keys` claim wrong labels for near-duplicates of `known` (text, label); returns their claims.
    `disguise` is one of DISGUISES, or `mixed`."""
    claims = set()
    for n in range(count):
        text, label = known[n % len(known)]
        wrong = rng.choice([other for other in labels if other != label])
        kind = rng.choice(list(DISGUISES)) if disguise == "mixed" else disguise
        claim = DISGUISES[kind](rng, text), wrong
        claims.add(claim)
        said.add(*claim, key=f"poisoner {n % keys}" if keys > 1 else "poisoner")
    return claims
