"""Worker: this project's engine, through the functions that its assets use."""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.tasks import Task, tasks
from benchmarks.worker import serve, timed
from ml_assets.adapters.recipe import resolve_targets
from ml_assets.engine import generation, hardware, scoring
from ml_assets.engine.loading import ADAPTER_PINS, Base, load_base
from ml_assets.engine.prompting import render_messages, render_target
from ml_assets.engine.training import Example, plan_batches, train_lora
from ml_assets.eval_reports.metrics import row_scores
from ml_assets.spec import AdapterRecipe

Answer = dict[str, Any]
_base: Base | None = None
_directory = Path()


def loaded() -> Base:
    assert _base is not None, "ask for 'load' first"
    return _base


def load(directory: str) -> Answer:
    """Load the base in the number format that is fast here; `body_weights` are those of its linear layers,
    without embedding and output head."""
    global _base, _directory
    hardware.prepare_process()
    _directory = Path(directory)
    _base = load_base(_directory)
    head = _base.model.get_output_embeddings()
    body = sum(
        module.weight.numel()
        for module in _base.model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    return {"body_weights": body, "dtype": str(_base.model.dtype).removeprefix("torch.")}


def matmul() -> Answer:
    """GFLOP/s of a matrix product here and now, by number format."""
    return {"rates": hardware.matmul_rates()}


# -- data ----------------------------------------------------------------------------------------------


def examples(task: str, first: int, count: int) -> Answer:
    """`count` examples of a task from row `first` on: `prompt` and `target` ids, `messages`, `expected`."""
    found = tasks()[task]
    chat = loaded().chat
    result: list[Answer] = []
    for row in found.rows(first + count)[first:]:
        messages, expected = render_messages(found.prompt, row), render_target(found.prompt, row)
        ids = {"prompt": chat.prompt_ids(messages), "target": chat.target_ids(expected)}
        result.append({**ids, "messages": messages, "expected": expected})
    return {"examples": result, "stop_ids": sorted(chat.stop_ids), "pad_id": loaded().pad_id}


def as_examples(found: Sequence[Answer]) -> list[Example]:
    return [Example(one["prompt"], one["target"], str(i)) for i, one in enumerate(found)]


# -- training ------------------------------------------------------------------------------------------


def plan(examples: list[Answer], recipe: Answer) -> Answer:
    """Which examples each optimizer step takes."""
    lengths = [len(example) for example in as_examples(examples)]
    return {"batches": plan_batches(lengths, AdapterRecipe(**recipe))}


def train(
    examples: list[Answer],
    recipe: Answer,
    output: str,
    kind: str = "lora",
    cache: str | None = None,
    home: str | None = None,
) -> Answer:
    """Train an adapter into the folder `output`; `seconds` of all of it. `lora_weights` is their number.

    `cache` keeps the prompts' keys and values of `activated_lora` between trainings; other processes of the
    deployment in `home` see that this one computes.
    """
    base = loaded()
    whole = AdapterRecipe(**recipe, kind=kind)  # type: ignore[arg-type]
    shutil.rmtree(output, ignore_errors=True)
    answer: Answer = {}
    seen = hardware.computing(Path(home)) if home else contextlib.nullcontext()
    with seen, timed(answer):
        result = train_lora(
            base,
            as_examples(examples),
            whole,
            resolve_targets(whole, base.manifest),
            Path(output),
            prompt_cache=Path(cache) if cache else None,
        )
    from safetensors import safe_open

    with safe_open(Path(output) / "adapter_model.safetensors", "pt") as weights:
        count = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    return answer | {
        "steps": result.steps,
        "tokens": result.tokens,
        "loss": result.losses[-1],
        "lora_weights": count,
    }


def forget() -> Answer:
    """Load the base afresh, so that nothing kept in memory speeds up the next training."""
    return load(str(_directory))


# -- evaluation ----------------------------------------------------------------------------------------


def attach(name: str, directory: str) -> Answer:
    """Attach a PEFT adapter folder, also one that something else wrote."""
    base = loaded()
    pins = {field: base.manifest["identity" if field == "base_identity" else field] for field in ADAPTER_PINS}
    (Path(directory) / "manifest.json").write_text(json.dumps(pins))
    if name in base.adapters:
        base.detach(name)
    base.attach(name, Path(directory))
    return {}


def nll(examples: list[Answer], adapter: str | None = None) -> Answer:
    """Mean negative log-likelihood of the targets, nats per token, whatever trained the adapter."""
    base = loaded()
    pairs = [(one["prompt"], one["target"]) for one in examples]
    with base.active(adapter):
        means = scoring.mean_logprobs(base, pairs)
    counts = [len(target) for _, target in pairs]
    total = sum(mean * count for mean, count in zip(means, counts, strict=True))
    return {"nll": -total / sum(counts)}


def score(task: str, examples: list[Answer], adapter: str | None = None) -> Answer:
    """Mean score of greedy answers by the task's metric, 0 to 100 points."""
    found: Task = tasks()[task]
    base = loaded()
    with base.active(adapter):
        answers = generation.generate(base, [one["prompt"] for one in examples], found.max_new_tokens)
    metric = row_scores([found.metric], found.kind)[found.metric]  # type: ignore[list-item]
    scores = [metric(one["expected"], answer.text, {}) for one, answer in zip(examples, answers, strict=True)]
    return {"points": 100 * sum(scores) / len(scores)}


# -- generation ----------------------------------------------------------------------------------------


def generate(prompts: list[list[int]], new_tokens: int) -> Answer:
    """Greedy answers of the bare base."""
    base = loaded()
    answer: Answer = {}
    with timed(answer), base.active(None):
        found = generation.generate(base, prompts, new_tokens)
    return answer | {"tokens": [one.token_ids for one in found]}


def mixed(prompts: list[list[int]], new_tokens: int, adapters: list[str]) -> Answer:
    """Greedy answers, each prompt under the attached adapter that `adapters` names for it."""
    answer: Answer = {}
    with timed(answer):
        found = generation.generate(loaded(), prompts, new_tokens, adapters=adapters)
    return answer | {"tokens": [one.token_ids for one in found]}


def choose(task: str, prompts: list[list[int]]) -> Answer:
    """The most probable label of a classification task for each prompt: `chosen` are their numbers."""
    base = loaded()
    labels = [base.chat.target_ids(label) for label in tasks()[task].labels]
    answer: Answer = {}
    with timed(answer), base.active(None):
        chosen = scoring.choose_labels(base, prompts, labels)
    return answer | {"chosen": list(map(int, chosen))}


if __name__ == "__main__":
    handlers = [load, matmul, examples, plan, train, forget, attach, nll, score, generate, mixed, choose]
    serve({handler.__name__: handler for handler in handlers})
