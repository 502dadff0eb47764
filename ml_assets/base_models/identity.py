"""What makes two copies of a base model the same: a hash over config, tokenizer, chat template and weights.

The hash of a directory looks at content, not at files: JSON is compared without spaces, key order and the
keys that tell where a copy came from; weights are hashed tensor by tensor, so that shards and metadata do
not matter. A GGUF file carries all four in one immutable file, and its SHA-256 is the hash.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ml_assets.artifacts import canonical_json, sha256_bytes, sha256_file, write_atomic

VOLATILE = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "name_or_path",
        "transformers_version",
        "is_local",
        "local_files_only",
        "tokenizer_file",
    }
)
"""Keys that say where a copy lies or what wrote it, at any depth of a JSON file."""

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_JSON = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
TOKENIZER_RAW = ("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
PADDING = frozenset(
    {
        "padding",
        "padding_side",
        "pad_to_multiple_of",
        "pad_token",
        "pad_token_id",
        "pad_token_type_id",
        "truncation",
        "truncation_side",
        "truncation_strategy",
        "max_length",
        "model_max_length",
        "stride",
    }
)
"""Settings of a tokenizer that fill up and cut sequences, which Evergreen does itself."""
CHAT_TEMPLATE = "chat_template.jinja"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
CHUNK = 1 << 22


class BaseModelError(Exception):
    """A base model that cannot be used; the message names the file, what is wrong and what was expected."""


def revision_key(family: str, identity: str) -> str:
    """The partition key of a base revision: `family@` and the first 12 of the identity's 64 hex digits."""
    return f"{family}@{identity[:12]}"


def split_revision(revision: str) -> tuple[str, str]:
    """`family@0123456789ab` -> ("family", "0123456789ab"). Raises BaseModelError on any other form."""
    match = re.fullmatch(r"(.+)@([0-9a-f]{12})", revision)
    if match is None:
        raise BaseModelError(f"base revision {revision!r}: expected a family, '@' and 12 hex digits")
    return match[1], match[2]


def identify(path: Path) -> str:
    """The content hash (64 hex) of a base model: a directory in the Hugging Face layout, or a GGUF file.

    Raises BaseModelError that names the file when something is missing, damaged or not allowed (pickle).
    """
    if path.is_dir():
        return sha256_bytes(canonical_json(identity_parts(path)))
    if not path.is_file():
        raise BaseModelError(f"{path}: no such base model")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BaseModelError(f"{path}: not a GGUF file (it does not start with 'GGUF')")
    return sha256_file(path)


def identity_parts(directory: Path) -> dict[str, str]:
    """{"config", "tokenizer", "chat_template", "weights"}: the hash (64 hex) of each part of a directory in
    the Hugging Face layout."""
    files = model_files(directory)
    template = chat_template(directory)
    return {
        "config": sha256_bytes(canonical_json(_config(files))),
        "tokenizer": sha256_bytes(canonical_json(_tokenizer(files))),
        "chat_template": sha256_bytes((template or "").encode()),
        "weights": _weights(directory),
    }


def reading(directory: Path) -> dict[str, Any]:
    """All of a tokenizer that decides which tokens a text is: where it is the same for two models, the same
    text is the same tokens. A tokenizer keeps how it was last called when it is saved; that is no part."""
    parts = _tokenizer(model_files(directory))
    for name in ("tokenizer.json", "special_tokens_map.json", TOKENIZER_CONFIG):
        if name in parts:
            parts[name] = {key: value for key, value in parts[name].items() if key not in PADDING}
    return parts


def model_files(directory: Path) -> dict[str, Path]:
    """The files of a model directory that Evergreen reads, by name; all others (code, pickles, adapters,
    copies in other formats) are never opened."""
    names = [CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, CHAT_TEMPLATE, *TOKENIZER_JSON, *TOKENIZER_RAW]
    files = {name: directory / name for name in names if (directory / name).is_file()}
    if CONFIG not in files:
        hint = "; use kind 'gguf' for a GGUF file" if any(directory.glob("*.gguf")) else ""
        raise BaseModelError(f"{directory}: expected a model directory with {CONFIG}{hint}")
    if not files.keys() & {"tokenizer.json", "vocab.json", "vocab.txt", *TOKENIZER_RAW}:
        raise BaseModelError(f"{directory}: expected a tokenizer (tokenizer.json)")
    return files | {path.name: path for path in weight_files(directory)}


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the weights, and the index when there is one.

    The choice is that of transformers: `model.safetensors`, else the shards that the index names.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / WEIGHTS_INDEX
    if index.is_file():
        try:
            shards = sorted(set(_read_json(index)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise BaseModelError(
                f"{index}: expected 'weight_map' with a file name for each tensor"
            ) from error
        for shard in shards:
            if not SHARD.fullmatch(shard):
                raise BaseModelError(
                    f"{index}: {shard!r} is not a name like model-00001-of-00002.safetensors"
                )
            if not (directory / shard).is_file():
                raise BaseModelError(f"{directory / shard}: missing, but {WEIGHTS_INDEX} names it")
        return [index, *(directory / shard for shard in shards)]
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise BaseModelError(
            f"{directory / pickles[0]}: pickled weights can run code when they are loaded; "
            f"expected {WEIGHTS} (save the model again with transformers)"
        )
    raise BaseModelError(f"{directory}: expected weights in {WEIGHTS} or in shards with {WEIGHTS_INDEX}")


def chat_template(directory: Path) -> str | None:
    """The default chat template of a model directory: `chat_template.jinja`, else that of
    tokenizer_config.json; None when the model has none."""
    path = directory / CHAT_TEMPLATE
    if path.is_file():
        return _read_text(path)
    path = directory / TOKENIZER_CONFIG
    template = _read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(template, list):  # several named templates
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise BaseModelError(f"{path}: expected 'chat_template' to be text or a list of named templates")
    return template


# -- cheap identity ------------------------------------------------------------------------------------


def stamp(path: Path, member: str | None = None) -> str:
    """A hash (64 hex) that changes when a file of the base model is written, without reading content: names,
    sizes, inodes and times of change."""
    files = sorted(model_files(path).values()) if path.is_dir() else [path]
    entries = []
    for file in files:
        status = file.stat()
        entries.append(
            [str(file.resolve()), status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        )
    return sha256_bytes(canonical_json({"files": entries, "member": member}))


def recall_identity(cache: Path, key: str) -> str | None:
    """The identity that was noted under a stamp, or None."""
    try:
        identity = json.loads((cache / f"{key}.json").read_bytes())["identity"]
    except (OSError, ValueError, KeyError, TypeError):  # no note, or a damaged one: hash again
        return None
    return identity if re.fullmatch(r"[0-9a-f]{64}", str(identity)) else None


def remember_identity(cache: Path, key: str, identity: str) -> None:
    write_atomic(cache / f"{key}.json", canonical_json({"identity": identity}))


# -- parts ---------------------------------------------------------------------------------------------


def _config(files: dict[str, Path]) -> dict[str, Any]:
    parts = {"config": strip(_read_json(files[CONFIG]))}
    if GENERATION_CONFIG in files:
        generation = strip(_read_json(files[GENERATION_CONFIG]))
        if not generation.pop("_from_model_config", False):  # else it says nothing that config.json does not
            parts["generation"] = generation
    return parts


def _tokenizer(files: dict[str, Path]) -> dict[str, Any]:
    parts: dict[str, Any] = {name: strip(_read_json(files[name])) for name in TOKENIZER_JSON if name in files}
    parts |= {name: sha256_file(files[name]) for name in TOKENIZER_RAW if name in files}
    if TOKENIZER_CONFIG in files:
        config = strip(_read_json(files[TOKENIZER_CONFIG]))
        config.pop("chat_template", None)  # a part of its own
        parts[TOKENIZER_CONFIG] = config
    return parts


def strip(value: Any, volatile: frozenset[str] = VOLATILE) -> Any:
    """A JSON value without the volatile keys. A vocabulary (text to whole number) is left alone."""
    if isinstance(value, dict):
        return {
            key: strip(entry, volatile)
            for key, entry in value.items()
            if key not in volatile or type(entry) is int
        }
    return [strip(entry, volatile) for entry in value] if isinstance(value, list) else value


def _weights(directory: Path) -> str:
    tensors: dict[str, list[Any]] = {}
    files = weight_files(directory)
    for path in files:
        if path.name == WEIGHTS_INDEX:
            continue
        for name, entry in tensor_hashes(path):
            if name in tensors:
                raise BaseModelError(f"{path}: tensor {name!r} is in another shard too")
            tensors[name] = entry
    if files[0].name == WEIGHTS_INDEX:
        for name in sorted(set(_read_json(files[0])["weight_map"]) - set(tensors)):
            raise BaseModelError(f"{files[0]}: tensor {name!r} is in none of the shards")
    if not tensors:
        raise BaseModelError(f"{files[0]}: expected at least one tensor")
    return sha256_bytes(canonical_json(tensors))


def tensor_hashes(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """Each tensor of a safetensors file in file order, as (name, [dtype, shape, SHA-256 of its bytes]).

    Raises BaseModelError when the file is not exactly a header and the bytes that the header describes.
    """
    with path.open("rb") as file:
        header, start = _header(path, file)
        size = path.stat().st_size
        position = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if begin != position or end < begin:
                raise BaseModelError(f"{path}: tensor {name!r} does not follow the one before it")
            position = end
            if start + end > size:
                raise BaseModelError(
                    f"{path}: {size} bytes, but tensor {name!r} ends at {start + end}: the file is truncated"
                )
            digest = hashlib.sha256()
            for offset in range(begin, end, CHUNK):
                digest.update(file.read(min(CHUNK, end - offset)))
            yield name, [entry["dtype"], entry["shape"], digest.hexdigest()]
        if start + position != size:
            raise BaseModelError(f"{path}: {size - start - position} bytes belong to no tensor")


def _header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER, path.stat().st_size - 8):
        raise BaseModelError(f"{path}: not a safetensors file (header of {length} bytes)")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            begin, end = entry["data_offsets"]
            if not (isinstance(begin, int) and isinstance(end, int) and isinstance(entry["dtype"], str)):
                raise TypeError("offsets are not whole numbers")
            entry["shape"] = [int(dimension) for dimension in entry["shape"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BaseModelError(f"{path}: not a safetensors file (unreadable header: {error})") from error
    return header, 8 + length


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BaseModelError(f"{path}: expected UTF-8 text: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
        canonical_json(value)  # refuses NaN and text that is not Unicode
    except (ValueError, RecursionError) as error:
        raise BaseModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{path}: expected a JSON object")
    return value
