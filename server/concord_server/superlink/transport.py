"""The Transport of a run between machines: offers go to the SuperLink, replies come from there.

What can be lost is asked again: a node that was restarted has forgotten what it was sent, a SuperLink that was
restarted has forgotten everything. So every offer is kept here until its reply has been taken, and is sent again when
its node begins to listen anew. A node may so answer twice; the driver counts it once. A node that is away is silent,
not failed: quorum, grace and deadline decide how long it is waited for.
"""

import contextlib
import logging
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from flwr.app import Message, Metadata
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest, SendTaskHeartbeatRequest
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient

from concord_server.runs.states import Waiting
from concord_shared.errors import DocumentRefusedError, UnreachableError
from concord_shared.flower_objects import ids_of, pull_all, put_together, take_apart
from concord_shared.messages import COORDINATOR, decline, with_metadata
from concord_shared.signed_rounds import attach_sent, sign_offer, verify_reply
from concord_shared.signing import PrivateKey, PublicKey
from concord_shared.transport import NodeEntry

__all__ = ["FlowerTransport", "Party"]

log = logging.getLogger(__name__)

WAIT_S = 1.0
"""How long a request for replies waits at the SuperLink; between two of them a stop is noticed."""
PATIENCE_S = 5.0
"""After which those who watch a run are told for whom it waits."""
HEARTBEAT_S = 15.0
RETRY_S = 0.5
UPLOAD_S = 5.0
"""How long the parts of a reply may be missing after it was said to be complete."""
GONE = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)


@dataclass(frozen=True)
class Party:
    """A node of the run: its entry, and the identity key that signs its replies."""

    entry: NodeEntry
    identity_key: PublicKey


@dataclass
class _Asked:
    """An offer whose reply has not been taken. since: Unix time. flower_id: of the SuperLink's copy, if it has one."""

    message: Message
    since: float
    flower_id: str = ""
    activations: int = 0


@dataclass
class _Room:
    """A run of Flower's to speak in, and what is known of the nodes there."""

    instance: str
    run_id: int
    task_id: int
    client: RuntimeHttpClient
    line: "_Line"
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    seen_at_s: float = 0.0
    beaten_at_s: float = 0.0


class _Line:
    """The last of Flower's interceptors: sends what Flower made over a client of our own, which asks no proxy.

    Tells the SuperLink how long a request for replies may wait, and why it refused.
    """

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self.wait_s = 0.0

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        if context.rpc_method.endswith("/PullMessages"):
            context.request.headers["concord-wait"] = f"{self.wait_s:.3f}"
        response = self._client.send(context.request)
        if response.is_error:
            raise UnreachableError(f"the SuperLink answered {response.status_code}: {response.text[:200]}")
        return response


class FlowerTransport:
    """Implements `Transport` over a SuperLink at `address` (host:port).

    tls: with the worker's certificate; signer: the coordinator's key for offers.
    reply_bytes_max: the most that one reply of this run may have.
    check: called at least every second while waiting; what it raises (a stop, a lost lease) ends the run.
    refused: called with the node's name and the reason where a reply is not what its node signed.
    spent_s: where this side's time went: sending offers, waiting for replies, fetching and verifying them.
    """

    def __init__(
        self,
        address: str,
        tls: ssl.SSLContext,
        signer: PrivateKey,
        parties: Iterable[Party],
        reply_bytes_max: int,
        check: Callable[[], None] = lambda: None,
        refused: Callable[[str, str], None] = lambda node, reason: None,
    ) -> None:
        self._address, self._tls, self._signer = address, tls, signer
        self._parties = {party.entry.name: party for party in parties}
        self._by_id = {party.entry.node_id: party for party in self._parties.values()}
        self._reply_bytes_max, self._check, self._refused = reply_bytes_max, check, refused
        self._http = httpx.Client(base_url=f"https://{address}", verify=tls, timeout=30.0, trust_env=False)
        self._room: _Room | None = None
        self._left: tuple[str, dict[str, int]] | None = None
        self._asked: dict[str, _Asked] = {}
        self._arriving: dict[str, tuple[str, ObjectTree]] = {}
        self._last_failure = ""
        self.spent_s = {"offers": 0.0, "waiting": 0.0, "replies": 0.0}

    def awaited(self) -> list[Waiting]:
        """For whom the run has waited for some time; from any thread."""
        away, room = self.away, self._room
        late = [(name, asked) for name, asked in list(self._asked.items()) if time.time() - asked.since > PATIENCE_S]
        if room is None and late:
            return [Waiting("", "the coordinator's SuperLink", int(min(asked.since for _, asked in late)))]
        return [Waiting(name, "away" if name in away else "answer", int(asked.since)) for name, asked in late]

    @property
    def away(self) -> frozenset[str]:
        """Nodes that were asked and do not listen at the moment."""
        room = self._room
        nodes = {} if room is None else room.nodes
        return frozenset(name for name in list(self._asked) if not nodes.get(name, {}).get("online"))

    def send(self, messages: Iterable[Message]) -> None:
        for message in messages:
            sign_offer(message, self._signer)
            self._asked[self._by_id[message.metadata.dst_node_id].entry.name] = _Asked(message, time.time())
        self._try(self._deliver)

    def receive(self, timeout_s: float) -> list[Message]:
        deadline = time.monotonic() + timeout_s
        while True:
            self._check()
            left = max(0.0, deadline - time.monotonic())
            replies = self._try(lambda left=left: self._collect(min(WAIT_S, left)))  # type: ignore[misc]
            if replies:
                return list(replies)
            if time.monotonic() >= deadline:
                return []

    def withdraw(self) -> None:
        """What a node holds already cannot be taken back; its reply will not be waited for."""
        self._asked.clear()
        self._arriving.clear()

    def close(self) -> None:
        self.withdraw()
        if self._room is not None:
            self._try(self._leave)
        self._http.close()

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.spent_s[what] += time.monotonic() - started_s

    # Talking to the SuperLink

    def _try(self, action: Callable[[], Any]) -> Any:
        """Does it in the room, a new one where need be. A SuperLink that is away is tried again by the next call."""
        try:
            return action()
        except (httpx.HTTPError, UnreachableError, OSError, ValueError) as error:
            failure = f"{type(error).__name__}: {error}"
            if failure != self._last_failure:
                log.warning("the SuperLink does not answer; trying again", extra={"failure": failure[:300]})
            self._last_failure = failure
            self._forget_room()
            time.sleep(RETRY_S)
            return None

    def _forget_room(self) -> None:
        if self._room is not None:
            self._room.client.close()
            self._left = self._room.instance, {"run_id": self._room.run_id, "task_id": self._room.task_id}
            self._room = None
        self._arriving.clear()
        for asked in self._asked.values():
            asked.flower_id = ""

    def _enter(self) -> _Room:
        if self._room is None:
            opened = self._post("/rooms/open", {"reply_bytes_max": self._reply_bytes_max})
            self._close_left(opened["instance"])
            line = _Line(self._http)
            client = RuntimeHttpClient(
                f"https://{self._address}",
                interceptors=[
                    RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
                    RuntimeTokenHttpInterceptor(token=opened["token"]),
                    line,
                ],
                verify=self._tls,
            )
            self._room = _Room(opened["instance"], opened["run_id"], opened["task_id"], client, line)
            self._last_failure = ""
        room, now = self._room, time.monotonic()
        if now - room.beaten_at_s > HEARTBEAT_S:
            if not room.client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                raise UnreachableError("the SuperLink has closed this run")
            room.beaten_at_s = now
        return room

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._http.post(path, json=body)
        answer.raise_for_status()
        return dict(answer.json())

    def _close_left(self, instance: str) -> None:
        """A node may wait in the room before this one for the rest of an offer that broke off."""
        left, self._left = self._left, None
        if left is not None and left[0] == instance:
            with contextlib.suppress(httpx.HTTPError):
                self._post("/rooms/close", left[1])

    def _leave(self) -> None:
        assert self._room is not None
        self._room.client.close()
        self._post("/rooms/close", {"run_id": self._room.run_id, "task_id": self._room.task_id})
        self._room = None

    # Offers

    def _look(self, room: _Room, age_max_s: float) -> None:
        """Which nodes are there, and how often each has begun to listen."""
        if time.monotonic() - room.seen_at_s < age_max_s:
            return
        answer = self._post("/rooms/nodes", {})
        if answer["instance"] != room.instance:
            raise UnreachableError("the SuperLink was restarted")
        room.nodes, room.seen_at_s = answer["nodes"], time.monotonic()

    def _deliver(self) -> None:
        """Sends what its node has not got: offers that are new, or whose node has begun to listen anew since."""
        room = self._enter()
        self._look(room, 0.0 if any(not asked.flower_id for asked in self._asked.values()) else WAIT_S / 2)
        due = {}
        for name, asked in self._asked.items():
            node = room.nodes.get(name)
            if node is None or not node["online"] or name in self._arriving:
                continue
            if not asked.flower_id or asked.activations != node["activations"]:
                due[name] = self._addressed(asked.message, room, node["node_id"])
                asked.activations = node["activations"]
        if not due:
            return
        with self._timed("offers"):
            ids = self._push(room, list(due.values()))
        for name, flower_id in zip(due, ids, strict=True):
            self._asked[name].flower_id = flower_id
        self._post("/rooms/wake", {"nodes": list(due)})

    def _addressed(self, message: Message, room: _Room, node_id: int) -> Message:
        given = message.metadata
        metadata = Metadata(
            run_id=room.run_id,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=node_id,
            reply_to_message_id="",
            group_id=given.group_id,
            created_at=time.time(),
            ttl=given.ttl,
            message_type=given.message_type,
        )
        return with_metadata(message.content, metadata)

    def _push(self, room: _Room, messages: list[Message]) -> list[str]:
        trees, contents = take_apart(messages)
        answer = room.client.PushMessages(
            PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(message)) for message in messages],
                message_object_trees=trees,
            )
        )
        wanted = set(answer.objects_to_push)
        node = Node(node_id=SUPERLINK_NODE_ID)
        for object_id, content in contents(wanted):
            stored = room.client.PushObject(
                PushObjectRequest(
                    node=node,
                    run_id=room.run_id,
                    object_id=object_id,
                    object_content=content,
                    session_id=answer.session_id,
                )
            )
            if not stored.stored:
                raise UnreachableError("the SuperLink did not keep an offer")
        return list(answer.message_ids)

    # Replies

    def _collect(self, wait_s: float) -> list[Message]:
        """Replies that are complete; waits for the first where none is."""
        self._deliver()
        room = self._enter()
        if ready := self._take_arrived(room):
            return ready
        ids = {asked.flower_id: name for name, asked in self._asked.items() if asked.flower_id}
        for flower_id in [asked for asked, name in ids.items() if name in self._arriving]:
            del ids[flower_id]
        room.line.wait_s = wait_s
        with self._timed("waiting"):
            answer = room.client.PullMessages(PullAppMessagesRequest(message_ids=list(ids)))
        for proto, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            name = ids.get(proto.metadata.reply_to_message_id)
            if name is not None:
                self._arriving[name] = (proto.metadata.reply_to_message_id, tree)
        return self._take_arrived(room)

    def _take_arrived(self, room: _Room) -> list[Message]:
        """At most one reply, the first that is complete: no more than one is held in memory."""
        for name, (flower_id, tree) in list(self._arriving.items()):
            asked = self._asked.get(name)
            if asked is None or asked.flower_id != flower_id:
                del self._arriving[name]  # of an offer that was withdrawn or sent again
                continue
            if not self._object(room, tree.object_id):
                if room.nodes.get(name, {}).get("activations") != asked.activations:
                    del self._arriving[name]
                    asked.flower_id = ""  # its node died in the middle: ask again
                continue
            del self._arriving[name]
            with self._timed("replies"):
                message = self._read(room, name, asked, tree)
            if message is not None:
                del self._asked[name]
                return [message]
        return []

    def _read(self, room: _Room, name: str, asked: _Asked, tree: ObjectTree) -> Message | None:
        """The reply as the driver knows it; an error where it is not what its node signed; None to ask again."""
        party = self._parties[name]
        try:
            deadline = time.monotonic() + UPLOAD_S
            contents = pull_all(ids_of(tree), lambda each: self._part(room, each, deadline), self._reply_bytes_max)
            reply = put_together(tree.object_id, contents, self._reply_bytes_max)
            if reply.has_error() and reply.error.code in GONE:
                asked.flower_id = ""
                asked.activations = room.nodes[name]["activations"]
                return None
            if (sent := verify_reply(reply, party.identity_key)) is not None:
                attach_sent(reply, sent)
        except DocumentRefusedError as error:
            self._refused(name, str(error))
            return self._as_answer(decline(asked.message, str(error)), asked, party)
        finally:
            room.client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=Node(node_id=SUPERLINK_NODE_ID), run_id=room.run_id, message_object_id=tree.object_id
                )
            )
        return self._as_answer(reply, asked, party)

    def _as_answer(self, reply: Message, asked: _Asked, party: Party) -> Message:
        """With the names that the driver uses, whatever the SuperLink called them."""
        metadata = Metadata(
            run_id=0,
            message_id=f"reply to {asked.message.metadata.message_id}",
            src_node_id=party.entry.node_id,
            dst_node_id=COORDINATOR,
            reply_to_message_id=asked.message.metadata.message_id,
            group_id=asked.message.metadata.group_id,
            created_at=time.time(),
            ttl=1.0,
            message_type=asked.message.metadata.message_type,
        )
        if reply.has_error():
            return Message(error=reply.error, metadata=metadata)  # type: ignore[call-overload, no-any-return]
        return with_metadata(reply.content, metadata)

    def _part(self, room: _Room, object_id: str, deadline: float) -> bytes:
        while not (content := self._object(room, object_id)):
            if time.monotonic() > deadline:
                raise DocumentRefusedError("a reply was said to be complete, and parts of it are missing")
            time.sleep(0.02)
        return content

    def _object(self, room: _Room, object_id: str) -> bytes:
        """Empty while it has not arrived."""
        answer = room.client.PullObject(
            PullObjectRequest(node=Node(node_id=SUPERLINK_NODE_ID), run_id=room.run_id, object_id=object_id)
        )
        return bytes(answer.object_content)
