"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The server's own counters; each server has a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pit_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "pit_request_seconds", "From a request's arrival to its end.", ("route",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.active = Gauge("pit_requests_active", "Requests being answered.", registry=self.registry)
        self.gone = Counter("pit_clients_gone", "Requests whose client left before the answer.", registry=self.registry)
        self.tokens = Counter(
            "pit_sampled_tokens", "Tokens sampled, by kind of prompt.", ("kind",), registry=self.registry
        )
        self.rows = Histogram(
            "pit_batch_rows", "Rows of a batch that are no filler.", ("kind",), buckets=ROWS, registry=self.registry
        )
        self.waiting = Gauge("pit_rows_waiting", "Rows and scores that wait for a batch.", registry=self.registry)
        self.running = Gauge("pit_batches_running", "Batches that are sampled in turns.", registry=self.registry)
        self.changed = Counter(
            "pit_answers", "Answers, by whether improvement changed them.", ("changed",), registry=self.registry
        )

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self.registry)
