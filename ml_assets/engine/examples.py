"""Examples before a question: what a prompt-only adapter is, in evaluation and at the endpoint alike.

They are the same for all questions, or for each question those training rows that are most like it (Liu et
al. 2022, What Makes Good In-Context Examples for GPT-3, arXiv 2101.06804), the most like it last.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Message = Mapping[str, str]
Pair = tuple[str, str]
"""What a user said, and the right answer."""


ROWS_FILE = "examples.json"
VECTORS_FILE = "examples.safetensors"
FEATURES = 2**16
"""Of hashed words: few enough to keep their weights, so many that two words seldom share one."""


class Nearest:
    """Finds the texts most like another one: cosine of tf-idf vectors (Salton and Buckley 1988) over hashed
    words, word pairs and character trigrams, which needs no model. Any thread may ask."""

    def __init__(self, weights: NDArray[np.float32], vectors: Any):
        self._weights = weights
        self._vectors = vectors

    @classmethod
    def fit(cls, texts: Sequence[str]) -> "Nearest":
        """Over at least one text."""
        counts = _counts(texts)
        holding = np.bincount(counts.indices, minlength=counts.shape[1])
        weights = np.log((1 + len(texts)) / (1 + holding)).astype(np.float32) + 1
        return cls(weights, _weighted(counts, weights))

    def find(self, text: str, k: int) -> list[int]:
        """Numbers of the `k` texts most like this one, the most like it first; of equals the first."""
        scores = np.asarray(self._vectors @ _weighted(_counts([text]), self._weights).T.toarray()).ravel()
        return [int(i) for i in np.argsort(-scores, kind="stable")[:k]]

    def tensors(self) -> dict[str, NDArray[Any]]:
        vectors = self._vectors
        return {
            "weights": self._weights,
            "values": vectors.data.astype(np.float32),
            "indices": vectors.indices.astype(np.int32),
            "starts": vectors.indptr.astype(np.int64),
        }

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]]) -> "Nearest":
        """The inverse of `tensors`."""
        from scipy.sparse import csr_matrix

        parts = (tensors["values"], tensors["indices"], tensors["starts"])
        shape = len(tensors["starts"]) - 1, len(tensors["weights"])
        return cls(tensors["weights"], csr_matrix(parts, shape=shape))


def _counts(texts: Sequence[str]) -> Any:
    from scipy.sparse import hstack

    readable = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    return hstack([one.transform(readable) for one in _vectorizers()]).tocsr()


def _weighted(counts: Any, weights: NDArray[np.float32]) -> Any:
    from sklearn.preprocessing import normalize

    weighted = counts.astype(np.float32)
    weighted.data = (1 + np.log(weighted.data)) * weights[weighted.indices]
    return normalize(weighted, copy=False)


@functools.cache
def _vectorizers() -> tuple[Any, ...]:
    from sklearn.feature_extraction.text import HashingVectorizer

    options: dict[str, Any] = {"n_features": FEATURES // 2, "alternate_sign": False, "norm": None}
    words = HashingVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", **options)
    return words, HashingVectorizer(analyzer="char_wb", ngram_range=(3, 3), **options)


@dataclass(frozen=True)
class Examples:
    """The examples of one prompt-only adapter. With `nearest`, `pairs` are all that it chooses `count` from;
    otherwise all are shown, the most helpful first. `answer_tokens` are left free for the answer: where a
    conversation is so long that not all examples fit, the least helpful are left out."""

    pairs: tuple[Pair, ...] = ()
    answer_tokens: int = 0
    nearest: Nearest | None = field(default=None, compare=False)
    count: int = 0

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def chosen(self, messages: Sequence[Message]) -> list[Pair]:
        """The examples for a conversation, the most helpful first."""
        if self.nearest is None:
            return list(self.pairs)
        asked = [message["content"] for message in messages if message["role"] == "user"]
        return [self.pairs[i] for i in self.nearest.find(asked[-1] if asked else "", self.count)]

    def before(
        self, messages: Sequence[Message], tokens: Callable[[list[Message]], int], context: int
    ) -> list[Message]:
        """The conversation with as many examples as leave room in the context, after its system message.
        `tokens` counts a conversation's."""
        chosen = self.chosen(messages)
        for n in range(len(chosen), 0, -1):
            longer = put_before(messages, chosen[:n] if self.nearest is None else chosen[:n][::-1])
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
    the file when they are not pairs of texts, or not those that the vectors beside them are of."""
    if not is_prompted(manifest):
        return Examples()
    retrieval = manifest.get("retrieval")
    if not retrieval:
        pairs = _pairs(directory / "manifest.json", manifest.get("examples", []))
        return Examples(pairs, manifest["answer_tokens"])
    from safetensors.numpy import load_file

    pairs = _pairs(directory / ROWS_FILE, json.loads((directory / ROWS_FILE).read_bytes()))
    tensors = load_file(directory / VECTORS_FILE)
    if len(tensors["starts"]) != len(pairs) + 1:
        raise ValueError(f"{directory / VECTORS_FILE}: expected vectors of {len(pairs)} examples")
    return Examples(pairs, manifest["answer_tokens"], Nearest.of(tensors), retrieval["count"])


def files_of(examples: Examples) -> dict[str, bytes]:
    """What the artifact of an adapter holds beside its manifest."""
    if examples.nearest is None:
        return {}
    from safetensors.numpy import save

    rows = json.dumps([list(pair) for pair in examples.pairs], ensure_ascii=False).encode()
    return {ROWS_FILE: rows, VECTORS_FILE: save(examples.nearest.tensors())}


def _pairs(path: Path, found: Any) -> tuple[Pair, ...]:
    if not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in found
    ):
        raise ValueError(f"{path}: examples: expected pairs of texts, found {str(found)[:200]}")
    return tuple((asked, answered) for asked, answered in found)
