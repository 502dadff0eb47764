"""Records for tests."""

import itertools
from typing import Any

from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.records import FeedbackRecord, Judged, TrafficRecord

_numbers = itertools.count()


def record(customization: str = "home", **values: Any) -> TrafficRecord:
    """A request; `asked` is its user message."""
    number = next(_numbers)
    fields: dict[str, Any] = {
        "id": f"chatcmpl-{number:032x}",
        "at": f"2026-11-26T00:00:00.{number % 1_000_000:06d}+00:00",
        "customization": customization,
        "key_id": "0000000a",
        "adapter_digest": "a" * 64,
        "base_revision": "tiny@0123456789ab",
        "messages": [{"role": "user", "content": values.pop("asked", f"question {number}")}],
        "answer": f"answer {number}",
        "status": 200,
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "latency_ms": 12.5,
        "first_token_ms": 5.25,
        "mean_logprob": -0.125,
        "metadata": {},
    }
    return TrafficRecord(**(fields | values))


def judged(
    asked: str, right_answer: str | None, key_id: str = "0000000a", seq: int = 1, **values: Any
) -> Judged:
    """A request with a right answer."""
    request = record(asked=asked, key_id=key_id, **values)
    said = FeedbackRecord(request.id, request.at, request.customization, key_id, None, right_answer, seq)
    return Judged(request, said)


def spec(**changes: Any) -> CustomizationSpec:
    return CustomizationSpec(
        **{
            "name": "home",
            "source": {"kind": "jsonl", "path": "rows.jsonl"},
            "prompt": {"user": "{text}", "target": "{label}"},
            "base_models": ["tiny"],
            "evaluation": {"task": "classification"},
            **changes,
        }
    )
