"""What a node counts, for Prometheus: on this machine only, and only where the owner asked for a port."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from concord_shared.errors import UsageError
from concord_shared.files import explain

__all__ = ["Counts", "serve_metrics"]


@dataclass
class Counts:
    """rounds: by kind. refused: by the check that refused. Nothing here says what data or figures a node has."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"concord_node_{name}", what, labels, registry=self.registry)

        self.rounds = counter("rounds_answered", "Messages of rounds answered", "kind")
        self.repeated = counter("replies_repeated", "Answers sent again as they were")
        self.refused = counter("rounds_refused", "Messages of rounds declined", "reason")
        self.bytes_out = counter("bytes_out", "Bytes that left in answers")
        self.training = counter("training_seconds", "Time spent on answers")
        self.lost = counter("connections_lost", "Connections lost", "channel")
        self.forks = counter("logs_forked", "Times that a log was not the one of before")
        self.contact = Gauge(
            "concord_node_last_contact_seconds", "Unix time of the last contact", ["channel"], registry=self.registry
        )


def serve_metrics(port: int, registry: CollectorRegistry) -> Callable[[], None]:
    """Serves /metrics on 127.0.0.1; returns what ends it.

    Raises:
        UsageError: the port is taken.
    """
    try:
        server, thread = start_http_server(port, "127.0.0.1", registry)
    except OSError as error:
        raise UsageError(f"cannot serve metrics on 127.0.0.1:{port}: {explain(error)}; choose another port") from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        with contextlib.suppress(RuntimeError):
            thread.join(1)

    return close
