"""Log-probabilities of answers and texts: fingerprints, forgetting probes, labels to choose from."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ml_assets.engine.forward import LOGITS, answer_log_probs, shared_prefix
from ml_assets.engine.loading import Base
from ml_assets.engine.packing import Branches, Packing, Past, hidden_states, logits_of

T = TypeVar("T")

LABEL_TOKENS = 4096
"""Tokens of prompts and labels in one pass."""

SMALL_TREE = 16
"""Tokens of a tree of labels up to which it is computed in the prompts' own pass."""


def mean_logprobs(
    base: Base, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int = 4096
) -> list[float]:
    """Mean log-probability (nats per token) of each answer given its prompt, under the active adapter.

    `pairs` are (prompt ids, answer ids), each with at least one token. A row's value does not depend on the
    rows beside it beyond rounding.
    """
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    results = [0.0] * len(pairs)
    for batch in _batches(pairs, order, batch_tokens):
        with torch.inference_mode():
            values = answer_log_probs(base, [pairs[j] for j in batch])
        for j, value in zip(batch, values, strict=True):
            results[j] = float(value.double().mean())
    return results


def answer_losses(base: Base, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """Negative log-likelihood of each whole answer given its prompt, in nats: comparable between tokenizers.
    An answer of less than ln 2 is what greedy decoding gives."""
    means = mean_logprobs(base, pairs)
    return [-mean * len(answer) for mean, (_, answer) in zip(means, pairs, strict=True)]


def top_tokens(
    base: Base,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    k: int,
    batch_tokens: int = 4096,
    vocabulary: int | None = None,
) -> list[tuple[list[list[int]], list[list[float]]]]:
    """At each token of each answer, the k tokens that are most probable under the active adapter, and their
    probabilities: what a teacher tells. Of the first `vocabulary` tokens, where a student has no more."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    found: list[tuple[list[list[int]], list[list[float]]]] = [([], [])] * len(pairs)
    for batch in _batches(pairs, order, batch_tokens):
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(logits: torch.Tensor, parts: list[tuple[torch.Tensor, torch.Tensor]] = parts) -> None:
            shares = logits.softmax(-1)[:, :vocabulary]
            shares, tokens = shares.topk(min(k, shares.shape[-1]), dim=-1)
            parts.append((tokens.cpu(), shares.cpu()))

        with torch.inference_mode():
            answer_log_probs(base, [pairs[j] for j in batch], watch=keep)
        tokens, shares = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        lengths = [len(pairs[j][1]) for j in batch]
        for j, some, parts_of in zip(batch, tokens.split(lengths), shares.split(lengths), strict=True):
            # rounded, so that they are the same in a checkpoint's name whatever wrote them
            found[j] = some.tolist(), [[round(x, 4) for x in row] for row in parts_of.tolist()]
    return found


def _batches(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], order: Sequence[int], batch_tokens: int
) -> Iterator[list[int]]:
    """`order` in batches of at most `batch_tokens` tokens with padding; it goes from short to long."""
    batch: list[int] = []
    for position, i in enumerate(order):
        batch.append(i)
        following = order[position + 1] if position + 1 < len(order) else None
        width = len(pairs[following][0]) + len(pairs[following][1]) if following is not None else 0
        if following is None or width * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []


def text_nll(base: Base, texts: Sequence[str]) -> float:
    """Negative log-likelihood of plain texts, nats per token, under the active adapter."""
    total, count = 0.0, 0
    for text in texts:
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"][: base.context_length]
        if len(ids) < 2:
            raise ValueError(f"expected a text of at least two tokens, found {text!r}")
        total -= mean_logprobs(base, [(ids[:1], ids[1:])])[0] * (len(ids) - 1)
        count += len(ids) - 1
    return total / count


# -- labels --------------------------------------------------------------------------------------------


def choose_labels(
    base: Base,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    adapters: Sequence[str | None] | None = None,
) -> list[int]:
    """Number of the most probable label after each prompt; of equals the first."""
    return [label for label, _ in best_labels(base, prompts, labels, adapters)]


@torch.inference_mode()
def best_labels(
    base: Base,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    adapters: Sequence[str | None] | None = None,
) -> list[tuple[int, float]]:
    """The most probable label after each prompt, of equals the first: its number, and its log-probability as
    in `label_log_probs`, which says more about the arguments.

    A label is at most as probable as its first token. Where the tree of labels is not small, prompts are
    computed alone, then the labels behind the most probable first token, then those that could still be
    better, as a tree where they are many (branch and bound: Land and Doig 1960, Econometrica 28).
    """
    tree = _Tree(labels)
    if not base.packs or len(tree.branches.tokens) <= SMALL_TREE:
        scores = label_log_probs(base, prompts, labels, adapters)
        return [(int(row.argmax()), float(row.max())) for row in scores]
    return _in_passes(base, prompts, adapters, 0, lambda *rows: _search(base, tree, labels, *rows))


@torch.inference_mode()
def label_log_probs(
    base: Base,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    adapters: Sequence[str | None] | None = None,
) -> list[torch.Tensor]:
    """Log-probability (nats) of each label as the whole answer to each prompt: (labels,), float32, by prompt.

    `labels` are token ids with the one that ends the turn (`ChatFormat.target_ids`), so that a label that
    begins another one competes with it fairly. `adapters` is as in `generate`. One pass computes prompts and
    the tree of all labels behind each, what labels or prompts begin with in common once. Raises ValueError
    when there is no label, one is empty, or two are the same.
    """
    tree = _Tree(labels)
    if base.packs:
        behind = len(tree.branches.tokens)
        return _in_passes(base, prompts, adapters, behind, lambda *rows: _score(base, tree, *rows))
    results: list[torch.Tensor] = []
    for prompt, name in zip(prompts, _adapters(base, prompts, adapters), strict=True):
        with base.active(name):
            found = answer_log_probs(base, [(prompt, label) for label in labels])
        results.append(torch.stack([value.sum() for value in found]))
    return results


def _adapters(
    base: Base, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None] | None
) -> Sequence[str | None]:
    active = base.lora.route.names
    return adapters if adapters is not None else [active[0] if active else None] * len(prompts)


def _in_passes(
    base: Base,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str | None] | None,
    behind: int,
    found: Callable[[list[Sequence[int]], list[str | None]], Sequence[T]],
) -> list[T]:
    """What `found` gives for each prompt and its adapter, asked for those of one pass at a time. Each prompt
    has so many tokens `behind` it."""
    names = _adapters(base, prompts, adapters)
    order = sorted(range(len(prompts)), key=lambda i: (names[i] or "", len(prompts[i])))
    results: dict[int, T] = {}
    for part in _parts(order, lambda i: len(prompts[i]) + behind):
        values = found([prompts[i] for i in part], [names[i] for i in part])
        results.update(zip(part, values, strict=True))
    return [results[i] for i in range(len(prompts))]


def _parts(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """`items` in parts of at most LABEL_TOKENS tokens, or one item."""
    part: list[T] = []
    tokens = 0
    for item in items:
        if part and tokens + size(item) > LABEL_TOKENS:
            yield part
            part, tokens = [], 0
        part.append(item)
        tokens += size(item)
    if part:
        yield part


class _Tree:
    """Labels as a tree: node 0 is the end of the prompt, node i + 1 token i of `branches`. `edges` are the
    (node, next token) whose log-probabilities are wanted, `paths` the edges of each label."""

    def __init__(self, labels: Sequence[Sequence[int]]):
        if not labels or not all(labels) or len({tuple(label) for label in labels}) < len(labels):
            raise ValueError(f"expected distinct labels of at least one token, found {[*map(list, labels)]}")
        nodes: dict[tuple[int, ...], int] = {(): 0}
        tokens: list[int] = []
        parents: list[int] = []
        edges: dict[tuple[int, int], int] = {}
        self.paths: list[list[int]] = []
        for label in labels:
            path = []
            for i, token in enumerate(label):
                before = tuple(label[:i])
                if before not in nodes:
                    nodes[before] = len(nodes)
                    tokens.append(before[-1])
                    parents.append(nodes[before[:-1]] - 1)
                path.append(edges.setdefault((nodes[before], token), len(edges)))
            self.paths.append(path)
        self.branches = Branches(tuple(tokens), tuple(parents))
        self.nodes = torch.tensor([node for node, _ in edges])
        self.tokens = torch.tensor([token for _, token in edges])


@dataclass(frozen=True)
class _Prompts:
    """Prompts after their pass: last hidden states of its tokens, and the token of each prompt from which its
    adapter works."""

    prompts: Sequence[Sequence[int]]
    adapters: Sequence[str | None]
    packing: Packing
    hidden: torch.Tensor
    active: list[int]


def _computed(
    base: Base,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
    branches: Branches | None = None,
    capture: bool = False,
) -> _Prompts:
    """One pass over the prompts, what they begin with in common once, with `branches` behind each."""
    active = [base.active_from(name, prompt) for name, prompt in zip(adapters, prompts, strict=True)]
    shared = shared_prefix(prompts)
    keys = {(n, s) if s < shared else None for n, s in zip(adapters, active, strict=True)}
    if len(keys) > 1:  # what one row's adapter computes is not another's
        shared = min(active)
    rest = [prompt[shared:] for prompt in prompts]
    prefix = prompts[0][:shared]
    packing = Packing(rest, base.device, prefix=prefix, branches=branches, capture=capture)
    names, starts = [adapters[0], *adapters], [active[0], *(max(0, start - shared) for start in active)]
    # an adapter that was not invoked does not work on the labels either
    lengths = [shared, *packing.lengths]
    starts[1:] = [
        length if start == len(prompt) else first
        for first, start, prompt, length in zip(starts[1:], active, prompts, packing.lengths, strict=True)
    ]
    with base.lora.routed(base.lora.for_rows(names, lengths, starts)):
        return _Prompts(prompts, adapters, packing, hidden_states(base.model, packing), active)


def _score(
    base: Base, tree: _Tree, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None]
) -> list[torch.Tensor]:
    size = len(tree.branches.tokens)
    found = _computed(base, prompts, adapters, tree.branches)
    nodes = _ends(found.packing, size)[:, None] + torch.arange(size + 1)
    return list(_sums(base, tree, found.hidden, nodes, 0))


def _sums(base: Base, tree: _Tree, hidden: torch.Tensor, at: torch.Tensor, first: int) -> torch.Tensor:
    """Log-probabilities of labels from their token `first` (0 or 1) on, (rows, labels). `at` says where the
    hidden states of the nodes from `first` on are, (rows, nodes from `first` on)."""
    device = base.device
    wanted = tree.nodes >= first
    nodes, tokens = (tree.nodes[wanted] - first).to(device), tree.tokens[wanted].to(device)
    found: list[torch.Tensor] = []
    for part in at.to(device).split(max(1, LOGITS // (base.vocabulary * at.shape[1]))):
        logits = logits_of(base.model, hidden[part.flatten()]).float().view(*part.shape, -1)
        edges = torch.zeros(len(part), len(tree.nodes), device=device)
        edges[:, wanted.to(device)] = logits[:, nodes, tokens] - logits.logsumexp(-1)[:, nodes]
        found.append(torch.stack([edges[:, path].sum(-1) for path in tree.paths], dim=-1))
    return torch.cat(found)


def _ends(packing: Packing, behind: int = 0) -> torch.Tensor:
    """Where the last token of each sequence is, without so many `behind` it."""
    ends = [
        start + length - behind - 1 for start, length in zip(packing.starts, packing.lengths, strict=True)
    ]
    return torch.tensor(ends)


def _search(
    base: Base,
    tree: _Tree,
    labels: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
) -> list[tuple[int, float]]:
    """The best label behind each prompt, and its log-probability."""
    found = _computed(base, prompts, adapters, capture=True)
    ends = found.hidden[_ends(found.packing).to(base.device)]
    firsts = torch.tensor([label[0] for label in labels], device=base.device)
    bounds = _token_log_probs(base, ends, firsts.expand(len(prompts), -1))
    scores = torch.full_like(bounds, -torch.inf)

    def tokens(row: int) -> int:
        return found.packing.prefix + found.packing.lengths[row]

    def score_pairs(chosen: torch.Tensor) -> None:
        for some in _parts(chosen.nonzero().tolist(), lambda pair: tokens(pair[0])):
            values = _behind(base, found, [(row, labels[label]) for row, label in some])
            for (row, label), value in zip(some, values, strict=True):
                scores[row, label] = bounds[row, label] + value

    score_pairs(bounds == bounds.amax(-1, keepdim=True))
    open_ = (scores == -torch.inf) & (bounds >= scores.amax(-1, keepdim=True))
    size = len(tree.branches.tokens)
    rests = torch.tensor([len(label) - 1 for label in labels], device=base.device)
    few = 2 * (open_ * rests).sum(-1) <= size
    score_pairs(open_ & few[:, None])
    whole = (open_.any(-1) & ~few).nonzero()[:, 0].tolist()
    for rows in _parts(whole, lambda row: tokens(row) + size):
        packing, hidden = _pass_behind(base, found, rows, [()] * len(rows), tree.branches)
        nodes = torch.tensor(packing.starts)[:, None] + torch.arange(size)
        scores[rows] = bounds[rows] + _sums(base, tree, hidden, nodes, 1)
    chosen = scores.argmax(-1)
    return [(int(label), float(scores[row, label])) for row, label in enumerate(chosen)]


def _behind(base: Base, found: _Prompts, pairs: Sequence[tuple[int, Sequence[int]]]) -> list[float]:
    """Log-probability of a label's tokens after its first, for (prompt, label) pairs."""
    sums = [0.0] * len(pairs)
    longer = [i for i, (_, label) in enumerate(pairs) if len(label) > 1]
    if not longer:
        return sums
    rows, sequences = [pairs[i][0] for i in longer], [pairs[i][1][:-1] for i in longer]
    packing, hidden = _pass_behind(base, found, rows, sequences)
    wanted = torch.tensor([token for i in longer for token in pairs[i][1][1:]], device=base.device)
    values = _token_log_probs(base, hidden, wanted[:, None])[:, 0]
    for i, part in zip(longer, values.split(packing.lengths), strict=True):
        sums[i] = float(part.sum())
    return sums


def _token_log_probs(base: Base, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (N, k) of tokens (N, k) after hidden states (N, size), some rows at a time."""
    most = max(1, LOGITS // base.vocabulary)
    return torch.cat(
        [
            logits_of(base.model, part).float().log_softmax(-1).gather(-1, wanted)
            for part, wanted in zip(hidden.split(most), tokens.split(most), strict=True)
        ]
    )


def _pass_behind(
    base: Base,
    found: _Prompts,
    rows: Sequence[int],
    sequences: Sequence[Sequence[int]],
    branches: Branches | None = None,
) -> tuple[Packing, torch.Tensor]:
    """Sequences behind computed prompts, each with `branches` behind it; and their hidden states."""
    packing = Packing(sequences, base.device, past=_past(found.packing, rows), branches=branches)
    starts = [
        0 if found.active[row] < len(found.prompts[row]) else length
        for row, length in zip(rows, packing.lengths, strict=True)
    ]
    names = [found.adapters[row] for row in rows]
    with base.lora.routed(base.lora.for_rows(names, packing.lengths, starts)):
        return packing, hidden_states(base.model, packing)


def _past(packing: Packing, rows: Sequence[int]) -> Past:
    """Prefix and sequence of some rows of a packing, as the past of what comes behind them."""
    assert packing.captured is not None
    lengths = [packing.prefix + packing.lengths[row] for row in rows]
    index = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for i, row in enumerate(rows):
        start, length = packing.starts[row], packing.lengths[row]
        index[i, : lengths[i]] = torch.tensor([*range(packing.prefix), *range(start, start + length)])
    index = index.to(packing.input_ids.device)
    values = {
        module: (k[0][:, index].transpose(0, 1), v[0][:, index].transpose(0, 1))
        for module, (k, v) in packing.captured.items()
    }
    return Past(values, lengths)
