"""LoRA training: completion-only loss, length-sorted batches, exact resume, the same bytes every time.

The loop is plain: `torch.optim.AdamW` on one flat float32 vector that holds all LoRA weights, with a copy in
the base's number format where that is another. LoRA: Hu et al. 2021, arXiv 2106.09685, through peft.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ml_assets.artifacts import canonical_json, sha256_bytes
from ml_assets.engine.checkpoint import load_checkpoint, save_checkpoint
from ml_assets.engine.forward import completion_log_probs, right_padded
from ml_assets.engine.loading import Base, adapter_parameters
from ml_assets.spec import AdapterRecipe

TRAINING_VERSION = "1"
"""Part of every adapter's input key: raise it when the same inputs would give other weights."""

MICRO_BATCH_TOKENS = 4096
"""Tokens, with padding, of one forward and backward pass: bounds memory, not the step."""

BUCKET = 16
"""Batches whose examples are sorted by length together: padding falls, order stays random."""

ADAPTER = "default"


@dataclass(frozen=True)
class Example:
    """One training example: prompt ids (no loss) and target ids (loss). `row` names it in errors."""

    prompt: list[int]
    target: list[int]
    row: str = ""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


@dataclass(frozen=True)
class Progress:
    """Where a training is. `loss` is the mean of the last step in nats per target token; `tokens` counts
    prompt and target tokens so far, without padding."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    eta_seconds: float


@dataclass(frozen=True)
class TrainResult:
    """`losses` holds one mean loss a step; `seconds` those of this process alone, `tokens` of the whole
    training."""

    steps: int
    tokens: int
    losses: list[float]
    seconds: float
    resumed_from: int


class BadExample(ValueError):
    """A training example that can't be used; the message names the row."""


def train_lora(
    base: Base,
    examples: Sequence[Example],
    recipe: AdapterRecipe,
    targets: Sequence[str],
    output: Path,
    *,
    checkpoints: Path | None = None,
    checkpoint_seconds: float = 30.0,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train a LoRA adapter on `base` and write `adapter_model.safetensors` and `adapter_config.json` to
    `output`.

    Args:
        examples: at least one, none longer than the recipe's `max_length` or the base's context.
        targets: name suffixes of the modules that get LoRA weights.
        checkpoints: folder for this training alone; an unfinished one continues from its last checkpoint and
            ends with the same bytes as an uninterrupted one.
        checkpoint_seconds: least time between two checkpoints; 0 saves at every step.

    Raises:
        BadExample: an example is empty or too long.
        FloatingPointError: the loss is no longer a finite number.
    """
    _check_examples(examples, recipe.max_length or base.context_length)
    torch.manual_seed(recipe.seed)
    model = _add_lora(base, recipe, targets)
    try:
        weights = _FlatWeights(list(adapter_parameters(model, ADAPTER).values()))
        result = _run(base, examples, recipe, weights, checkpoints, checkpoint_seconds, on_progress)
        _save_adapter(base, output)
    finally:
        base.model = model.unload()
        base.model.requires_grad_(False)
    return result


def plan_batches(lengths: Sequence[int], recipe: AdapterRecipe) -> list[list[int]]:
    """Example indices of every optimizer step, in order: a function of lengths, budget, length of the
    training and seed alone. A step holds at most `batch_tokens` tokens with padding, but at least one
    example."""
    epochs = recipe.epochs if recipe.epochs is not None or recipe.steps is not None else 3.0
    plan: list[list[int]] = []
    epoch, per_epoch = 0, 0
    while True:
        rng = random.Random(f"{recipe.seed}/{epoch}")
        batches = _epoch_batches(lengths, recipe.batch_tokens, rng)
        per_epoch = per_epoch or len(batches)
        plan += batches
        epoch += 1
        total = recipe.steps if recipe.steps is not None else math.ceil((epochs or 0) * per_epoch)
        # epochs differ by a batch or so: a whole number of them is never cut
        if recipe.steps is None and epochs == epoch:
            return plan
        if len(plan) >= total:
            return plan[:total]


def learning_rate(step: int, steps: int, recipe: AdapterRecipe) -> float:
    """Rate of step `step` (from 0) of `steps`: linear warm-up, then the recipe's schedule down to 0."""
    warmup = math.ceil(recipe.warmup * steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - warmup) / max(1, steps - warmup)
    if recipe.schedule == "cosine":
        return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return recipe.learning_rate * (1 - done)


def step_loss(base: Base, examples: Sequence[Example], backward: bool = True) -> float:
    """Mean negative log-likelihood (nats) over the target tokens of one step's examples, taken in micro
    batches; with `backward`, its gradient is added to the parameters'."""
    total = sum(len(example.target) for example in examples)
    loss_sum = 0.0
    for rows in _micro_batches(examples):
        pairs = [(example.prompt, example.target) for example in rows]
        values, _ = completion_log_probs(base.model, *right_padded(pairs, base.pad_id, base.device))
        loss = -values.sum() / total
        if backward:
            loss.backward()
        loss_sum += float(loss.detach())
    return loss_sum


# -- inside --------------------------------------------------------------------------------------------


def _run(
    base: Base,
    examples: Sequence[Example],
    recipe: AdapterRecipe,
    weights: "_FlatWeights",
    checkpoints: Path | None,
    checkpoint_seconds: float,
    on_progress: Callable[[Progress], None] | None,
) -> TrainResult:
    plan = plan_batches([len(example) for example in examples], recipe)
    identity = _training_identity(base, examples, recipe)
    optimizer = torch.optim.AdamW(
        [weights.master], lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    first, tokens, losses = 0, 0, list[float]()
    saved = load_checkpoint(checkpoints) if checkpoints else None
    if saved is not None and saved.state["training"] == identity:
        weights.load(saved.tensors["weights"])
        if saved.step:
            optimizer.state[weights.master] = {
                "step": saved.tensors["adam_step"],
                "exp_avg": saved.tensors["exp_avg"].to(base.device),
                "exp_avg_sq": saved.tensors["exp_avg_sq"].to(base.device),
            }
        torch.set_rng_state(saved.tensors["rng"])
        first, tokens, losses = saved.step, saved.state["tokens"], saved.state["losses"]
    start = last_save = time.monotonic()
    fresh_tokens = 0
    base.model.train()
    for step in range(first, len(plan)):
        batch = [examples[i] for i in plan[step]]
        weights.clear_gradient()
        loss = step_loss(base, batch)
        gradient = weights.gradient()
        norm = float(gradient.norm())
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(
                f"step {step + 1}: loss {loss}, gradient norm {norm}; try a lower learning_rate than "
                f"{recipe.learning_rate}"
            )
        gradient.mul_(min(1.0, recipe.max_grad_norm / (norm + 1e-6)))
        rate = learning_rate(step, len(plan), recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        weights.publish()
        count = sum(map(len, batch))
        tokens, fresh_tokens = tokens + count, fresh_tokens + count
        losses.append(loss)
        now = time.monotonic()
        if on_progress:
            pace = (now - start) / (step + 1 - first)
            on_progress(
                Progress(
                    step + 1,
                    len(plan),
                    loss,
                    rate,
                    norm,
                    tokens,
                    fresh_tokens / max(now - start, 1e-9),
                    pace * (len(plan) - step - 1),
                )
            )
        if checkpoints and step + 1 < len(plan) and now - last_save >= checkpoint_seconds:
            state = optimizer.state[weights.master]
            save_checkpoint(
                checkpoints,
                step + 1,
                {
                    "weights": weights.master.detach(),
                    "adam_step": state["step"],
                    "exp_avg": state["exp_avg"],
                    "exp_avg_sq": state["exp_avg_sq"],
                    "rng": torch.get_rng_state(),
                },
                {"training": identity, "tokens": tokens, "losses": losses},
            )
            last_save = time.monotonic()
    base.model.eval()
    return TrainResult(len(plan), tokens, losses, time.monotonic() - start, first)


class _FlatWeights:
    """All LoRA weights as one float32 vector for the optimizer; the model's parameters are views of it, or of
    a copy in the model's own number format."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        flat = torch.cat([p.detach().reshape(-1) for p in parameters])
        self._flat = flat
        self._gradient = torch.zeros_like(flat)
        offset = 0
        for p in parameters:
            view = slice(offset, offset + p.numel())
            p.data = flat[view].view_as(p)
            p.grad = self._gradient[view].view_as(p)
            p.requires_grad_(True)
            offset += p.numel()
        self.master = flat if flat.dtype == torch.float32 else flat.float()
        self.master.requires_grad_(True)
        self.master.grad = self._gradient if self.master is flat else torch.zeros_like(self.master)

    def clear_gradient(self) -> None:
        self._gradient.zero_()

    def gradient(self) -> torch.Tensor:
        """The gradient in float32, as the optimizer will see it."""
        assert self.master.grad is not None
        if self.master.grad is not self._gradient:
            self.master.grad.copy_(self._gradient)
        return self.master.grad

    def publish(self) -> None:
        """Let the model see the optimizer's weights."""
        if self.master is not self._flat:
            with torch.no_grad():
                self._flat.copy_(self.master)

    def load(self, values: torch.Tensor) -> None:
        with torch.no_grad():
            self.master.copy_(values)
        self.publish()


def _add_lora(base: Base, recipe: AdapterRecipe, targets: Sequence[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    if base.adapters:
        raise ValueError(f"train on a base without adapters; attached: {sorted(base.adapters)}")
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.dropout,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
        bias="none",
        fan_in_fan_out=_transposed(base, targets),
    )
    base.model = get_peft_model(base.model, config, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    # peft notes the folder that the base was loaded from, which differs between machines
    base.model.peft_config[ADAPTER].base_model_name_or_path = base.manifest["revision"]
    return base.model


def _transposed(base: Base, targets: Sequence[str]) -> bool:
    """Whether the target modules keep their weights as (in, out), as GPT-2's Conv1D does."""
    from transformers.pytorch_utils import Conv1D

    found = [m for name, m in base.model.named_modules() if name.rpartition(".")[2] in set(targets)]
    return bool(found) and all(isinstance(m, Conv1D) for m in found)


def _save_adapter(base: Base, output: Path) -> None:
    from safetensors.torch import save_file

    output.mkdir(parents=True, exist_ok=True)
    weights = {
        key: value.detach().cpu().contiguous().clone()
        for key, value in adapter_parameters(base.model, ADAPTER).items()
    }
    save_file(weights, output / "adapter_model.safetensors", metadata={"format": "pt"})
    config = base.model.peft_config[ADAPTER].to_dict() | {"inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (output / "adapter_config.json").write_bytes(canonical_json(plain) + b"\n")


def _training_identity(base: Base, examples: Sequence[Example], recipe: AdapterRecipe) -> str:
    """Names what a checkpoint continues: another base, data or recipe starts afresh."""
    data = [[example.prompt, example.target] for example in examples]
    parts = {
        "base": base.manifest["identity"],
        "dtype": str(base.plain_model.dtype),
        "recipe": recipe.model_dump(),
        "data": sha256_bytes(canonical_json(data)),
        "version": TRAINING_VERSION,
    }
    return sha256_bytes(canonical_json(parts))


def _check_examples(examples: Sequence[Example], limit: int) -> None:
    if not examples:
        raise BadExample("expected at least one training example")
    for example in examples:
        if not example.prompt or not example.target:
            raise BadExample(f"row {example.row}: expected at least one prompt token and one target token")
        if len(example.target) > limit:
            raise BadExample(f"row {example.row}: target of {len(example.target)} tokens exceeds the {limit}")
    long = [example for example in examples if len(example) > limit]
    if long:
        shown = ", ".join(f"{e.row} ({len(e.prompt)} + {len(e.target)})" for e in long[:5])
        raise BadExample(
            f"{len(long)} of {len(examples)} examples exceed {limit} tokens (prompt + target): {shown}; "
            "shorten the prompt, leave the rows out, or raise adapter.max_length within the base's context"
        )


def _epoch_batches(lengths: Sequence[int], budget: int, rng: random.Random) -> list[list[int]]:
    order = list(range(len(lengths)))
    rng.shuffle(order)
    mean = sum(lengths) / len(lengths)
    chunk = max(1, int(BUCKET * budget / mean))
    batches: list[list[int]] = []
    for at in range(0, len(order), chunk):
        batch: list[int] = []
        # sorted by length, so that the next one is the longest and sets the width
        for i in sorted(order[at : at + chunk], key=lambda i: lengths[i]):
            if batch and lengths[i] * (len(batch) + 1) > budget:
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    rng.shuffle(batches)
    return batches


def _micro_batches(examples: Sequence[Example]) -> list[list[Example]]:
    result: list[list[Example]] = []
    for example in sorted(examples, key=len):
        if result and len(example) * (len(result[-1]) + 1) <= MICRO_BATCH_TOKENS:
            result[-1].append(example)
        else:
            result.append([example])
    return result
