"""Keys and values of prompts under the bare base, computed once and kept.

An activated LoRA does not touch the prompt, so what the base computes for it serves every epoch, seed, recipe
and customization that asks the same. Entries are keyed by base, number format and tokens; those that memory
has no room for are on disk, both within a budget of bytes, least recently used first out.
"""

import contextlib
import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ml_assets.engine.packing import KeyValues, Packing, Past, hidden_states

if TYPE_CHECKING:
    from ml_assets.engine.loading import Base

MEMORY_BYTES = 2 * 2**30
DISK_BYTES = 16 * 2**30

FILL_TOKENS = 2048
"""Tokens of one pass that fills the cache."""


class PromptCache:
    """Prompts of one base.

    Args:
        directory: where entries go that memory has no room for; None keeps no more than memory holds.
        memory_bytes, disk_bytes: budgets.
    """

    def __init__(
        self,
        base: "Base",
        directory: Path | None = None,
        memory_bytes: int = MEMORY_BYTES,
        disk_bytes: int = DISK_BYTES,
    ):
        if not base.packs:
            raise ValueError(f"{base.manifest['revision']}: its keys and values can't be kept")
        self._base = base
        self._scope = f"{base.manifest['identity']}/{base.model.dtype}/{torch.__version__}"
        self._directory = (
            directory / hashlib.sha256(self._scope.encode()).hexdigest()[:16] if directory else None
        )
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes
        self._entries: OrderedDict[str, list[torch.Tensor]] = OrderedDict()
        self._bytes = 0
        self._on_disk: OrderedDict[str, int] = OrderedDict()
        self._disk_used = 0
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            files = [(path.stat(), path) for path in self._directory.glob("*.kv")]
            for stat, path in sorted(files, key=lambda pair: pair[0].st_mtime):
                self._on_disk[path.stem] = stat.st_size
                self._disk_used += stat.st_size
        self._layout = _Layout(base)

    def past(self, prompts: Sequence[Sequence[int]]) -> Past:
        """Keys and values of these prompts (at least one token each), computing those that are not kept."""
        names = [self._name(prompt) for prompt in prompts]
        found: dict[str, list[torch.Tensor]] = {}
        missing: dict[str, Sequence[int]] = {}
        for name, prompt in zip(names, prompts, strict=True):
            if name not in found and name not in missing:
                entry = self._recall(name)
                if entry is None:
                    missing[name] = prompt
                else:
                    found[name] = entry
        for batch in _batches(list(missing.items())):
            for (name, _), entry in zip(batch, self._compute([prompt for _, prompt in batch]), strict=True):
                found[name] = entry
                self._remember(name, entry)
        return self._layout.past([found[name] for name in names], [len(prompt) for prompt in prompts])

    # -- inside ----------------------------------------------------------------------------------------

    def _name(self, prompt: Sequence[int]) -> str:
        return hashlib.sha256(f"{self._scope}/{list(prompt)}".encode()).hexdigest()[:32]

    def _compute(self, prompts: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        model = self._base.model
        training = model.training
        model.eval()
        packing = Packing(prompts, self._base.device, capture=True)
        try:
            with torch.no_grad(), self._base.active(None):
                hidden_states(model, packing)
        finally:
            model.train(training)
        assert packing.captured is not None
        return self._layout.entries(packing.captured, packing.starts, packing.lengths)

    def _recall(self, name: str) -> list[torch.Tensor] | None:
        entry = self._entries.get(name)
        if entry is not None:
            self._entries.move_to_end(name)
            return entry
        if name not in self._on_disk or self._directory is None:
            return None
        try:
            data = (self._directory / f"{name}.kv").read_bytes()
        except FileNotFoundError:  # another process made room
            self._disk_used -= self._on_disk.pop(name)
            return None
        self._on_disk.move_to_end(name)
        entry = self._layout.unpack(data, self._base.model.dtype)
        self._remember(name, entry)
        return entry

    def _remember(self, name: str, entry: list[torch.Tensor]) -> None:
        size = _bytes(entry)
        if size > self._memory_bytes:
            self._spill(name, entry)
            return
        while self._bytes + size > self._memory_bytes:
            oldest, old = self._entries.popitem(last=False)
            self._bytes -= _bytes(old)
            self._spill(oldest, old)
        self._entries[name] = entry
        self._bytes += size

    def _spill(self, name: str, entry: list[torch.Tensor]) -> None:
        if self._directory is None or name in self._on_disk:
            return
        data = self._layout.pack(entry)
        if len(data) > self._disk_bytes:
            return
        while self._disk_used + len(data) > self._disk_bytes:
            oldest, size = self._on_disk.popitem(last=False)
            (self._directory / f"{oldest}.kv").unlink(missing_ok=True)
            self._disk_used -= size
        temporary = None
        try:
            handle, temporary = tempfile.mkstemp(dir=self._directory)
            with open(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, self._directory / f"{name}.kv")
        except OSError:  # a full disk costs time, not the training
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            return
        self._on_disk[name] = len(data)
        self._disk_used += len(data)


class _Layout:
    """How keys and values of all attention modules lie in a few tensors: one for each shape (heads, size),
    (modules of that shape, heads, tokens, size)."""

    def __init__(self, base: "Base"):
        packing = Packing([[base.pad_id]], base.device, capture=True)
        with torch.no_grad(), base.active(None):
            hidden_states(base.model, packing)
        assert packing.captured is not None
        self.shapes: list[tuple[int, int]] = []
        counts: list[int] = []
        self.places: list[
            tuple[torch.nn.Module, int, int, int, int]
        ] = []  # module, group and index of k and of v
        for module, pair in packing.captured.items():
            place = []
            for tensor in pair:
                shape = (tensor.shape[1], tensor.shape[3])
                if shape not in self.shapes:
                    self.shapes.append(shape)
                    counts.append(0)
                group = self.shapes.index(shape)
                place += [group, counts[group]]
                counts[group] += 1
            self.places.append((module, *place))
        self.counts = counts

    def entries(self, captured: KeyValues, starts: list[int], lengths: list[int]) -> list[list[torch.Tensor]]:
        groups: list[list[torch.Tensor]] = [[] for _ in self.shapes]
        for module, key_group, _, value_group, _ in self.places:
            k, v = captured[module]
            groups[key_group].append(k[0])
            groups[value_group].append(v[0])
        stacked = [torch.stack(tensors) for tensors in groups]
        return [
            [tensor[:, :, start : start + length].clone() for tensor in stacked]
            for start, length in zip(starts, lengths, strict=True)
        ]

    def past(self, entries: list[list[torch.Tensor]], lengths: list[int]) -> Past:
        width = max(lengths)
        groups: list[torch.Tensor] = []
        for group, (heads, size) in enumerate(self.shapes):
            first = entries[0][group]
            buffer = first.new_zeros(len(entries), self.counts[group], heads, width, size)
            for row, (entry, length) in enumerate(zip(entries, lengths, strict=True)):
                buffer[row, :, :, :length] = entry[group]
            groups.append(buffer)
        values = {module: (groups[kg][:, ki], groups[vg][:, vi]) for module, kg, ki, vg, vi in self.places}
        return Past(values, lengths)

    def pack(self, entry: list[torch.Tensor]) -> bytes:
        return b"".join(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes() for tensor in entry)

    def unpack(self, data: bytes, dtype: torch.dtype) -> list[torch.Tensor]:
        flat = torch.frombuffer(bytearray(data), dtype=dtype)
        per_token = sum(
            count * heads * size for count, (heads, size) in zip(self.counts, self.shapes, strict=True)
        )
        tokens = len(flat) // per_token
        sizes = [
            count * heads * tokens * size
            for count, (heads, size) in zip(self.counts, self.shapes, strict=True)
        ]
        return [
            part.view(count, heads, tokens, size)
            for part, count, (heads, size) in zip(flat.split(sizes), self.counts, self.shapes, strict=True)
        ]


def _bytes(entry: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in entry)


def _batches(items: list[tuple[str, Any]]) -> list[list[tuple[str, Any]]]:
    """Prompts of similar length together, at most FILL_TOKENS of them but at least one."""
    batches: list[list[tuple[str, Any]]] = []
    tokens = 0
    for item in sorted(items, key=lambda item: len(item[1])):
        tokens += len(item[1])
        if not batches or tokens > FILL_TOKENS:
            batches.append([])
            tokens = len(item[1])
        batches[-1].append(item)
    return batches
