"""The calls of Flower's Fleet and Runtime APIs that concord uses, each straight to Flower's own handler.

Flower's web application is not started: its control API, its bundles, its documentation pages and its other routes
do not exist here. What is left answers ten times faster than through its stack of middlewares.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest, SendTaskHeartbeatRequest
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.error import FlowerError
from flwr.supercore.servicer.runtime import runtime_handlers as core
from flwr.superlink.servicer.fleet import fleet_handlers as fleet
from flwr.superlink.servicer.runtime import runtime_handlers as runtime
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from concord_server.superlink.spool import SpoolFullError

__all__ = ["FLEET", "RUNTIME", "Call", "CallRefusedError", "call_fleet", "call_runtime", "node_of"]


@dataclass(frozen=True)
class Call:
    request: Any
    handler: Callable[..., Any]
    with_store: bool = False


FLEET: Mapping[str, Call] = {
    "/v1/fleet/activate-node": Call(ActivateNodeRequest, fleet.activate_node),
    "/v1/fleet/deactivate-node": Call(DeactivateNodeRequest, fleet.deactivate_node),
    "/v1/fleet/send-node-heartbeat": Call(SendNodeHeartbeatRequest, fleet.send_node_heartbeat),
    "/v1/fleet/pull-messages": Call(PullMessagesRequest, fleet.pull_messages, with_store=True),
    "/v1/fleet/push-messages": Call(PushMessagesRequest, fleet.push_messages),
    "/v1/fleet/push-object": Call(PushObjectRequest, fleet.push_object),
    "/v1/fleet/pull-object": Call(PullObjectRequest, fleet.pull_object),
    "/v1/fleet/confirm-message-received": Call(
        ConfirmMessageReceivedRequest, fleet.confirm_message_received, with_store=True
    ),
}
RUNTIME: Mapping[str, Call] = {
    "/v1/runtime/push-messages": Call(PushAppMessagesRequest, runtime.push_messages),
    "/v1/runtime/pull-messages": Call(PullAppMessagesRequest, runtime.pull_messages),
    "/v1/runtime/push-object": Call(PushObjectRequest, runtime.push_object),
    "/v1/runtime/pull-object": Call(PullObjectRequest, runtime.pull_object),
    "/v1/runtime/confirm-message-received": Call(ConfirmMessageReceivedRequest, runtime.confirm_message_received),
    "/v1/runtime/send-task-heartbeat": Call(SendTaskHeartbeatRequest, core.send_task_heartbeat),
}


class CallRefusedError(Exception):
    """Flower's answer is no. status: of HTTP."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def node_of(path: str, body: bytes) -> tuple[int | None, bytes | None]:
    """In whose name a node speaks: (Flower's node id, None), or (None, its public key) where it has no id yet.

    A reply is in the name that the reply itself carries *and* in that of the request around it.

    Raises:
        CallRefusedError: not a request of this call, or two names.
    """
    request = _parse(FLEET[path], body)
    if isinstance(request, ActivateNodeRequest):
        return None, request.public_key
    if isinstance(request, DeactivateNodeRequest):
        return request.node_id, None
    node_id: int = request.node.node_id
    if isinstance(request, PushMessagesRequest) and [m.metadata.src_node_id for m in request.messages_list] != [
        node_id
    ]:
        raise CallRefusedError(403, "a reply in another node's name")
    return node_id, None


def call_fleet(path: str, body: bytes, state: LinkState) -> bytes:
    """Raises: CallRefusedError."""
    call = FLEET[path]
    more = (state.object_store,) if call.with_store else ()
    return _answer(call, _parse(call, body), state, *more)


def call_runtime(path: str, body: bytes, token: str, state: LinkState) -> bytes:
    """Raises: CallRefusedError: also where the token opens no run (any more)."""
    task: Task | None = state.get_task_by_token(token) if token else None
    if task is None:
        raise CallRefusedError(401, "this token opens no run")
    call = RUNTIME[path]
    return _answer(call, _parse(call, body), state, task)


def _parse(call: Call, body: bytes) -> Any:
    try:
        return call.request.FromString(body)
    except DecodeError as error:
        raise CallRefusedError(400, f"not a {call.request.__name__}") from error


def _answer(call: Call, request: Any, *arguments: Any) -> bytes:
    try:
        return bytes(call.handler(request, *arguments).SerializeToString())
    except FlowerError as error:
        raise CallRefusedError(412, f"[{error.code}] {error.message[:200]}") from error
    except SpoolFullError as error:
        raise CallRefusedError(507, str(error)) from error
    except (ValueError, KeyError) as error:
        raise CallRefusedError(400, f"{type(error).__name__}: {str(error)[:200]}") from error
