"""From a fetched base model to the form that everything else loads: bf16 safetensors in the Hugging Face
layout, nothing executable, nothing that tells where or when it was made."""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_assets.artifacts import canonical_json
from ml_assets.base_models import identity
from ml_assets.base_models.identity import BaseModelError

CONVERSION_VERSION = "1"
"""Part of the input key of a base_model artifact: raise it when converted bytes or manifest change."""

OFFLINE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
NAMED = 3  # how many tensors an error names


def convert(source: Path, directory: Path) -> None:
    """Write the base model at `source` (a model directory or a GGUF file) to `directory` as bfloat16
    safetensors (tensors that the architecture keeps in float32 stay so). A GGUF file is dequantized.

    Raises BaseModelError when the model is not a causal language model that
    transformers knows without code of its own, a tensor is missing or holds NaN or infinity, it is quantized
    in another way, or its tokenizer does not fit.
    """
    from ml_assets.engine.loading import quiet

    quiet()
    with _staged(source) as (folder, options):
        tokenizer = _load_tokenizer(source, folder, options)
        model = _load_model(source, folder, options)
        _check_weights(source, model)
        _check_tokenizer(source, model, tokenizer)
        # a dequantized GGUF is a plain model; with these two, save_pretrained would look for its quantizer
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        if hasattr(model.config, "auto_map"):
            del model.config.auto_map
        if source.is_dir():
            tokenizer.chat_template = identity.chat_template(source)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        for name in (identity.CONFIG, identity.GENERATION_CONFIG, identity.TOKENIZER_CONFIG):
            if (directory / name).exists():
                write_json(directory / name, identity.strip(json.loads((directory / name).read_bytes())))
        for path in directory.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)


def load(directory: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a converted base model, for the probe."""
    model = _load_model(directory, directory, OFFLINE)
    return model.eval(), _load_tokenizer(directory, directory, OFFLINE)


def write_json(path: Path, value: Any) -> None:
    canonical_json(value)  # refuses NaN
    path.write_text(json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _staged(source: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder with links to just the files that are read, and the options that load from it.

    Other files could change what is loaded: an adapter_config.json is loaded on top of the base.
    """
    with tempfile.TemporaryDirectory(prefix="evergreen-base-") as temporary:
        folder = Path(temporary)
        options = dict(OFFLINE)
        if source.is_dir():
            for name, path in identity.model_files(source).items():
                os.symlink(path.resolve(), folder / name)
        else:
            os.symlink(source.resolve(), folder / "model.gguf")
            options["gguf_file"] = "model.gguf"
        yield folder, options


def _load_tokenizer(source: Path, folder: Path, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # what is wrong with a tokenizer comes as any exception
        raise BaseModelError(f"{source}: its tokenizer cannot be loaded: {_reason(error, folder)}") from error


def _load_model(source: Path, folder: Path, options: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    if source.is_dir():
        config = json.loads((folder / identity.CONFIG).read_bytes())
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "unknown")
            raise BaseModelError(
                f"{source / identity.CONFIG}: quantized weights ({method}); expected plain weights, or a GGUF"
            )
        options = options | {"use_safetensors": True}
    try:
        # stderr: the GGUF reader has a progress bar that cannot be turned off; what is wrong is raised
        with contextlib.redirect_stderr(io.StringIO()):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.bfloat16,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused below by name
                **options,
            )
        model, info = loaded
    except Exception as error:  # unknown architecture, shapes that differ, damaged GGUF, ...
        raise BaseModelError(f"{source}: cannot be loaded: {_reason(error, folder)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise BaseModelError(f"{source}: missing {_named(missing)}, which {type(model).__name__} needs")
    mismatched = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if mismatched:
        raise BaseModelError(f"{source}: {_named(mismatched)} of another shape than config.json says")
    return model


def _check_weights(source: Path, model: Any) -> None:
    import torch

    broken = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise BaseModelError(f"{source}: NaN or infinity in {_named(sorted(broken))}")


def _check_tokenizer(source: Path, model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise BaseModelError(
            f"{source}: the tokenizer has token ids up to {highest}, the model embeds {rows}: "
            "they are not of one model"
        )
    if not end_tokens(model, tokenizer):
        raise BaseModelError(f"{source}: neither tokenizer nor generation config names an end-of-text token")


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: those of the generation config and the tokenizer's own."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    ids = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return sorted(i for i in ids if i is not None)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"tensor {', '.join(repr(name) for name in names[:NAMED])}{more}"


def _reason(error: Exception, folder: Path) -> str:
    """The first lines of a library's error, without the name of our temporary folder."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)[:500].replace(f"{folder}/", "").replace(str(folder), "the model")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
