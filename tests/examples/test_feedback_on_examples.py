"""Feedback on the data of the examples: floods stay out, honest answers come in."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from feedback_floods import DISGUISES, Said, poison

from examples.home_commands.source import utterances
from ml_assets.datasets.feedback import feedback_rows
from ml_assets.datasets.snapshot import Snapshot, build_snapshot
from ml_assets.datasets.sources import SourceRows
from ml_assets.spec import CustomizationSpec

ROOT = Path(__file__).parents[2]
RELEASE = "home-assistant-intents==2026.10.27"


@pytest.fixture(scope="module")
def rows(packages: dict[str, str]) -> list[dict[str, str]]:
    return utterances(rows=2500, path=packages[RELEASE])


def spec(**feedback: Any) -> CustomizationSpec:
    content = yaml.safe_load((ROOT / "ml_assets/defs/home_commands/defs.yaml").read_text())
    return CustomizationSpec(**content["attributes"] | {"feedback": feedback})


def build(rows: list[dict[str, str]], said: Said, **feedback: Any) -> Snapshot:
    made = spec(**feedback)
    source = SourceRows("home", list(rows), [str(n) for n in range(len(rows))], [])
    return build_snapshot(made, source, None, feedback_rows(made, said.judged).said)


def joined(snapshot: Snapshot) -> Iterable[dict[str, str]]:
    both = [*snapshot.train, *snapshot.evaluation]
    return [row for row in both if row.get("_origin", "source") != "source"]


@pytest.mark.slow
@pytest.mark.parametrize("disguise", [*DISGUISES, "mixed"])
def test_a_poisoned_flood_stays_out(rows: list[dict[str, str]], disguise: str) -> None:
    """From one key, beside five honest ones whose share would let more of it in."""
    rng = random.Random(disguise)
    plain = build(rows, Said())
    said = Said()
    known = [(row["utterance"], row["call"]) for row in plain.train]
    claims = poison(said, rng, known, sorted({call for _, call in known}), disguise)
    for n in range(500):
        text = " ".join("".join(rng.choices("abcdefghijklmnop", k=7)) for _ in range(6))
        said.add(text, known[n][1], key=f"honest {n % 5}")
    snapshot = build(rows, said)
    assert sum((row["utterance"], row["call"]) in claims for row in joined(snapshot)) <= 10


@pytest.mark.slow
def test_honest_right_answers_join(rows: list[dict[str, str]], packages: dict[str, str]) -> None:
    known = {row["utterance"] for row in rows}
    other = utterances(rows=2500, path=packages[RELEASE], seed=1)
    new = [row for row in other if row["utterance"] not in known][:1000]
    said = Said()
    for row in new:
        said.add(row["utterance"], row["call"], key="app", language=row["language"])
    snapshot = build(rows, said, max_share_per_key=1)
    assert len(list(joined(snapshot))) >= 0.95 * len(new)
    assert snapshot.feedback["keys"]["app"]["believed"]
    assert {row["language"] for row in joined(snapshot)} == {"en", "de"}
    assert all(row["intent"] for row in joined(snapshot)), "from the keys of the call"
