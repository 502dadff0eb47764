"""Training checkpoints that survive a kill at any file operation: one safetensors file each, no pickle.

Layout of a directory (one training): `step-<8 digits>.safetensors`, the newest and the one before it. The
header's metadata holds `state` (JSON of {"step", "state"}) and `sha256` over that text and every tensor's
name, dtype, shape and bytes. A file gets its name only when its content is on disk (temporary file, fsync,
rename, fsync of the directory), so a kill leaves the older checkpoints as they were.
"""

import contextlib
import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ml_assets.artifacts import canonical_json, write_atomic

_FILE = re.compile(r"step-(\d{8,})\.safetensors")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What `save_checkpoint` was given, bit for bit; tensors are on the CPU."""

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def save_checkpoint(
    directory: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]
) -> None:
    """Make the checkpoint of `step` durable, then remove all but it and the one before it.

    `tensors` may be of any dtype, shape, device and layout in memory (torch's RNG state is a uint8 tensor);
    `state` is JSON. Raises OSError when the disk fails or is full, TypeError or ValueError when `state` is
    not JSON (NaN is not); the checkpoints that were there stay.
    """
    # copies: safetensors refuses tensors that share memory
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    text = canonical_json({"step": step, "state": state}).decode()
    metadata = {"state": text, "sha256": _digest(copies, text)}
    path = directory / f"step-{step:08d}.safetensors"
    write_atomic(path, safetensors.torch.save(copies, metadata))
    steps = _steps(directory)
    keep = {path, *([steps[max(older)]] if (older := [s for s in steps if s < step]) else [])}
    for old in [*steps.values(), *directory.glob(".step-*.tmp")]:
        if old not in keep:
            with contextlib.suppress(OSError):  # a leftover costs space, not correctness
                old.unlink()


def load_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest intact checkpoint, or None. A damaged file is skipped with a warning that names it."""
    for _, path in sorted(_steps(directory).items(), reverse=True):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            _log.warning("checkpoint %s is damaged and skipped: %s: %s", path, type(error).__name__, error)
    return None


def _read(path: Path) -> Checkpoint:
    data = path.read_bytes()
    tensors = safetensors.torch.load(data)  # checks the header against the size of the file
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    if _digest(tensors, metadata["state"]) != metadata["sha256"]:
        raise ValueError("hash of the content differs")
    content = json.loads(metadata["state"])
    return Checkpoint(content["step"], tensors, content["state"])


def _steps(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    return {int(m[1]): path for path in directory.iterdir() if (m := _FILE.fullmatch(path.name))}


def _digest(tensors: dict[str, torch.Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
