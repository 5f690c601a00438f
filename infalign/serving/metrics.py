"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds: upper ends of the latency histogram."""


class Metrics:
    """What a server has done since it started. Any thread may change it; two servers of a process share nothing."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"infalign_{name}_total", words, labels, registry=self._registry)

        def gauge(name: str, words: str) -> Gauge:
            return Gauge(f"infalign_{name}", words, registry=self._registry)

        self.requests = counter("requests", "answered HTTP requests, by path and status", "path", "status")
        self.choices = counter("choices", "completions returned")
        self.candidates = counter("candidates", "completions drawn")
        self.tokens = counter(
            "tokens", "tokens, by kind: prompts once a request, completions of all candidates", "kind"
        )
        self.reward_calls = counter("reward_calls", "completions that were scored")
        self.unscored = counter("unscored", "candidates for which the reward gave no score")
        self.batches = counter("batches", "batches decoded")
        self.failures = counter(
            "failures", "batches that failed, by cause: backend, decoding, reward, internal", "cause"
        )
        words = "seconds that completion requests took"
        self.seconds = Histogram("infalign_request_seconds", words, buckets=BUCKETS, registry=self._registry)
        self._gauges = {
            "queue_length": gauge("queue_length", "requests that wait"),
            "in_progress": gauge("in_progress", "requests that are being decoded"),
        }

    def text(self, gauges: Mapping[str, float]) -> str:
        """Everything as Prometheus reads it; `gauges` are `queue_length` and `in_progress` now."""
        for name, value in gauges.items():
            self._gauges[name].set(value)
        lines = generate_latest(self._registry).decode().splitlines(keepends=True)
        return "".join(line for line in lines if "_created" not in line)  # when each series began: of no use here
