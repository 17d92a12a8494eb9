from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Message

from concord_local import faults
from concord_local.faults import Faults, FaultyTransport
from concord_shared.errors import UsageError
from concord_shared.messages import answer
from concord_shared.transport import NodeEntry
from helpers import offer_of, request_of

NODES = [NodeEntry(f"node-{index}", index + 2, 10, 2) for index in range(50)]


class TestParse:
    def test_either_both_or_none(self) -> None:
        assert Faults.parse("", 1) is None
        assert Faults.parse("dropout:0.2", 1) == Faults(0.2, 0.0, 1)
        assert Faults.parse("slow:3", 1) == Faults(0.0, 3.0, 1)
        assert Faults.parse("slow:0.5,dropout:0", 7) == Faults(0.0, 0.5, 7)

    @pytest.mark.parametrize("text", ["drop:0.1", "dropout", "dropout:", "dropout:x", "dropout:0.1,", "dropout 0.1"])
    def test_refuses_what_it_does_not_know(self, text: str) -> None:
        with pytest.raises(UsageError, match="expected dropout:P, slow:SECONDS"):
            Faults.parse(text, 1)

    @pytest.mark.parametrize("text", ["dropout:1", "dropout:-0.1", "slow:-1", "slow:3601", "dropout:nan", "slow:inf"])
    def test_refuses_what_is_out_of_range(self, text: str) -> None:
        with pytest.raises(UsageError, match="a dropout of 0 to below 1 and at most 3600 seconds"):
            Faults.parse(text, 1)


def request(node: NodeEntry, round_number: int = 1, kind: Any = "train") -> Message:
    return request_of(offer_of(node=node.name, round_number=round_number, kind=kind), node.node_id)


class TestDrill:
    def drill(self, chosen: Faults, kind: Any = "train") -> list[tuple[bool, float]]:
        return [chosen.of(request(node, number, kind), node.name) for number in range(1, 21) for node in NODES]

    def test_can_be_repeated_and_follows_the_seed(self) -> None:
        assert self.drill(Faults(0.3, 2, 1)) == self.drill(Faults(0.3, 2, 1)) != self.drill(Faults(0.3, 2, 2))

    def test_loses_and_delays_as_many_as_asked_for(self) -> None:
        drawn = self.drill(Faults(0.3, 2, 1))
        assert sum(lost for lost, _ in drawn) / len(drawn) == pytest.approx(0.3, abs=0.05)
        delays = [delay for _, delay in drawn]
        assert 0 <= min(delays) <= max(delays) < 2
        assert sum(delays) / len(delays) == pytest.approx(1, abs=0.1)

    def test_hits_other_nodes_in_other_rounds(self) -> None:
        drawn = [lost for lost, _ in self.drill(Faults(0.3, 0, 1))]
        assert drawn[:50] != drawn[50:100]

    @pytest.mark.parametrize("kind", ["evaluate", "statistics"])
    def test_spares_statistics_and_evaluation(self, kind: str) -> None:
        assert set(self.drill(Faults(0.9, 9, 1), kind)) == {(False, 0.0)}


class Echo:
    """A transport whose nodes answer at once."""

    def __init__(self) -> None:
        self.waiting: list[Message] = []
        self.closed = False

    def send(self, messages: Iterable[Message]) -> None:
        self.waiting += [answer(message, offer_of(), {}, {}) for message in messages]

    def receive(self, timeout_s: float) -> list[Message]:
        replies, self.waiting = self.waiting, []
        return replies

    def close(self) -> None:
        self.closed = True


class TestTransport:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [100.0]
        monkeypatch.setattr(faults.time, "monotonic", lambda: now[0])
        return now

    def test_a_lost_answer_arrives_as_an_error_and_every_node_answers_once(self, clock: list[float]) -> None:
        chosen = Faults(0.3, 0, 1)
        transport = FaultyTransport(Echo(), chosen, NODES)
        transport.send(request(node) for node in NODES)
        replies = transport.receive(1) + transport.receive(1)
        assert sorted(reply.metadata.src_node_id for reply in replies) == [node.node_id for node in NODES]
        lost = {reply.metadata.src_node_id for reply in replies if reply.has_error()}
        assert lost == {node.node_id for node in NODES if chosen.of(request(node), node.name)[0]}
        assert 0 < len(lost) < 50

    def test_a_late_answer_arrives_when_it_is_due_and_not_before(self, clock: list[float]) -> None:
        chosen = Faults(0, 10, 1)
        transport = FaultyTransport(Echo(), chosen, NODES)
        transport.send(request(node) for node in NODES)
        due = {node.node_id: 100 + chosen.of(request(node), node.name)[1] for node in NODES}
        arrived: list[int] = []
        for clock[0] in (100.0, 103.0, 106.5, 110.0):
            arrived += [reply.metadata.src_node_id for reply in transport.receive(0)]
            assert set(arrived) == {node for node, at in due.items() if at <= clock[0]}
        assert arrived == sorted(due, key=lambda node: due[node])

    def test_without_faults_nothing_changes(self, clock: list[float]) -> None:
        transport = FaultyTransport(Echo(), Faults(0, 0, 1), NODES)
        transport.send([request(NODES[0])])
        assert [reply.has_error() for reply in transport.receive(0)] == [False]
        assert transport.receive(0) == []

    def test_closing_closes_what_is_inside(self) -> None:
        inner = Echo()
        FaultyTransport(inner, Faults(0, 0, 1), NODES).close()
        assert inner.closed
