"""`concord-node up`: the node at work, until it is told to stop."""

import contextlib
import signal
from typing import Annotated

import typer

from concord_client.commands.common import Home, at_home

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command("up", epilog="**Example**\n\n`concord-node up --metrics-port 9100`")(up)


def up(
    metrics_port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65535,
            envvar="CONCORD_NODE_METRICS_PORT",
            help="Serve Prometheus' /metrics on this port of 127.0.0.1; 0: not at all.",
        ),
    ] = 0,
    log_level: Annotated[
        str, typer.Option(envvar="CONCORD_NODE_LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
    home: Home = None,
) -> None:
    """Run this node: fetch what is asked, train what was approved, answer. Connections go out only.

    Logs JSON lines to standard error and to logs/node.log in the home. SIGTERM or Ctrl-C ends it within seconds.
    """
    from concord_client.daemon import Daemon, choose_responder
    from concord_client.daemon_lock import claim_home
    from concord_client.exposition import Counts, serve_metrics
    from concord_client.logs import start_logging
    from concord_shared.errors import UsageError

    if log_level not in ("debug", "info", "warning", "error"):
        raise UsageError(f"--log-level {log_level}: expected debug, info, warning or error")
    with at_home(home) as (opened, store), claim_home(opened), contextlib.ExitStack() as ending:
        start_logging(opened.logs, log_level)
        counts = Counts()
        if metrics_port:
            ending.callback(serve_metrics(metrics_port, counts.registry))
        daemon = Daemon(opened, store, choose_responder(), counts)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: daemon.stop())
        daemon.run()
