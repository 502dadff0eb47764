"""What the traffic database holds: one record for each request, and for each feedback."""

from dataclasses import dataclass, field
from typing import Literal

Rating = Literal[-1, 1]
"""Down or up."""
OPERATOR = "operator"
"""Stands for the id of an API key where the operator said what is right (`evergreen labels import`). The ids
of keys are hexadecimal: it can be none of them."""


@dataclass(frozen=True)
class TrafficRecord:
    """A request and its answer, after redaction. Times are UTC in ISO 8601; `seq` is given by the database
    and grows with the order of writing."""

    id: str
    """The response's id: `chatcmpl-...`."""
    at: str
    customization: str
    key_id: str
    adapter_digest: str
    base_revision: str
    messages: list[dict[str, str]]
    """[{"role", "content"}, ...] as they were asked, without the system prompt that the gateway adds."""
    answer: str
    status: int
    """HTTP: 200; 499 when the client went away before the end, 5xx when it failed. `answer` is then what
    there was of it."""
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    latency_ms: float
    """From the request to the end of its answer, waiting included."""
    first_token_ms: float | None
    mean_logprob: float | None
    """Mean log-probability of the answer's tokens, the one that ends it included, nats."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What the client sent along (OpenAI's `metadata`), such as a language."""
    seq: int | None = None


@dataclass(frozen=True)
class FeedbackRecord:
    """What a user said about an answer: a rating, the right answer, or both."""

    request_id: str
    at: str
    customization: str
    key_id: str
    rating: Rating | None = None
    right_answer: str | None = None
    seq: int | None = None


@dataclass(frozen=True)
class Judged:
    """A request with what was said about it last."""

    request: TrafficRecord
    feedback: FeedbackRecord
