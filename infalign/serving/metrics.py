"""Counters of a server in Prometheus' text format, safe to change from several threads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds: upper ends of the latency histogram."""

COUNTERS = {
    "requests_total": "answered HTTP requests, by path and status",
    "choices_total": "completions returned",
    "candidates_total": "completions drawn",
    "tokens_total": "tokens, by kind: prompts once a request, completions of all candidates",
    "reward_calls_total": "completions that were scored",
    "unscored_total": "candidates for which the reward gave no score",
    "batches_total": "batches decoded",
    "failures_total": "batches that failed, by cause: backend, decoding, reward, internal",
}
GAUGES = {
    "queue_length": "requests that wait",
    "in_progress": "requests that are being decoded",
}
_HISTOGRAM = "request_seconds"

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """What a server has done since it started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, Labels]] = Counter()
        self._buckets = [0] * (len(BUCKETS) + 1)
        self._seconds = 0.0

    def add(self, name: str, amount: int = 1, **labels: str) -> None:
        """Raise a counter of `COUNTERS`."""
        assert name in COUNTERS
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += amount

    def observe(self, seconds: float) -> None:
        """One completion request took so long, from its first byte to its answer."""
        place = next((i for i, end in enumerate(BUCKETS) if seconds <= end), len(BUCKETS))
        with self._lock:
            self._buckets[place] += 1
            self._seconds += seconds

    def text(self, gauges: Mapping[str, float]) -> str:
        """Everything as Prometheus reads it; `gauges` are the values of `GAUGES` now."""
        with self._lock:
            counts, buckets, seconds = Counter(self._counts), list(self._buckets), self._seconds
        lines: list[str] = []
        for name, words in COUNTERS.items():
            lines += _head(name, words, "counter")
            rows = sorted((labels, value) for (own, labels), value in counts.items() if own == name)
            lines += [f"infalign_{name}{_shown(labels)} {value:g}" for labels, value in rows or [((), 0)]]
        for name, words in GAUGES.items():
            lines += [*_head(name, words, "gauge"), f"infalign_{name} {gauges[name]:g}"]
        lines += _head(_HISTOGRAM, "seconds that completion requests took", "histogram")
        total = 0
        for end, count in zip((*map("{:g}".format, BUCKETS), "+Inf"), buckets, strict=True):
            total += count
            lines.append(f'infalign_{_HISTOGRAM}_bucket{{le="{end}"}} {total}')
        lines += [f"infalign_{_HISTOGRAM}_sum {seconds:.6f}", f"infalign_{_HISTOGRAM}_count {total}"]
        return "\n".join(lines) + "\n"


def _head(name: str, words: str, kind: str) -> list[str]:
    return [f"# HELP infalign_{name} {words}", f"# TYPE infalign_{name} {kind}"]


def _shown(labels: Labels) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels) + "}" if labels else ""
