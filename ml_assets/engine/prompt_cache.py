"""Keys and values of prompts under the bare base, computed once and kept.

An activated LoRA does not touch the prompt, so what the base computes for it serves every epoch, seed and
recipe, and every customization that asks the same. Prompts are computed in groups that follow from the
prompts alone, since rounding depends on what is computed together: whatever was kept, a training sees the
same bytes.
"""

import contextlib
import hashlib
import logging
import math
import os
import tempfile
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ml_assets.engine.forward import shared_prefix
from ml_assets.engine.packing import KeyValues, Packing, Past, hidden_states

if TYPE_CHECKING:
    from ml_assets.engine.loading import Base

MEMORY_BYTES = 2 * 2**30
DISK_BYTES = 16 * 2**30

VERSION = 2
"""Raise when the same prompts would get other bytes."""

GROUP_TOKENS = 2048
"""Tokens of one pass that fills the cache."""

GROUP_END = 12
"""About one prompt in so many ends its group, by its digest: new rows change few groups of the old ones."""

_CRC = 4
_log = logging.getLogger(__name__)


class PromptCache:
    """What one base computes for the prompts of one training.

    Args:
        prompts: all that `past` will be asked for, at least one token each.
        directory: where groups are kept for later trainings and for what memory has no room for.
        memory_bytes, disk_bytes: budgets. Prompts that exceed both are computed each time.
    """

    def __init__(
        self,
        base: "Base",
        prompts: Sequence[Sequence[int]],
        directory: Path | None = None,
        memory_bytes: int = MEMORY_BYTES,
        disk_bytes: int = DISK_BYTES,
    ):
        self._base = base
        self._layout = _Layout(base)
        self._memory_bytes = memory_bytes
        self._entries: dict[str, list[torch.Tensor]] = {}
        self._used = 0
        self._lock = threading.Lock()
        distinct = {_digest(prompt): prompt for prompt in prompts}
        self._prefix = list(prompts[0][: shared_prefix(list(distinct.values()))])
        needed = sum(self._layout.size(len(prompt)) for prompt in distinct.values())
        self.kept = needed <= max(memory_bytes, disk_bytes if directory else 0)
        """Whether the budgets have room for all prompts."""
        scope = [base.manifest["identity"], str(base.model.dtype), torch.__version__, VERSION, self._prefix]
        self._disk = _Disk(directory, disk_bytes) if directory and needed <= disk_bytes else None
        self._groups: dict[str, _PromptGroup] = {}
        for members in _grouped(distinct) if self.kept else []:
            group = _PromptGroup(_digest([scope, [name for name, _ in members]]), members)
            self._groups |= dict.fromkeys((name for name, _ in members), group)

    def past(self, prompts: Sequence[Sequence[int]]) -> Past:
        """Keys and values of these prompts, in their order."""
        lengths = [len(prompt) for prompt in prompts]
        if not self.kept:
            return self._layout.past(self._compute(prompts), lengths)
        with self._lock:
            return self._layout.past(self._find(prompts), lengths)

    def fill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compute those of these prompts that are not kept, so that `past` finds them."""
        with self._lock:
            self._find(prompts)

    # -- inside ----------------------------------------------------------------------------------------

    def _find(self, prompts: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        found: dict[str, list[torch.Tensor]] = {}
        names = [_digest(prompt) for prompt in prompts]
        for name in names:
            if name not in found:
                found[name] = self._entries.get(name) or self._read(name) or self._fill(name)
        return [found[name] for name in names]

    def _compute(self, prompts: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        model, prefix = self._base.model, self._prefix
        training = model.training
        model.eval()
        packing = Packing(
            [prompt[len(prefix) :] for prompt in prompts], self._base.device, prefix=prefix, capture=True
        )
        try:
            with torch.no_grad(), self._base.active(None):
                hidden_states(model, packing)
        finally:
            model.train(training)
        assert packing.captured is not None
        return self._layout.entries(packing)

    def _read(self, name: str) -> list[torch.Tensor] | None:
        group = self._groups[name]
        if self._disk is None:
            return None
        offset, size = 0, 0
        for other, prompt in group.members:
            size = self._layout.size(len(prompt))
            if other == name:
                break
            offset += size + _CRC
        data = self._disk.read(group.name, offset, size)
        if data is None:
            return None
        entry = self._layout.unpack(data)
        self._remember(name, entry)
        return entry

    def _fill(self, name: str) -> list[torch.Tensor]:
        group = self._groups[name]
        entries = self._compute([prompt for _, prompt in group.members])
        if self._disk is not None:
            self._disk.write(group.name, [self._layout.pack(entry) for entry in entries])
        for (other, _), entry in zip(group.members, entries, strict=True):
            self._remember(other, entry)
        return entries[[other for other, _ in group.members].index(name)]

    def _remember(self, name: str, entry: list[torch.Tensor]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in entry)
        if name not in self._entries and self._used + size <= self._memory_bytes:
            self._entries[name] = entry
            self._used += size


class _PromptGroup:
    def __init__(self, name: str, members: list[tuple[str, Sequence[int]]]):
        self.name, self.members = name, members


class _Disk:
    """Groups in files, the oldest removed when they exceed the budget. Used by several processes at once."""

    def __init__(self, directory: Path, budget: int):
        self._directory, self._budget = directory, budget

    def read(self, name: str, offset: int, size: int) -> bytes | None:
        """None when the file is not there or not what was written."""
        path = self._directory / f"{name}.kv"
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(size + _CRC)
            os.utime(path)
        except OSError:
            return None
        if len(data) != size + _CRC or zlib.crc32(data[:size]).to_bytes(_CRC, "little") != data[size:]:
            _log.warning("%s is damaged: its prompts are computed again", path)
            return None
        return data[:size]

    def write(self, name: str, parts: list[bytes]) -> None:
        temporary = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._make_room(sum(map(len, parts)))
            handle, temporary = tempfile.mkstemp(dir=self._directory, suffix=".part")
            with open(handle, "wb") as file:
                for part in parts:
                    file.write(part + zlib.crc32(part).to_bytes(_CRC, "little"))
            os.replace(temporary, self._directory / f"{name}.kv")
        except OSError as error:  # a full disk costs time, not the training
            _log.warning("prompts are not kept in %s: %s", self._directory, error)
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def _make_room(self, wanted: int) -> None:
        files = []
        for path in [*self._directory.glob("*.kv"), *self._directory.glob("*.part")]:
            with contextlib.suppress(OSError):
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used + wanted <= self._budget:
                return
            path.unlink(missing_ok=True)
            used -= size


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
        self.dtype, self._device = base.model.dtype, base.device
        self._per_token = sum(n * heads * size for n, (heads, size) in zip(counts, self.shapes, strict=True))

    def size(self, tokens: int) -> int:
        return tokens * self._per_token * self.dtype.itemsize

    def entries(self, packing: Packing) -> list[list[torch.Tensor]]:
        """What was captured, for each sequence with the prefix before it."""
        captured: KeyValues = packing.captured or {}
        groups: list[list[torch.Tensor]] = [[] for _ in self.shapes]
        for module, key_group, _, value_group, _ in self.places:
            k, v = captured[module]
            groups[key_group].append(k[0])
            groups[value_group].append(v[0])
        stacked = [torch.stack(tensors) for tensors in groups]
        return [
            [
                torch.cat([tensor[:, :, : packing.prefix], tensor[:, :, start : start + length]], dim=2)
                for tensor in stacked
            ]
            for start, length in zip(packing.starts, packing.lengths, strict=True)
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
        flat = torch.cat([tensor.reshape(-1) for tensor in entry]).cpu()
        return flat.view(torch.uint8).numpy().tobytes()

    def unpack(self, data: bytes) -> list[torch.Tensor]:
        flat = torch.frombuffer(bytearray(data), dtype=self.dtype)
        tokens = len(flat) // self._per_token
        shapes = [(n, heads, tokens, size) for n, (heads, size) in zip(self.counts, self.shapes, strict=True)]
        parts = flat.split([math.prod(shape) for shape in shapes])
        return [part.view(shape).to(self._device) for part, shape in zip(parts, shapes, strict=True)]


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


def _grouped(prompts: dict[str, Sequence[int]]) -> list[list[tuple[str, Sequence[int]]]]:
    """Prompts of similar length together, at most GROUP_TOKENS of them but at least one."""
    groups: list[list[tuple[str, Sequence[int]]]] = []
    tokens, ended = 0, True
    for name, prompt in sorted(prompts.items(), key=lambda item: (len(item[1]), item[0])):
        if ended or tokens + len(prompt) > GROUP_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append((name, prompt))
        tokens += len(prompt)
        ended = int(name, 16) % GROUP_END == 0 and tokens > GROUP_TOKENS // 4
    return groups
