"""Examples before a question: what a prompt-only adapter is, in evaluation and at the endpoint alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = Mapping[str, str]
Pair = tuple[str, str]
"""What a user said, and the right answer."""


@dataclass(frozen=True)
class Examples:
    """The examples of one prompt-only adapter, the most helpful first. `answer_tokens` are left free for the
    answer: where a conversation is so long that not all examples fit, the least helpful are left out."""

    pairs: tuple[Pair, ...] = ()
    answer_tokens: int = 0

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def before(
        self, messages: Sequence[Message], tokens: Callable[[list[Message]], int], context: int
    ) -> list[Message]:
        """The conversation with as many examples as leave room in the context, after its system message.
        `tokens` counts a conversation's."""
        chosen = self.pairs
        for n in range(len(chosen), 0, -1):
            longer = put_before(messages, chosen[:n])
            if tokens(longer) + self.answer_tokens <= context:
                return longer
        return list(messages)


def put_before(messages: Sequence[Message], pairs: Sequence[Pair]) -> list[Message]:
    """`pairs` as earlier turns of a conversation, after the system messages it begins with."""
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns: list[Message] = []
    for asked, answered in pairs:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages[:start], *turns, *messages[start:]]


def is_prompted(manifest: Mapping[str, Any]) -> bool:
    """Whether an adapter has examples instead of weights."""
    return manifest.get("kind") == "prompt"


def read_examples(directory: Path, manifest: Mapping[str, Any]) -> Examples:
    """The examples in the artifact of an adapter; none where it has weights. Raises ValueError that names
    the file when they are not pairs of texts."""
    if not is_prompted(manifest):
        return Examples()
    pairs = manifest.get("examples", [])
    if not all(len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs):
        raise ValueError(f"{directory / 'manifest.json'}: examples: expected pairs of texts, found {pairs!r}")
    return Examples(
        tuple((str(asked), str(answered)) for asked, answered in pairs), manifest["answer_tokens"]
    )
