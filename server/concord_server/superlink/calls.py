"""The calls of Flower's Fleet and Runtime APIs that concord uses, each straight to Flower's own handler.

Flower's web application is not started: its control API, its bundles, its documentation pages and its other routes
do not exist here. What is left answers ten times faster than through its stack of middlewares.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
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


DEPTH_MAX = 8
PARTS_MAX, CHUNK_BYTES = 10_000, 5 << 20
"""A reply has so many parts, and one for each so many bytes: its arrays' chunks."""
_replying = threading.Lock()
"""Two replies that are looked at and then stored at the same time could make a third tree together."""


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


def call_fleet(path: str, body: bytes, state: LinkState, reply_bytes_max: Mapping[int, int]) -> bytes:
    """reply_bytes_max: of each room, by its run of Flower's. Raises: CallRefusedError."""
    call = FLEET[path]
    request, more = _parse(call, body), (state.object_store,) if call.with_store else ()
    if not isinstance(request, PushMessagesRequest):
        return _answer(call, request, state, *more)
    with _replying:
        _check_reply(request, state, reply_bytes_max)
        answer = _answer(call, request, state)
    if not PushMessagesResponse.FromString(answer).objects_to_push:
        raise CallRefusedError(410, "nobody waits for this reply (any more)")
    return answer


def _check_reply(request: PushMessagesRequest, state: Any, reply_bytes_max: Mapping[int, int]) -> None:
    """One reply to an offer that waits for one, and a tree that is what it seems to be when Flower puts it together.

    Flower keeps the children of each id that it sees first, and finds trees by them: an id has the same ones wherever
    it stands, here and in the store. So an id may stand there twice, as equal parts of replies do.

    Raises:
        CallRefusedError: 410: nobody waits for it (any more); 503: its parts are others elsewhere.
    """
    metadata = request.messages_list[0].metadata
    offer = state.message_ins_store.get(metadata.reply_to_message_id)
    bytes_max = reply_bytes_max.get(metadata.run_id)
    if (
        bytes_max is None
        or offer is None
        or (offer.metadata.run_id, offer.metadata.dst_node_id) != (metadata.run_id, metadata.src_node_id)
        or metadata.reply_to_message_id in state.message_ins_id_to_message_res_id
        or metadata.message_id in state.object_store
    ):
        raise CallRefusedError(410, "nobody waits for this reply (any more)")
    if [tree.object_id for tree in request.message_object_trees] != [metadata.message_id]:
        raise CallRefusedError(403, "a reply has one tree, of its own id")
    for object_id, children in _children(request.message_object_trees[0], PARTS_MAX + bytes_max // CHUNK_BYTES).items():
        known = state.object_store.store.get(object_id)
        if known is not None and known.child_object_ids != children:
            raise CallRefusedError(503, "a part of this reply has other parts in another message; try again")


def _children(tree: ObjectTree, parts_max: int) -> dict[str, list[str]]:
    """The children of each id. Raises: CallRefusedError: deeper or larger than a reply, or an id has two lists."""
    found: dict[str, list[str]] = {}
    level, parts, depth = [tree], 0, 0
    while level:
        parts, depth = parts + len(level), depth + 1
        if parts > parts_max or depth > DEPTH_MAX + 1:
            raise CallRefusedError(403, f"a reply has at most {parts_max} parts, {DEPTH_MAX} deep")
        for node in level:
            children = [child.object_id for child in node.children]
            if found.setdefault(node.object_id, children) != children:
                raise CallRefusedError(403, "one part of a reply, with different parts of its own")
        level = [child for node in level for child in node.children]
    return found


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
