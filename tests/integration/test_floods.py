"""Callers who send too much, too slowly or nothing at all take nothing from the others."""

import asyncio
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fleets import Fleet, FleetMember, listen, running_fleet
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest
from flwr.supercore.constant import TASK_TOKEN_HEADER
from test_superlink import ask, flower_headers, own_number, post, receive_all

from concord_client.fleet import FleetConnection
from concord_server import rates
from concord_server.api.guard import ENROLMENT_BYTES_MAX, STRANGER_BYTES_MAX
from concord_server.superlink.calls import PARTS_MAX
from concord_server.superlink.firewall import CALL_BYTES_MAX, UPLOADS_AT_A_TIME
from concord_shared.flower_objects import take_apart
from concord_shared.signed_rounds import sign_reply
from coordinators import Coordinator


@pytest.fixture(scope="module")
def shared_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running


@pytest.fixture
def fleet(shared_fleet: Fleet) -> Fleet:
    shared_fleet.forget()
    return shared_fleet


def name_of(number: int) -> str:
    return f"{number:064x}"


def tree_of(number: int, *children: ObjectTree) -> ObjectTree:
    return ObjectTree(object_id=name_of(number), children=children)


def laughs(depth: int) -> ObjectTree:
    """Small as it is sent; as it is found by the first children of each id, twice as large with each level."""
    return tree_of(depth, laughs(depth - 1), tree_of(depth - 1)) if depth else tree_of(0)


def line(depth: int) -> ObjectTree:
    return tree_of(depth, line(depth - 1)) if depth else tree_of(0)


class TestReplies:
    def push(self, fleet: Fleet, member: FleetMember, request: PushMessagesRequest) -> int:
        body = request.SerializeToString()
        return post(fleet, member.tls, "/v1/fleet/push-messages", body, flower_headers(member)).status_code

    def request(self, connection: FleetConnection, message: Message, *trees: ObjectTree) -> PushMessagesRequest:
        """An announcement of this reply, with its own tree or others in its place."""
        [own], _ = take_apart([message])
        bare = message_to_proto(remove_content_from_message(message))
        return PushMessagesRequest(
            node=connection._node, messages_list=[bare], message_object_trees=trees or [own], clientapp_runtime_list=[0]
        )

    def test_a_reply_is_one_tree_of_its_own_and_small(self, fleet: Fleet) -> None:
        member, other = fleet.member("node-1"), fleet.member("node-2")
        transport = fleet.transport([member, other])
        with (
            FleetConnection(fleet.address, member.tls, member.flower) as connection,
            FleetConnection(fleet.address, other.tls, other.flower) as second,
        ):
            ask(transport, ["node-1", "node-2"])
            offers = connection.receive(5), second.receive(5)
            assert offers[0] is not None
            assert offers[1] is not None
            reply, late = own_number(offers[0]), own_number(offers[1])
            sign_reply(reply, member.identity)
            [own], _ = take_apart([reply])
            root = own.object_id

            def below(*children: ObjectTree) -> ObjectTree:
                return ObjectTree(object_id=root, children=children)

            many = [tree_of(number) for number in range(PARTS_MAX + 400)]
            for trees in ([laughs(7)], [below(laughs(6))], [below(line(8))], [below(*many)], [own, own]):
                assert self.push(fleet, member, self.request(connection, reply, *trees)) == 403
            nobodys = self.request(connection, reply)
            nobodys.messages_list[0].metadata.reply_to_message_id = name_of(1)
            assert self.push(fleet, member, nobodys) == 410
            connection.reply(reply)
            for trees in ([own], [below(tree_of(5))]):
                assert self.push(fleet, member, self.request(connection, reply, *trees)) == 410

            part = own.children[0]
            while not part.children:
                part = own.children[list(own.children).index(part) + 1]
            stolen = ObjectTree(object_id=part.object_id, children=[tree_of(7)])
            [theirs], _ = take_apart([late])
            forged = ObjectTree(object_id=theirs.object_id, children=[stolen])
            assert self.push(fleet, other, self.request(second, late, forged)) == 503
            sign_reply(late, other.identity)  # and with equal parts, as honest replies may have
            second.reply(late)
            assert sorted(each.metadata.src_node_id for each in receive_all(transport, 2)) == [2, 3]
        transport.close()

    def test_calls_without_parts_are_small(self, fleet: Fleet) -> None:
        member = fleet.member("node-1")
        answer = post(
            fleet,
            member.tls,
            "/v1/fleet/send-node-heartbeat",
            bytes(CALL_BYTES_MAX + 1),
            flower_headers(member),
        )
        assert answer.status_code == 413

    def test_stalled_uploads_of_one_node_stop_no_other(self, fleet: Fleet) -> None:
        hostile, honest = fleet.member("node-1"), fleet.member("node-2")
        stop, transport = threading.Event(), fleet.transport([honest])
        stalled = [stalled_upload(fleet, hostile) for _ in range(UPLOADS_AT_A_TIME + 1)]
        time.sleep(0.3)
        listen(fleet, honest, own_number, stop)
        ask(transport, ["node-2"])
        begun = time.monotonic()
        assert len(receive_all(transport, 1, 8)) == 1
        assert time.monotonic() - begun < 8
        stop.set()
        for each in stalled:
            each.close()
        transport.close()

    def test_a_room_that_was_left_is_closed_when_the_next_one_opens(
        self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        transport = fleet.transport([fleet.member("node-1")])
        opened: list[dict[str, Any]] = []
        before = transport._post
        monkeypatch.setattr(transport, "_post", lambda path, body: opened.append(before(path, body)) or opened[-1])
        first = transport._enter()
        transport._forget_room()
        assert transport._enter().run_id != first.run_id
        body = SendTaskHeartbeatRequest().SerializeToString()
        path, headers = "/v1/runtime/send-task-heartbeat", {TASK_TOKEN_HEADER: opened[0]["token"]}
        assert post(fleet, fleet.worker_tls, path, body, headers).status_code == 401
        transport.close()


def stalled_upload(fleet: Fleet, member: FleetMember) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", fleet.port))
    secured = member.tls.wrap_socket(plain, server_hostname="127.0.0.1")
    head = "".join(f"{name}: {value}\r\n" for name, value in flower_headers(member).items())
    secured.sendall(
        f"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n{head}\r\n".encode() + b"x"
    )
    return secured


class TestPace:
    def read(self, messages: list[tuple[float, dict[str, Any]]]) -> int:
        async def reading() -> int:
            left = iter(messages)

            async def receive() -> dict[str, Any]:
                wait, message = next(left)
                await asyncio.sleep(wait)
                return message

            pacing, size = rates.paced(receive), 0
            for _ in messages:
                size += len((await pacing()).get("body", b""))
            return size

        return asyncio.run(reading())

    def test_silence_ends_a_body_and_nothing_after_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rates, "SILENCE_S", 0.1)
        more = {"body": b"x", "more_body": True}
        with pytest.raises(TimeoutError):
            self.read([(0, more), (1, more)])
        assert self.read([(0, more), (0.05, {"body": b"y"}), (0.3, {"type": "http.disconnect"})]) == 2

    def test_a_trickle_ends_and_a_slow_line_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rates, "GRACE_S", 0.1)
        for size, fails in ((1, True), (2000, False)):
            part = (0.05, {"body": bytes(size), "more_body": True})
            if fails:
                with pytest.raises(TimeoutError):
                    self.read([part] * 6)
            else:
                assert self.read([part] * 6) == 6 * size


class TestStrangers:
    @pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer concord_invented"}])
    @pytest.mark.parametrize("path", ["/api/v1/organisations", "/api/health", "/nothing"])
    def test_a_stranger_sends_little(self, coordinator: Coordinator, header: dict[str, str], path: str) -> None:
        body = b"[" + b"[]," * STRANGER_BYTES_MAX + b"[]]"
        assert coordinator.anyone.post(path, content=body, headers=header).status_code == 413
        parts = coordinator.anyone.post(path, content=iter([body]), headers=header)
        assert parts.status_code in (404, 405, 413)  # where nobody reads it, nothing is refused
        assert parts.status_code == 413 or path != "/api/v1/organisations"
        assert coordinator.anyone.post(path, content=b" " * STRANGER_BYTES_MAX, headers=header).status_code != 413

    def test_an_enrolment_is_small(self, coordinator: Coordinator) -> None:
        headers, body = {"Concord-Protocol": "1"}, b" " * (ENROLMENT_BYTES_MAX + 1)
        assert coordinator.anyone.post("/api/enrol", content=body, headers=headers).status_code == 413
        assert coordinator.anyone.post("/api/enrol", content=body[1:], headers=headers).status_code == 422

    def test_a_token_may_send_much_from_its_first_request_on(self, coordinator: Coordinator) -> None:
        new = coordinator.person(coordinator.new_token("admin"))
        body = b'{"name": "x",' + b" " * (2 * STRANGER_BYTES_MAX) + b'"more": 1}'
        assert new.post("/api/v1/organisations", content=body).status_code == 422
        assert new.post("/api/v1/organisations", content=iter([body])).status_code == 422


@contextmanager
def served(per_caller: int) -> Iterator[int]:
    """The port of a listener whose application takes a second."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(1)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        config = uvicorn.Config(
            app, http=rates.bounded_protocol(per_caller), lifespan="off", ws="none", log_config=None
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield int(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


class TestConnections:
    def test_silent_ones_end_and_busy_ones_do_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rates, "HEADERS_S", 0.3)
        with served(10) as port:
            for begun in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\n"):
                with socket.create_connection(("127.0.0.1", port), 3) as silent:
                    silent.sendall(begun)
                    assert gone(silent)
            with httpx.Client() as client:
                assert client.get(f"http://127.0.0.1:{port}/").status_code == 204  # its answer took longer

    def test_a_caller_has_a_number_of_them(self) -> None:
        with served(2) as port:
            held = [socket.create_connection(("127.0.0.1", port), 3) for _ in range(3)]
            assert gone(held[2])
            held[0].close()
            time.sleep(0.1)
            with httpx.Client() as client:
                assert client.get(f"http://127.0.0.1:{port}/").status_code == 204
            for each in held:
                each.close()


def gone(connection: socket.socket) -> bool:
    """The other side ended it, within the timeout."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True

    @pytest.mark.parametrize(("hard", "said"), [(4096, ""), (500, "ulimit -n 2256")])
    def test_a_process_may_open_as_many_files_as_its_settings_need(self, hard: int, said: str) -> None:
        code = (
            "import logging, resource, sys; logging.basicConfig(format='%(message)s %(then)s')\n"
            f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))\n"
            "from concord_server.rates import make_room; make_room(2000)\n"
            "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert int(done.stdout) == min(hard, 2256)
        assert (said in done.stderr) if said else not done.stderr
