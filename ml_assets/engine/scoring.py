"""Log-probabilities of answers and texts: fingerprints, forgetting probes, labels to choose from."""

from collections.abc import Iterator, Sequence

import torch

from ml_assets.engine.forward import LOGITS, answer_log_probs, shared_prefix
from ml_assets.engine.loading import Base
from ml_assets.engine.packing import Branches, Packing, hidden_states, logits_of

LABEL_TOKENS = 4096
"""Tokens of prompts and labels in one pass."""


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
    base: Base, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], k: int, batch_tokens: int = 4096
) -> list[tuple[list[list[int]], list[list[float]]]]:
    """At each token of each answer, the k tokens that are most probable under the active adapter, and their
    probabilities: what a teacher tells."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    found: list[tuple[list[list[int]], list[list[float]]]] = [([], [])] * len(pairs)
    for batch in _batches(pairs, order, batch_tokens):
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(logits: torch.Tensor, parts: list[tuple[torch.Tensor, torch.Tensor]] = parts) -> None:
            shares, tokens = logits.softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
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
    return [int(row.argmax()) for row in label_log_probs(base, prompts, labels, adapters)]


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
    if not labels or not all(labels) or len({tuple(label) for label in labels}) < len(labels):
        raise ValueError(f"expected distinct labels of at least one token, found {[*map(list, labels)]}")
    if adapters is None:
        active = base.lora.route.names
        adapters = [active[0] if active else None] * len(prompts)
    results: dict[int, torch.Tensor] = {}
    if not base.packs:
        for i, (prompt, name) in enumerate(zip(prompts, adapters, strict=True)):
            with base.active(name):
                found = answer_log_probs(base, [(prompt, label) for label in labels])
            results[i] = torch.stack([value.sum() for value in found])
        return [results[i] for i in range(len(prompts))]
    tree = _Tree(labels)
    order = sorted(range(len(prompts)), key=lambda i: (adapters[i] or "", len(prompts[i])))
    while order:
        tokens, n = 0, 0
        while n < len(order) and (n == 0 or tokens + len(prompts[order[n]]) <= LABEL_TOKENS):
            tokens += len(prompts[order[n]]) + len(tree.branches.tokens)
            n += 1
        batch, order = order[:n], order[n:]
        found = _score(base, tree, [prompts[i] for i in batch], [adapters[i] for i in batch])
        results.update(zip(batch, found, strict=True))
    return [results[i] for i in range(len(prompts))]


class _Tree:
    """Labels as a tree: node 0 is the end of the prompt, node i + 1 token i of `branches`. `edges` are the
    (node, next token) whose log-probabilities are wanted, `paths` the edges of each label."""

    def __init__(self, labels: Sequence[Sequence[int]]):
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


def _score(
    base: Base, tree: _Tree, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None]
) -> list[torch.Tensor]:
    device, size = base.device, len(tree.branches.tokens)
    active = [base.active_from(name, prompt) for name, prompt in zip(adapters, prompts, strict=True)]
    shared = shared_prefix(prompts)
    keys = {(n, s) if s < shared else None for n, s in zip(adapters, active, strict=True)}
    if len(keys) > 1:  # what one row's adapter computes is not another's
        shared = min(active)
    rest = [prompt[shared:] for prompt in prompts]
    packing = Packing(rest, device, prefix=prompts[0][:shared], branches=tree.branches)
    names, starts = [adapters[0], *adapters], [active[0], *(max(0, start - shared) for start in active)]
    # an adapter that was not invoked does not work on the labels either
    lengths = [shared, *packing.lengths]
    starts[1:] = [
        length if start == len(prompt) else first
        for first, start, prompt, length in zip(starts[1:], active, prompts, packing.lengths, strict=True)
    ]
    with base.lora.routed(base.lora.for_rows(names, lengths, starts)):
        hidden = hidden_states(base.model, packing)
    ends = [start + length - size - 1 for start, length in zip(packing.starts, packing.lengths, strict=True)]
    chosen = torch.tensor(ends, device=device)[:, None] + torch.arange(size + 1, device=device)
    nodes, tokens = tree.nodes.to(device), tree.tokens.to(device)
    rows = max(1, LOGITS // (base.vocabulary * (size + 1)))
    found: list[torch.Tensor] = []
    for part in chosen.split(rows):
        logits = logits_of(base.model, hidden[part.flatten()]).float().view(*part.shape, -1)
        edges = logits[:, nodes, tokens] - logits.logsumexp(-1)[:, nodes]
        found += torch.stack([edges[:, path].sum(-1) for path in tree.paths], dim=-1)
    return found
