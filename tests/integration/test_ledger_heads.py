"""What the coordinator remembers of nodes' privacy ledgers: each node's own word, for that node alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds import OWNERS, World, body, now

from concord_shared.protocol import PROTOCOL, PROTOCOL_HEADER, LedgerHead, LedgerWitness
from concord_shared.signing import open_envelope

PATH = "/api/node/ledger-head"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"))
    yield made
    made.close()


def say(world: World, site: str, sequence: int, key: str = "", **changes: Any) -> Any:
    given = {"node": site, "organisation": OWNERS[site], "sequence": sequence, "hash": "a" * 64, "issued_at": now()}
    return world.sites[site].client.post(
        PATH, json=body(LedgerHead(**given | changes), world.sites[key or site].keys.identity)
    )


def told(world: World, site: str) -> int:
    head = LedgerWitness.model_validate_json(world.sites[site].client.get(PATH).content).head
    if head is None:
        return 0
    return open_envelope(head, LedgerHead, [world.sites[site].keys.identity.public_key()]).sequence


def test_the_furthest_word_is_kept_for_the_node_that_said_it(world: World, tmp_path: Path) -> None:
    assert told(world, "ward-a") == 0
    for sequence in (3, 9, 5):
        assert say(world, "ward-a", sequence).status_code == 204
    assert told(world, "ward-a") == 9
    assert told(world, "ward-b") == 0
    assert [each["detail"]["sequence"] for each in world.coordinator.audited("ledger:note")] == [9, 3]


def test_nobody_speaks_for_another(world: World) -> None:
    before = told(world, "ward-b")
    assert say(world, "ward-b", 9, key="ward-a").status_code == 400
    assert say(world, "ward-b", 9, node="ward-a").status_code == 403
    assert say(world, "ward-b", 9, organisation="hospital-a").status_code == 403
    assert say(world, "ward-b", 9, issued_at=now() + 3600).status_code == 400
    assert told(world, "ward-b") == before


def test_only_nodes_are_told(world: World) -> None:
    protocol = {PROTOCOL_HEADER: str(PROTOCOL)}
    assert world.people["lab"].get(PATH, headers=protocol).status_code == 401
    assert world.coordinator.anyone.get(PATH, headers=protocol).status_code == 401
