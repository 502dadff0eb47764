"""Free text that is on every machine: the documentation that Python carries (PSF licence).

Part of it as it stands, part of it as conversations, so that a model trained on it goes on answering
questions in its chat format. No text here belongs to a customization or a benchmark of this project.
"""

import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SYSTEMS = (
    "Answer with nothing else.",
    "You are a helpful assistant.",
    "Be brief.",
    "Answer from the text.",
)
MIN_WORDS, MAX_WORDS = 6, 60
"""Of what a message quotes."""


@dataclass(frozen=True)
class Passage:
    """A text and what it is about, such as `shutil.copyfile`."""

    about: str
    text: str


@lru_cache(maxsize=1)
def passages() -> tuple[Passage, ...]:
    """Python's language reference (`pydoc_data.topics`), and the docstrings of the standard library."""
    from pydoc_data.topics import topics

    found = [Passage(name, str(text).strip()) for name, text in sorted(topics.items())]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py")):
        found += _docstrings(path)
    return tuple({passage.text: passage for passage in found}.values())


def _docstrings(path: Path) -> Iterator[Passage]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            name = getattr(node, "name", "")
            if text and len(text.split()) >= MIN_WORDS and not name.startswith("_"):
                yield Passage(f"{path.stem}.{name}".rstrip("."), text)


Conversation = list[dict[str, str]]


def conversations(seed: int) -> Iterator[Conversation]:
    """Endless short conversations about passages: quote, continue, explain, find a word, say as JSON."""
    chance = random.Random(f"conversations {seed}")
    known = passages()
    while True:
        passage = chance.choice(known)
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", passage.text)]
        paragraphs = [p for p in paragraphs if len(p.split()) >= MIN_WORDS]
        if paragraphs:
            words = chance.choice(paragraphs).split()[:MAX_WORDS]
            system = [{"role": "system", "content": chance.choice(SYSTEMS)}] if chance.random() < 0.5 else []
            user, assistant = _exchange(chance, passage.about, words)
            yield [
                *system,
                {"role": "user", "content": user},
                {"role": "assistant", "content": assistant},
            ]


def _exchange(chance: random.Random, about: str, words: list[str]) -> tuple[str, str]:
    text = " ".join(words)
    at = chance.randrange(2, len(words) - 1)
    forms = [
        (f"Continue this text: {' '.join(words[:at])}", " ".join(words[at:])),
        (f"What does the documentation of Python say about {about}?", text),
        (f"Repeat: {' '.join(words[:12])}", " ".join(words[:12])),
        (f"Which word comes after {words[at - 1]!r} in this text?\n{text}", words[at]),
        (f"{text}\n\nWhat is this about?", about),
        (f"Say the first and the last word as JSON: {text}", _json(first=words[0], last=words[-1])),
    ]
    return chance.choice(forms)


def _json(**values: str) -> str:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def documents(seed: int) -> Iterator[str]:
    """The passages over and over, in random order."""
    chance, known = random.Random(f"documents {seed}"), list(passages())
    while True:
        chance.shuffle(known)
        yield from (passage.text for passage in known)
