"""LoRA training: completion-only loss, length-sorted batches, exact resume, the same bytes every time.

The loop is plain: `torch.optim.AdamW` on one flat float32 vector that holds all LoRA weights, with a copy in
the base's number format where that is another. LoRA: Hu et al. 2021, arXiv 2106.09685, through peft.
"""

import contextlib
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ml_assets.artifacts import canonical_json, sha256_bytes, sha256_file
from ml_assets.engine.checkpoint import load_checkpoint, save_checkpoint
from ml_assets.engine.forward import answer_log_probs
from ml_assets.engine.frozen import FrozenLayers
from ml_assets.engine.loading import Base
from ml_assets.engine.lora import (
    Adapter,
    IncompatibleAdapter,
    Route,
    adapter_config,
    new_adapter,
    place,
    read_adapter,
)
from ml_assets.engine.prompt_cache import PromptCache
from ml_assets.spec import AdapterRecipe

TRAINING_VERSION = "3"
"""Part of every adapter's input key: raise it when the same inputs would give other weights."""

MICRO_BATCH_TOKENS = 4096
"""Tokens of one forward and backward pass: bounds memory, not the step. A longer example is computed with
gradient checkpoints."""

BUCKET = 16
"""Batches whose examples are sorted by length together: attention pads less, order stays random."""

MAX_WORKERS = 4
WORKER_TOKENS = 128
"""A step has a worker for each so many of its tokens, as far as there are cores."""

KEPT_BYTES = 2**30
"""Of what layers that are not trained give for the examples: more is computed anew in each epoch."""

ADAPTER = "default"


@dataclass(frozen=True)
class Soft:
    """What a teacher finds probable at each target token: its most probable `tokens` (target tokens, k) with
    their probabilities `shares`, which sum to at most 1; `weight` is that of the teacher in the loss."""

    tokens: list[list[int]]
    shares: list[list[float]]
    weight: float


@dataclass(frozen=True)
class Example:
    """One training example: prompt ids (no loss) and target ids (loss). `row` names it in errors. With
    `soft`, the loss is also the cross entropy to a teacher (Hinton et al. 2015, arXiv 1503.02531). `state` is
    what `frozen.FrozenLayers` kept of it."""

    prompt: list[int]
    target: list[int]
    row: str = ""
    soft: Soft | None = None
    state: torch.Tensor | None = field(default=None, compare=False, repr=False)

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
class Stopping:
    """When a training ends before its last step: its loss on `examples` (which it does not train on) is
    measured before the first step and about `checks` times, and the weights with the lowest are what it
    gives; after `patience` checks without a lower one it stops."""

    examples: Sequence[Example]
    checks: int = 6
    patience: int = 2


@dataclass(frozen=True)
class TrainResult:
    """`losses` holds one mean loss a step; `seconds` those of this process alone, `earlier_seconds` those of
    the processes that it resumes, up to their checkpoint; `tokens` are of the whole training. With
    `Stopping`, `validation` holds (step, mean loss in nats per answer), and the weights are those of
    `best_step`; `steps` are those that were taken."""

    steps: int
    tokens: int
    losses: list[float]
    seconds: float
    resumed_from: int
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None
    earlier_seconds: float = 0.0


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
    prompt_cache: Path | None = None,
    start: Path | None = None,
    last_layers: float = 1.0,
    weight: float = 1.0,
    stopping: Stopping | None = None,
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
        prompt_cache: folder for what the base computes for prompts (activated LoRA), shared by all trainings.
        start: folder of an adapter of the same shape whose weights this training goes on from.
        last_layers: share of the layers, from the last, whose weights are trained; those of the others stay
            as they are, and no gradient is computed for them.
        weight: of the trained weights in the mean of these and of those that the training began with, which
            it gives (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).
        stopping: end early, with the weights that are best on examples that are not trained on.

    Raises:
        BadExample: an example is empty or too long.
        FloatingPointError: the loss is no longer a finite number.
        IncompatibleAdapter: the adapter to start from has another shape.
    """
    held_out = stopping.examples if stopping else ()
    longest = min(recipe.max_length or base.context_length, base.context_length)
    _check_examples([*examples, *held_out], longest)
    with lora_for_training(base, recipe, targets) as adapter:
        if start is not None:
            _copy_weights(base, start, adapter)
        every = [*examples, *held_out]
        _check_invocation(every, adapter.invocation or [])
        heads = [example.prompt[: -len(adapter.invocation)] for example in every if adapter.invocation]
        prompts = PromptCache(base, heads, prompt_cache) if heads else None
        with _Crew(base, adapter, recipe, prompts, last_layers) as crew:
            identity = _training_identity(base, examples, recipe, crew.workers, start, last_layers, stopping)
            judge = _Judge(crew, stopping) if stopping else None
            began = crew.weights.master.detach().clone()
            result = _run(
                base, examples, recipe, crew, identity, checkpoints, checkpoint_seconds, on_progress, judge
            )
            if weight != 1:
                crew.weights.load(torch.lerp(began, crew.weights.master.detach(), weight))
        save_adapter(base, adapter, targets, output)
    return result


@contextlib.contextmanager
def lora_for_training(base: Base, recipe: AdapterRecipe, targets: Sequence[str]) -> Iterator[Adapter]:
    """Inside, the model trains a fresh adapter, whose weights are the only parameters with a gradient."""
    if base.adapters:
        raise ValueError(f"train on a base without adapters; attached: {sorted(base.adapters)}")
    torch.manual_seed(recipe.seed)
    adapter = new_adapter(base.model, targets, recipe.rank, recipe.alpha, recipe.dropout, base.model.dtype)
    if recipe.kind == "activated_lora":
        if not base.packs:
            raise ValueError(
                f"{base.manifest['revision']}: keys and values of this architecture can't be kept, which an "
                "activated LoRA needs; expected adapter.kind: lora for this base"
            )
        adapter.invocation = base.chat.invocation_ids()
    for tensor in adapter.named_tensors().values():
        tensor.requires_grad_(True)
    base.lora.add(ADAPTER, adapter)
    base.model.train()
    try:
        with base.lora.routed(Route((ADAPTER,), training=True)):
            yield adapter
    finally:
        base.model.eval()
        base.lora.remove(ADAPTER)


def plan_batches(lengths: Sequence[int], recipe: AdapterRecipe) -> list[list[int]]:
    """Example indices of every optimizer step, in order: a function of lengths, budget, length of the
    training and seed alone. A step holds at most `batch_tokens` tokens, but at least one example."""
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


def step_loss(
    base: Base, examples: Sequence[Example], prompts: PromptCache | None = None, total: int | None = None
) -> float:
    """Mean negative log-likelihood (nats) over the target tokens of one step's examples, taken in micro
    batches; its gradient is added to the parameters'. With `prompts`, the adapter is an activated one, and
    what comes before its invocation is not computed again. `total` is the number of target tokens that the
    loss is a mean of, when these examples are part of a step."""
    total = total or sum(len(example.target) for example in examples)
    loss_sum = 0.0
    for rows in _micro_batches(examples, MICRO_BATCH_TOKENS):
        with _checkpointed(base, sum(map(len, rows)) > MICRO_BATCH_TOKENS):
            pairs = _pairs(rows)
            soft = [example.soft for example in rows]
            states = [example.state for example in rows]
            values = answer_log_probs(base, pairs, 1 / total, prompts, soft, states=states)
        loss_sum -= float(torch.cat(values).sum()) / total
    return loss_sum


_checkpointing: Counter[int] = Counter()
"""Threads that want it, by model: they share one."""
_checkpointing_changes = threading.Lock()


@contextlib.contextmanager
def _checkpointed(base: Base, wanted: bool) -> Iterator[None]:
    """Inside, layers keep their input alone and are computed again for the gradient."""
    if not wanted:
        yield
        return
    model = id(base.model)
    with _checkpointing_changes:
        _checkpointing[model] += 1
        if _checkpointing[model] == 1:
            base.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
    try:
        yield
    finally:
        with _checkpointing_changes:
            _checkpointing[model] -= 1
            if not _checkpointing[model]:
                del _checkpointing[model]
                base.model.activation_checkpointing_disable()


# -- inside --------------------------------------------------------------------------------------------


def _run(
    base: Base,
    examples: Sequence[Example],
    recipe: AdapterRecipe,
    crew: "_Crew",
    identity: str,
    checkpoints: Path | None,
    checkpoint_seconds: float,
    on_progress: Callable[[Progress], None] | None,
    judge: "_Judge | None" = None,
) -> TrainResult:
    plan = plan_batches([len(example) for example in examples], recipe)
    weights = crew.weights
    optimizer = torch.optim.AdamW(
        [weights.master], lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    first, tokens, losses, earlier = 0, 0, list[float](), 0.0
    cuda = base.device.type == "cuda"  # dropout draws there
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
        if "device_rng" in saved.tensors:
            torch.cuda.set_rng_state(saved.tensors["device_rng"], base.device)
        first, tokens, losses = saved.step, saved.state["tokens"], saved.state["losses"]
        earlier = saved.state.get("seconds", 0.0)
        if judge:
            judge.load(saved.state["judged"], saved.tensors["best"])
    start = last_save = time.monotonic()
    fresh_tokens = 0
    examples = crew.with_states(examples, plan)
    if judge and not judge.seen:
        judge.look(0)
    for step in range(first, len(plan)):
        batch = [examples[i] for i in plan[step]]
        weights.clear_gradient()
        loss = crew.step_loss(batch)
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
        if judge and judge.due(step + 1, len(plan)) and judge.look(step + 1):
            break
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
                    **({"device_rng": torch.cuda.get_rng_state(base.device)} if cuda else {}),
                    **({"best": judge.best} if judge else {}),
                },
                {
                    "training": identity,
                    "tokens": tokens,
                    "losses": losses,
                    "seconds": earlier + time.monotonic() - start,
                }
                | ({"judged": judge.seen} if judge else {}),
            )
            last_save = time.monotonic()
    seconds = time.monotonic() - start
    if judge:
        weights.load(judge.best)
        seen = [(step, loss) for step, loss in judge.seen]
        return TrainResult(len(losses), tokens, losses, seconds, first, seen, judge.best_step, earlier)
    return TrainResult(len(plan), tokens, losses, seconds, first, earlier_seconds=earlier)


class _Judge:
    """Keeps the weights with the lowest loss on examples that are not trained on."""

    def __init__(self, crew: "_Crew", stopping: Stopping):
        self._crew, self._stopping = crew, stopping
        self.seen: list[list[Any]] = []
        self.best = crew.weights.master.detach().clone()

    @property
    def best_step(self) -> int:
        return min(self.seen, key=lambda one: (one[1], one[0]))[0]

    def load(self, seen: list[list[Any]], best: torch.Tensor) -> None:
        self.seen, self.best = [list(one) for one in seen], best.to(self.best)

    def due(self, step: int, steps: int) -> bool:
        return step == steps or step % max(1, steps // self._stopping.checks) == 0

    def look(self, step: int) -> bool:
        """Measure; whether to stop."""
        loss = self._crew.loss(self._stopping.examples)
        self.seen.append([step, loss])
        if self.best_step == step:
            self.best = self._crew.weights.master.detach().clone()
        since = [one[0] for one in self.seen if one[0] > self.best_step]
        return not math.isfinite(loss) or len(since) >= self._stopping.patience


class _Crew:
    """The workers of a training: threads that each compute a part of every step, with a copy of the adapter
    and of its gradient. Products of this size gain little from a second thread; two workers with one thread
    each take less time than one with two. Which example goes to which worker, and the order in which their
    gradients are added, depend on the examples alone.
    """

    def __init__(
        self,
        base: Base,
        adapter: Adapter,
        recipe: AdapterRecipe,
        prompts: PromptCache | None,
        last_layers: float,
    ):
        self._base, self._prompts = base, prompts
        self._threads = torch.get_num_threads()
        self.workers = 1
        # dropout draws from one generator
        alone = base.random or (prompts is not None and not prompts.kept)
        if base.device.type == "cpu" and base.packs and not alone:
            self.workers = max(1, min(self._threads, MAX_WORKERS, recipe.batch_tokens // WORKER_TOKENS))
        self._names = [ADAPTER, *(f"{ADAPTER} of worker {i}" for i in range(1, self.workers))]
        replicas = [adapter]
        for name in self._names[1:]:
            copies = {
                module: (a.detach().clone(), b.detach().clone()) for module, (a, b) in adapter.weights.items()
            }
            replicas.append(replace(adapter, weights=copies))
            base.lora.add(name, replicas[-1])
        trained = _last_modules(adapter, last_layers)
        for module, pair in adapter.weights.items():
            for tensor in pair:
                tensor.requires_grad_(module in trained)
        self.weights = _FlatWeights(
            [[tensor for module in trained for tensor in replica.weights[module]] for replica in replicas]
        )
        self._frozen = None if base.random or not base.packs else FrozenLayers.of(base.model, trained)
        self._open = contextlib.ExitStack()
        self._own_threads = max(1, self._threads // self.workers)
        self._pool = ThreadPoolExecutor(
            self.workers, "train", initializer=torch.set_num_threads, initargs=(self._own_threads,)
        )

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._open.close()
        for name in self._names[1:]:
            self._base.lora.remove(name)

    def step_loss(self, examples: Sequence[Example]) -> float:
        """As `step_loss`, by all workers."""
        if self.workers == 1:
            return step_loss(self._base, examples, self._prompts)
        if self._prompts is not None:
            self._prompts.fill([example.prompt[: -len(self._invocation)] for example in examples])
        total = sum(len(example.target) for example in examples)
        torch.set_num_threads(self._own_threads)
        try:
            parts = _dealt(examples, self.workers)
            work = [
                self._pool.submit(self._part, *part, total) for part in zip(self._names, parts, strict=False)
            ]
            return sum(future.result() for future in work)
        finally:
            torch.set_num_threads(self._threads)

    def with_states(self, examples: Sequence[Example], plan: Sequence[Sequence[int]]) -> list[Example]:
        """The examples, with what the layers that are not trained give for them where that is needed more
        than once and fits into KEPT_BYTES. It depends on the examples alone: a training that goes on from a
        checkpoint begins with the same bytes."""
        used = sorted({i for batch in plan for i in batch})
        frozen, prompts = self._frozen, self._prompts
        if frozen is None or sum(map(len, plan)) == len(used):
            return list(examples)
        rows = [examples[i] for i in used]
        if prompts is not None and prompts.kept:
            prompts.fill([row.prompt[: -len(self._invocation)] for row in rows])
        self._open.enter_context(frozen.skipped())
        groups = _micro_batches(rows, MICRO_BATCH_TOKENS)
        with self._base.lora.routed(Route((ADAPTER,), training=True)):
            size = frozen.size(self._base, _pairs(groups[0]), prompts)
        tokens = sum(len(row.target) + len(self._invocation) if prompts else len(row) for row in rows)
        if not size or size * tokens > KEPT_BYTES:
            self._open.close()
            return list(examples)

        def states(group: list[Example]) -> list[torch.Tensor]:
            with self._base.lora.routed(Route((ADAPTER,), training=True)):
                return frozen.states(self._base, _pairs(group), prompts)

        torch.set_num_threads(self._own_threads)
        try:
            found = {
                id(row): state
                for group, kept in zip(groups, self._pool.map(states, groups), strict=True)
                for row, state in zip(group, kept, strict=True)
            }
        finally:
            torch.set_num_threads(self._threads)
        return [replace(row, state=found.get(id(row))) for row in examples]

    def loss(self, examples: Sequence[Example]) -> float:
        """Mean negative log-likelihood (nats) of the examples' answers under the weights as they are."""
        total, base = 0.0, self._base
        training = base.model.training
        base.model.eval()
        try:
            with torch.no_grad(), base.active(ADAPTER):
                for rows in _micro_batches(examples, MICRO_BATCH_TOKENS):
                    values = answer_log_probs(base, _pairs(rows), prompts=self._prompts)
                    total -= float(torch.cat(values).double().sum())
        finally:
            base.model.train(training)
        return total / len(examples)

    @property
    def _invocation(self) -> list[int]:
        return self._base.lora.adapters[ADAPTER].invocation or []

    def _part(self, name: str, examples: Sequence[Example], total: int) -> float:
        with self._base.lora.routed(Route((name,), training=True)):
            return step_loss(self._base, examples, self._prompts, total)


def _pairs(examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    return [(example.prompt, example.target) for example in examples]


def _last_modules(adapter: Adapter, share: float) -> list[str]:
    """The modules of an adapter that are in this share of its layers, from the last, or in none."""
    layers = sorted({place(module)[1] for module in adapter.weights} - {-1})
    kept = {-1, *layers[len(layers) - max(1, round(share * len(layers))) :]} if layers else {-1}
    return [module for module in adapter.weights if place(module)[1] in kept]


def _dealt(examples: Sequence[Example], hands: int) -> list[list[Example]]:
    """Examples in so many parts of about as many tokens: the longest first, to the shortest part."""
    parts: list[list[Example]] = [[] for _ in range(hands)]
    tokens = [0] * hands
    for example in sorted(examples, key=len, reverse=True):
        least = tokens.index(min(tokens))
        parts[least].append(example)
        tokens[least] += len(example)
    return [part for part in parts if part]


class _FlatWeights:
    """All LoRA weights as one float32 vector for the optimizer; the model's parameters are views of it, or of
    a copy in the model's own number format, or of one of several copies."""

    def __init__(self, replicas: list[list[torch.Tensor]]):
        self._flats: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []
        for parameters in replicas:
            flat = torch.cat([p.detach().reshape(-1) for p in parameters])
            gradient = torch.zeros_like(flat)
            offset = 0
            for p in parameters:
                view = slice(offset, offset + p.numel())
                p.data = flat[view].view_as(p)
                p.requires_grad_(True)
                p.grad = gradient[view].view_as(p)
                offset += p.numel()
            self._flats.append(flat)
            self._gradients.append(gradient)
        first = self._flats[0]
        self.master = first if first.dtype == torch.float32 else first.float()
        self.master.requires_grad_(True)
        self.master.grad = self._gradients[0] if self.master is first else torch.zeros_like(self.master)

    def clear_gradient(self) -> None:
        for gradient in self._gradients:
            gradient.zero_()

    def gradient(self) -> torch.Tensor:
        """The gradient in float32, as the optimizer will see it."""
        assert self.master.grad is not None
        if self.master.grad is not self._gradients[0]:
            self.master.grad.copy_(self._gradients[0])
        for gradient in self._gradients[1:]:
            self.master.grad.add_(gradient)
        return self.master.grad

    def publish(self) -> None:
        """Let the model see the optimizer's weights."""
        with torch.no_grad():
            for flat in self._flats:
                if flat is not self.master:
                    flat.copy_(self.master)

    def load(self, values: torch.Tensor) -> None:
        with torch.no_grad():
            self.master.copy_(values)
        self.publish()


def _copy_weights(base: Base, directory: Path, adapter: Adapter) -> None:
    """Let `adapter` begin with the weights in `directory`."""
    saved = read_adapter(base.model, directory, base.model.dtype, base.device).named_tensors()
    wanted = adapter.named_tensors()
    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    if shapes != {key: tuple(tensor.shape) for key, tensor in saved.items()}:
        raise IncompatibleAdapter(
            f"{directory}: expected the modules and ranks of this training, found others"
        )
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(saved[key])


def save_adapter(base: Base, adapter: Adapter, targets: Sequence[str], output: Path) -> None:
    """Write an adapter as peft does, in the base's number format."""
    from safetensors.torch import save_file

    output.mkdir(parents=True, exist_ok=True)
    weights = {
        key: value.detach().to("cpu", base.model.dtype).contiguous().clone()
        for key, value in adapter.named_tensors().items()
    }
    save_file(weights, output / "adapter_model.safetensors", metadata={"format": "pt"})
    config = adapter_config(base.model, adapter, targets, base.manifest["revision"])
    (output / "adapter_config.json").write_bytes(canonical_json(config) + b"\n")


def _training_identity(
    base: Base,
    examples: Sequence[Example],
    recipe: AdapterRecipe,
    workers: int,
    start: Path | None,
    last_layers: float,
    stopping: Stopping | None,
) -> str:
    """Names what a checkpoint continues: another base, data or recipe starts afresh."""
    data: list[Any] = [_data(example) for example in examples]
    parts = {
        "base": base.manifest["identity"],
        "dtype": str(base.model.dtype),
        "recipe": recipe.model_dump(),
        "data": sha256_bytes(canonical_json(data)),
        "workers": workers,
        "version": TRAINING_VERSION,
        "start": sha256_file(start / "adapter_model.safetensors") if start else None,
        "last_layers": last_layers,
    }
    if stopping:
        held_out = [_data(example) for example in stopping.examples]
        parts["stopping"] = [held_out, stopping.checks, stopping.patience]
    return sha256_bytes(canonical_json(parts))


def _data(example: Example) -> list[Any]:
    soft = example.soft
    return [example.prompt, example.target, *([soft.tokens, soft.shares, soft.weight] if soft else [])]


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


def _check_invocation(examples: Sequence[Example], invocation: list[int]) -> None:
    for example in examples:
        start = len(example.prompt) - len(invocation)
        if invocation and (start < 1 or example.prompt[start:] != invocation):
            raise BadExample(
                f"row {example.row}: expected a prompt that ends with the tokens that open an answer, "
                f"{invocation}, found {example.prompt[-len(invocation) :]}"
            )


def _epoch_batches(lengths: Sequence[int], budget: int, rng: random.Random) -> list[list[int]]:
    order = list(range(len(lengths)))
    rng.shuffle(order)
    mean = sum(lengths) / len(lengths)
    chunk = max(1, int(BUCKET * budget / mean))
    batches: list[list[int]] = []
    for at in range(0, len(order), chunk):
        batch, tokens = list[int](), 0
        for i in sorted(order[at : at + chunk], key=lambda i: lengths[i]):
            if batch and tokens + lengths[i] > budget:
                batches.append(batch)
                batch, tokens = [], 0
            batch.append(i)
            tokens += lengths[i]
        batches.append(batch)
    rng.shuffle(batches)
    return batches


def _micro_batches(examples: Sequence[Example], budget: int) -> list[list[Example]]:
    result: list[list[Example]] = []
    tokens = 0
    for example in sorted(examples, key=len):
        tokens += len(example)
        if not result or tokens > budget:
            result.append([])
            tokens = len(example)
        result[-1].append(example)
    return result
