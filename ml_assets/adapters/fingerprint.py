"""Which adapter is this? Log-probabilities of a few answers, with and without it, tell one from another.

A server that lost its adapter, or runs another one, answers the probes with other probabilities; so does a
server on which the adapter loaded but changes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

TOLERANCE = 0.05
"""Nats per token: above what number formats and thread counts change, below what an adapter changes."""

RELATIVE_TOLERANCE = 0.02
"""Of a probe's log-probability: what another number format changes grows with how unlikely the answer is.
SmolLM2 135M in float32 here and in bfloat16 in vLLM differed by up to 0.8 % of a bare base's values, near
-3.6."""

MIN_EFFECT = 4 * TOLERANCE
"""An adapter that moves no probe by this much can't be told from the bare base."""

PROBES = 4
Kind = Literal["with", "without"]


class NoEffect(ValueError):
    """The adapter does not change what the base says to its probes."""


def choose_probes(messages_and_answers: Sequence[tuple[list[dict[str, str]], str]]) -> list[dict[str, Any]]:
    """Probes from the first few training examples (their order is by row hash, so it is stable)."""
    return [{"messages": messages, "answer": answer} for messages, answer in messages_and_answers[:PROBES]]


def measure(base: Any, probes: Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean log-probability (nats per token) of each probe's answer under the active adapter.

    `base` is an `ml_assets.engine.loading.Base`.
    """
    from ml_assets.engine.scoring import mean_logprobs

    pairs = [(base.chat.prompt_ids(p["messages"]), base.chat.target_ids(p["answer"])) for p in probes]
    return mean_logprobs(base, pairs)


def make_fingerprint(
    probes: Sequence[Mapping[str, Any]],
    with_adapter: Sequence[float],
    without: Sequence[float],
    must_differ: bool = True,
) -> dict[str, Any]:
    """The manifest's `fingerprint`. Raises NoEffect when the adapter moves no probe; a prompt-only one need
    not: it may be the prompt alone."""
    effect = max((abs(a - b) for a, b in zip(with_adapter, without, strict=True)), default=0.0)
    if must_differ and effect < MIN_EFFECT:
        raise NoEffect(
            f"the adapter changes no probe's log-probability by {MIN_EFFECT} nats per token (largest change "
            f"{effect:.3f}): it learned nothing, so it could not be told from the bare base"
        )
    rows = zip(probes, with_adapter, without, strict=True)
    return {
        "probes": [{**probe, "with": round(a, 4), "without": round(b, 4)} for probe, a, b in rows],
        "tolerance": TOLERANCE,
    }


def tolerances(fingerprint: Mapping[str, Any], kind: Kind = "with") -> list[float]:
    """How far a measured value may be from each probe's, in nats per token: the fingerprint's tolerance, more
    for an unlikely answer, but then at most a quarter of what the adapter changes there: the bare base is
    told from it however unlikely the answer is."""
    least = fingerprint["tolerance"]
    return [
        max(least, min(RELATIVE_TOLERANCE * abs(probe[kind]), abs(probe["with"] - probe["without"]) / 4))
        for probe in fingerprint["probes"]
    ]


def matches(fingerprint: Mapping[str, Any], measured: Sequence[float], kind: Kind = "with") -> bool:
    """Whether measured probe values are this adapter's, or with `kind="without"` those of its bare base."""
    expected = [probe[kind] for probe in fingerprint["probes"]]
    if len(measured) != len(expected):
        return False
    found = zip(expected, measured, tolerances(fingerprint, kind), strict=True)
    return all(abs(a - b) <= tolerance for a, b, tolerance in found)
