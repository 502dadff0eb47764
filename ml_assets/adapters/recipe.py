"""Which modules a recipe adapts on a given base, and what a training will see."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ml_assets.spec import AdapterRecipe, CustomizationSpec, PromptSpec


class Chatting(Protocol):
    """What tokenizes conversations: a loaded base, or less."""

    @property
    def chat(self) -> Any: ...


def resolve_targets(recipe: AdapterRecipe, base_manifest: Mapping[str, Any]) -> list[str]:
    """Name suffixes of the modules to adapt, from the base's own modules.

    Raises ValueError that names the modules there are, when the recipe asks for one that the base lacks.
    """
    roles: dict[str, list[str]] = base_manifest["lora_targets"]
    if isinstance(recipe.targets, str):
        return sorted(roles[recipe.targets])
    known = roles["all-linear"]
    unknown = [name for name in recipe.targets if name not in known]
    if unknown:
        raise ValueError(
            f"adapter.targets: {', '.join(unknown)} not in {base_manifest['revision']} "
            f"({base_manifest['architecture']}); it has: {', '.join(known)}"
        )
    return sorted(recipe.targets)


def training_examples(base: "Chatting", prompt: PromptSpec, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Tokenized `ml_assets.engine.training.Example`s of dataset rows, in their order."""
    from ml_assets.engine.prompting import render_messages, render_target
    from ml_assets.engine.training import Example

    return [
        Example(
            base.chat.prompt_ids(render_messages(prompt, row)),
            base.chat.target_ids(render_target(prompt, row)),
            row=str(row["_row"])[:12],
        )
        for row in rows
    ]


def example_pairs(prompt: PromptSpec, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(what the user says, the right answer) of dataset rows."""
    from ml_assets.engine.prompting import render_messages, render_target

    return [(render_messages(prompt, row)[-1]["content"], render_target(prompt, row)) for row in rows]


def checkpoint_folder(home: Path, key: str) -> Path:
    """Where an unfinished training of this input key keeps its state."""
    return home / "checkpoints" / key


MAX_LABELS = 256


def answer_labels(spec: CustomizationSpec, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The answers to choose from when they are found by label scores: those of the training rows, sorted;
    empty where answers are generated. Raises ValueError when there are more than MAX_LABELS."""
    from ml_assets.engine.prompting import render_target

    if spec.evaluation.answer_by != "label_scores":
        return []
    labels = sorted({render_target(spec.prompt, row) for row in rows})
    if len(labels) > MAX_LABELS:
        raise ValueError(
            f"evaluation.answer_by: label_scores expects at most {MAX_LABELS} different answers in the "
            f"training rows, found {len(labels)}"
        )
    return labels
