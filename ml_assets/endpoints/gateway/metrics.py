"""Prometheus metrics of one gateway."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """`customization` is one the ledger knows, or `-`: names from requests do not become series."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "evergreen_requests",
            "Requests by customization and HTTP status (499: the client went away)",
            ["customization", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "evergreen_request_seconds",
            "Time from the request to the end of its answer",
            ["customization"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "evergreen_first_token_seconds",
            "Time from the request to its first token",
            ["customization"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter(
            "evergreen_tokens",
            "Tokens read (kind=prompt) and written (kind=completion)",
            ["customization", "kind"],
            registry=self.registry,
        )
        self.waiting = Gauge(
            "evergreen_queue_length",
            "Requests that wait for the model",
            ["customization"],
            registry=self.registry,
        )
        self.served = Gauge(
            "evergreen_served",
            "1 for the adapter that answers for a customization",
            ["customization", "adapter", "base"],
            registry=self.registry,
        )
        self.traffic = Counter(
            "evergreen_traffic_records",
            "Requests by what became of their record: stored, unlogged (the key wants nothing stored), "
            "dropped (the queue was full), refused (it could not be stored)",
            ["customization", "outcome"],
            registry=self.registry,
        )
        self.feedback = Counter(
            "evergreen_feedback",
            "Feedback that was stored",
            ["customization", "rating", "right_answer"],
            registry=self.registry,
        )
        self.replicas = Gauge(
            "evergreen_vllm_replicas",
            "vLLM servers that answer for a customization: loaded and verified",
            ["customization"],
            registry=self.registry,
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)
