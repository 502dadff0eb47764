"""From tokens to text while they arrive, without a broken character and without a stop string."""

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Decodes a growing answer. The pieces of `push` and `finish` joined are `decode` of all tokens, without
    the white space it begins with.

    A token may end inside a character, so text is held back until its last character is whole. Only the
    tokens since the last but one boundary are decoded again (some tokenizers need a token before to tell
    whether a word starts with a space).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._from = 0
        self._to = 0
        self._started = False

    def push(self, token: int) -> str:
        """The text that this token completes; often empty."""
        self._ids.append(token)
        new = self._new()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._from, self._to = self._to, len(self._ids)
        return self._begun(new)

    def finish(self) -> str:
        """The rest: bytes that never became a character."""
        return self._begun(self._new())

    def _new(self) -> str:
        before = self._decode(self._ids[self._from : self._to])
        return self._decode(self._ids[self._from :])[len(before) :]

    def _begun(self, text: str) -> str:
        """`text` without white space at the start of the answer."""
        if not self._started:
            text = text.lstrip()
        self._started = self._started or bool(text)
        return text


class TrailingSpace:
    """Holds white space back until something follows it, so that an answer does not end in it. It comes after
    the stop strings, which may be white space themselves."""

    def __init__(self) -> None:
        self._blank = ""

    def push(self, text: str) -> str:
        text = self._blank + text
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        return kept


class StopStrings:
    """Lets text through up to the stop string that is complete first; what may become one is held back."""

    def __init__(self, stops: Sequence[str]):
        self._stops = list(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        if self.found or not self._stops:
            return "" if self.found else text
        for character in text:  # one by one, so that it does not matter how the text was cut into pieces
            self._held += character
            complete = [len(stop) for stop in self._stops if self._held.endswith(stop)]
            if complete:
                self.found = True
                return self._take(len(self._held) - max(complete))
        longest = max(self._overlap(stop) for stop in self._stops)
        return self._take(len(self._held) - longest)

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        return "" if self.found else self._take(len(self._held))

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        for n in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:n]):
                return n
        return 0

    def _take(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        return text
