"""The node's end of Flower's fleet: offers come in, replies go out, over one outbound TLS connection.

Nothing of a bundle is fetched, unpacked or run; Flower's own node would. Private modules of Flower: see
`concord_shared.flower_objects`.
"""

import logging
import ssl
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from concord_shared.errors import DocumentRefusedError, NotAllowedError, UnreachableError
from concord_shared.flower_objects import ids_of, pull_all, put_together, take_apart
from concord_shared.plan.schema import Plan
from concord_shared.plan.sizes import parameters
from concord_shared.strategies import strategy_for

__all__ = ["MESSAGE_BYTES_MIN", "FleetConnection", "message_bytes", "new_client"]

log = logging.getLogger(__name__)

MESSAGE_BYTES_MIN, MESSAGE_BYTES_MAX = 64 << 20, 16 << 30
"""Enough for all of a message but its model; more than any model that a node could hold."""
ANSWER_BYTES_MAX = 64 << 20
"""Of one call: a part of a message has 5 MiB."""
TIMEOUT_S = 60.0
HEARTBEAT_S = HEARTBEAT_DEFAULT_INTERVAL / 2
WAIT_HEADER = "concord-wait"
LAST_HEADER = "concord-last"


def new_client(tls: ssl.SSLContext, proxy: str, timeout_s: float = TIMEOUT_S) -> httpx.Client:
    """How rounds reach the coordinator. proxy: a URL, or empty for what HTTPS_PROXY and NO_PROXY say.

    Raises:
        UnreachableError: no such kind of proxy.
    """
    try:
        return httpx.Client(verify=tls, proxy=proxy or None, trust_env=not proxy, timeout=timeout_s)
    except (ValueError, ImportError) as error:  # the second where it speaks SOCKS
        where = "of node.toml" if proxy else "of HTTPS_PROXY"
        raise UnreachableError(f"the proxy {where} cannot be used: {error}") from error


def message_bytes(plan: Plan) -> int:
    """The most that one message of this plan's rounds has: model, state for the node, and all the rest.

    Raises:
        PlanError: the model is a person's own code.
    """
    state = 4 * len(strategy_for(plan).broadcast)
    return min(MESSAGE_BYTES_MAX, MESSAGE_BYTES_MIN + (4 + state) * parameters(plan))


class _Line:
    """The last of Flower's interceptors: sends what Flower made over a client of our own, and calls no further one.

    So a proxy holds, no redirect is followed, and an answer has a limit. Adds what the coordinator's door understands:
    how long it may wait, and that a reply is complete.
    """

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self.wait_s = 0.0
        self.last = threading.local()

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        request = context.request
        request.headers["accept-encoding"] = "identity"
        if context.rpc_method.endswith("/PullMessages"):
            request.headers[WAIT_HEADER] = f"{self.wait_s:.3f}"
        if getattr(self.last, "yes", False):
            request.headers[LAST_HEADER] = "1"
        response = self._client.send(request, stream=True)
        try:
            return httpx.Response(response.status_code, content=_body(response), request=request)
        finally:
            response.close()

    def close(self) -> None:
        self._client.close()


def _body(response: httpx.Response) -> bytes:
    """As it came: never unpacked, and not larger than an answer may be."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise DocumentRefusedError("the coordinator packed its answer; a node takes plain bytes only")
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > ANSWER_BYTES_MAX:
            raise DocumentRefusedError(f"an answer is larger than {ANSWER_BYTES_MAX} bytes; nothing of it was used")
    return bytes(body)


class FleetConnection:
    """One connection, from activation to deactivation; `with` closes it. After an `UnreachableError` make a new one.

    address: host:port; tls: with the node's certificate; flower_key: the P-384 key of the roster row. proxy: see
    `new_client`. bytes_max: asked for each message, the most that it may have; read before its signature can be.
    """

    def __init__(
        self,
        address: str,
        tls: ssl.SSLContext,
        flower_key: EllipticCurvePrivateKey,
        proxy: str = "",
        bytes_max: Callable[[], int] = lambda: MESSAGE_BYTES_MAX,
    ) -> None:
        """Raises: UnreachableError: the proxy cannot be used."""
        public = flower_key.public_key()
        self._bytes_max = bytes_max
        self._line = _Line(new_client(tls, proxy))
        self._client = FleetHttpClient(
            f"https://{address}",
            interceptors=[NodeAuthHttpInterceptor(flower_key, public), self._line],
            verify=tls,
            timeout=TIMEOUT_S,
        )
        self._key = public_key_to_bytes(public)
        self._node: Node | None = None
        self._stop = threading.Event()
        self._lost = False
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        """Raises: UnreachableError; NotAllowedError: the coordinator does not admit this node (now)."""
        try:
            answer = self._call(
                self._client.ActivateNode,
                ActivateNodeRequest(public_key=self._key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL),
            )
        except BaseException:
            self._close()
            raise
        self._node = Node(node_id=answer.node_id)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._node is not None:
            try:
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
            except (httpx.HTTPError, DocumentRefusedError, RuntimeError, ValueError):
                log.info("the coordinator was not told that this node stops listening")
        self._close()

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, waiting for one without polling; None when there is none.

        Raises:
            UnreachableError: the link is lost, or the coordinator was restarted and does not know this connection.
            NotAllowedError: this node is not admitted any more.
            DocumentRefusedError: a message that cannot be read, or is larger than it may be; it is dropped.
        """
        if self._lost:
            raise UnreachableError("the coordinator does not know this connection any more")
        self._line.wait_s = timeout_s
        answer = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            return None
        run_id, tree = answer.messages_list[0].metadata.run_id, answer.message_object_trees[0]
        bytes_max = self._bytes_max()
        contents = pull_all(ids_of(tree), lambda object_id: self._pull(run_id, object_id), bytes_max)
        self._call(
            self._client.ConfirmMessageReceived,
            ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=tree.object_id),
        )
        message = put_together(tree.object_id, contents, bytes_max)
        if message.metadata.run_id != run_id:
            raise DocumentRefusedError("a message names another run than its envelope")
        return message

    def reply(self, message: Message) -> None:
        """Sends an answer. Where its run has ended meanwhile, nobody wants it, and nothing is raised.

        Raises:
            UnreachableError, NotAllowedError: as in `receive`.
        """
        [tree], contents = take_apart([message])
        run_id = message.metadata.run_id
        bare = remove_content_from_message(message) if message.has_content() else message
        answer = self._call(
            self._client.PushMessages,
            PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(bare)],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            ),
            gone=True,
        )
        if answer is None:
            log.info("a reply came too late: its run is over")
            return
        wanted = set(answer.objects_to_push)
        for object_id, content in contents(wanted):  # children first: the message itself says that all is there
            self._line.last.yes = object_id == tree.object_id
            try:
                stored = self._call(
                    self._client.PushObject,
                    PushObjectRequest(
                        node=self._node,
                        run_id=run_id,
                        object_id=object_id,
                        object_content=content,
                        session_id=answer.session_id,
                    ),
                    gone=True,
                )
            finally:
                self._line.last.yes = False
            if stored is None or not stored.stored:
                log.info("a reply was not wanted any more")
                return

    def _pull(self, run_id: int, object_id: str) -> bytes:
        deadline = time.monotonic() + TIMEOUT_S
        pause = 0.02
        while True:
            answer = self._call(
                self._client.PullObject, PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
            )
            if answer.object_available:
                return bytes(answer.object_content)
            if not answer.object_found or time.monotonic() > deadline:
                raise DocumentRefusedError("a part of a message is missing")
            time.sleep(pause)
            pause = min(1.0, 2 * pause)

    def _call(self, method: Any, request: Any, gone: bool = False) -> Any:
        """gone: an answer of 4xx about the run means that it is over: None."""
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise NotAllowedError(f"the coordinator does not admit this node: {_detail(error.response)}") from error
            if gone and 400 <= status < 500:
                return None
            raise UnreachableError(f"the coordinator answered {status}: {_detail(error.response)}") from error
        except (httpx.HTTPError, ssl.SSLError, OSError, ValueError) as error:
            raise UnreachableError(f"the coordinator cannot be reached: {type(error).__name__}: {error}") from error

    def _close(self) -> None:
        self._client.close()
        self._line.close()

    def _beat(self) -> None:
        """Tells the coordinator that this node is there, also while it trains."""
        while not self._stop.wait(HEARTBEAT_S):
            try:
                answer = self._client.SendNodeHeartbeat(
                    SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
                )
                self._lost = self._lost or not answer.success
            except httpx.HTTPStatusError:
                self._lost = True
            except (httpx.HTTPError, DocumentRefusedError, OSError, ValueError, RuntimeError):
                continue  # the next one may get through; `receive` notices a lost link first


def _detail(response: httpx.Response) -> str:
    return response.text[:200]
