"""The node as a Flower ClientApp: the same object answers in a simulation and on a partner's machine."""

import logging

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from concord_client.node import Node
from concord_shared.errors import ConcordError
from concord_shared.messages import decline

__all__ = ["build_client_app"]

log = logging.getLogger(__name__)


def build_client_app(node: Node) -> ClientApp:
    """Registers the node's one answer for the three kinds of messages."""
    app = ClientApp()

    def respond(message: Message, context: Context) -> Message:
        try:
            return node.respond(message)
        except ConcordError as error:
            return decline(message, f"{type(error).__name__}: {error}")
        except Exception as error:  # the outermost loop of a node: one bad round must not end it
            log.exception("a round failed", extra={"node": node.dataset.name})
            return decline(message, f"unexpected {type(error).__name__}; the node's own log has the details")

    app.train()(respond)
    app.evaluate()(respond)
    app.query("statistics")(respond)
    return app
