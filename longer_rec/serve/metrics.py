"""What the server counts, for Prometheus; a registry of its own, so that several engines fit into one process."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """One instance for an engine and the server before it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.replies = Counter("longer_replies", "replies", ["path", "status"], registry=self.registry)
        self.request_s = self._seconds("request", "score requests from the first byte of the body to the answer")
        self.encode_s = self._seconds("encode", "reading, checking and encoding a score request")
        self.queue_s = self._seconds("queue", "from an encoded request to the first work on it")
        self.prefill_s = self._seconds("prefill", "encoding the users of a batch")
        self.score_s = self._seconds("score", "scoring the candidates of a batch")
        self.prefill_users = self._sizes("prefill_users", "users encoded together")
        self.score_requests = self._sizes("score_requests", "requests scored together")
        self.states = Counter("longer_states", "where users' states came from", ["source"], registry=self.registry)
        self.unknown = Counter("longer_unknown", "values that training did not know", ["kind"], registry=self.registry)
        self.reloads = Counter("longer_reloads", "bundles changed over to", registry=self.registry)

    def gauge(self, name: str, meaning: str) -> Gauge:
        """A value that is asked for when the metrics are read."""
        return Gauge(f"longer_{name}", meaning, registry=self.registry)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _seconds(self, name: str, meaning: str) -> Histogram:
        return Histogram(f"longer_{name}_seconds", meaning, buckets=_SECONDS, registry=self.registry)

    def _sizes(self, name: str, meaning: str) -> Histogram:
        return Histogram(f"longer_{name}", meaning, buckets=_SIZES, registry=self.registry)
