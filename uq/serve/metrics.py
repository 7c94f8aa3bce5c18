"""Counters and gauges of a server, in the text format that Prometheus reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
WIDTHS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """One registry for each server, so that two of them in one process do not mix."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "uq_requests", "HTTP requests answered.", ("path", "status"), registry=registry
        )
        self.seconds = Histogram(
            "uq_request_seconds", "From request to end of answer.", ("path",),
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "uq_first_token_seconds", "From arrival to first token.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.waiting = Gauge("uq_waiting", "Sequences without a slot.", registry=registry)
        self.running = Gauge("uq_running", "Sequences in a slot.", registry=registry)
        self.prompt = Counter("uq_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.cached = Counter(
            "uq_prompt_tokens_cached", "Of these, found in a KV cache.", registry=registry
        )
        self.generated = Counter(
            "uq_generated_tokens", "Tokens generated, added up at their end.", registry=registry
        )
        self.width = Histogram(
            "uq_step_sequences", "Sequences in a step of the model.",
            buckets=WIDTHS, registry=registry,
        )  # fmt: skip

    def text(self) -> bytes:
        return generate_latest(self._registry)
