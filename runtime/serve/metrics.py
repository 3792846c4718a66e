"""Prometheus metrics. Knows nothing about requests.

The scheduler's own counts are read when Prometheus scrapes.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.scheduling.request import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Histograms and counters of one server, in a registry of its own. Times are in seconds."""

    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_SchedulerCollector(stats))
        self.ttft = self._histogram(
            "time_to_first_token", "From a request's arrival to its first token", LONG
        )
        self.inter_token = self._histogram("inter_token", "Between two tokens of a choice", SHORT)
        self.queue = self._histogram("queue", "From a request's arrival until it gets a row", LONG)
        self.duration = self._histogram("request", "From a request's arrival to its end", LONG)
        self.requests = Counter(
            "mistralc_requests", "Requests by path and HTTP status; 499: the client left",
            ("path", "status"), registry=self._registry,
        )  # fmt: skip

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"mistralc_{name}_seconds", description, buckets=buckets, registry=self._registry
        )


class _SchedulerCollector(Collector):
    """Reads the scheduler's stats on each scrape; has no metrics while the bundle loads."""

    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        yield _gauge("rows", "Rows of the ring", stats.rows)
        yield _gauge("running_rows", "Rows in use", stats.running)
        yield _gauge("waiting_requests", "Requests waiting for a row", stats.waiting)
        yield _gauge("ring_capacity_tokens", "Tokens that one row can hold", stats.capacity)
        held = [min(position, stats.capacity) for position in stats.positions]
        yield _gauge(
            "ring_occupancy_ratio", "Filled share of all rows",
            sum(held) / max(1, stats.capacity * len(held)),
        )  # fmt: skip
        rows = GaugeMetricFamily(
            "mistralc_row_tokens", "Tokens that a row of the ring holds", labels=["row"]
        )
        for row, count in enumerate(held):
            rows.add_metric([str(row)], count)
        yield rows
        yield _counter("prompt_tokens", "Prompt tokens", stats.prompt_tokens)
        yield _counter("cached_tokens", "Prompt tokens not computed again", stats.cached_tokens)
        yield _counter("generated_tokens", "Tokens sampled", stats.generated_tokens)
        yield _counter("steps", "Steps of the model", stats.steps)


def _gauge(name: str, description: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"mistralc_{name}", description, value=value)


def _counter(name: str, description: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"mistralc_{name}", description, value=value)
