"""The node's database: what a method returned from is there, for every process."""

import json
import multiprocessing
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from concord_client.store import REFUSED_BODY_BYTES_MAX, REFUSED_MAX, ROSTERS_MAX, Dataset, NodeStore
from concord_shared.documents import Approval, Participant, Roster, RunManifest
from concord_shared.errors import ArtefactError
from concord_shared.signing import Envelope, new_identity_key, open_envelope, public_text, seal
from helpers import IMAGES, plan_of

KEY = new_identity_key()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[NodeStore]:
    with NodeStore(tmp_path / "node.db") as opened:
        yield opened


def approval(sequence: int = 1, decision: str = "approved", not_after: int = 100) -> Approval:
    return Approval(
        node="acme-1",
        organisation="acme",
        dataset="patients",
        dataset_version="0" * 64,
        study="heart",
        plan_digest="1" * 64,
        decision=decision,  # type: ignore[arg-type]
        decided_by="ada",
        sequence=sequence,
        issued_at=0,
        not_after=not_after,
    )


def put(store: NodeStore, made: Approval) -> bool:
    return store.put_approval(made, seal(made, KEY))


def test_dataset_survives_the_database(store: NodeStore) -> None:
    dataset = Dataset(
        name="patients",
        version="0" * 64,
        spec="csv:/a",
        title="t",
        description="d",
        rows=3,
        input="table",
        columns=("age", "größe"),
        licence="",
        registered_at=1,
        published=True,
        files={"": (1, 2)},
    )
    store.put_dataset(dataset)
    assert store.dataset("patients") == dataset
    assert store.datasets() == [dataset]
    store.remove_dataset("patients")
    assert store.datasets() == []


def test_current_approval_ends_when_it_expires(store: NodeStore) -> None:
    put(store, approval())
    about = ("heart", "1" * 64, "patients")
    assert store.current_approval(*about, 99) == approval()
    assert store.current_approval(*about, 100) is None


@pytest.mark.parametrize("decision", ["rejected", "withdrawn"])
def test_current_approval_is_the_last_word(store: NodeStore, decision: str) -> None:
    put(store, approval())
    put(store, approval(2, decision))
    assert store.current_approval("heart", "1" * 64, "patients", 0) is None
    put(store, approval(3))
    assert store.current_approval("heart", "1" * 64, "patients", 0) == approval(3)


def test_approval_with_a_taken_sequence_changes_nothing(store: NodeStore) -> None:
    assert put(store, approval())
    assert not put(store, approval(decision="withdrawn"))
    assert store.approvals() == [approval()]
    assert len(store.outbox()) == 1


def test_outbox_keeps_order_until_delivered(store: NodeStore) -> None:
    put(store, approval())
    put(store, approval(2, "withdrawn"))
    first, second = store.outbox()
    assert first.kind == "approval"
    store.delivered(first.id)
    assert [each.id for each in store.outbox()] == [second.id]


def test_answered_is_true_once(store: NodeStore) -> None:
    assert not store.has_answered("run", "train", 1, 1)
    assert store.answered("run", "train", 1, 1)
    assert not store.answered("run", "train", 1, 1)
    assert store.has_answered("run", "train", 1, 1)
    assert store.answered("run", "train", 1, 2)


def test_egress_is_listed_in_order(store: NodeStore) -> None:
    for size in range(5):
        store.log_egress(1.5, "https://fed", "update", "run-1", size, "0" * 64)
    assert [each.bytes for each in store.egress()] == [0, 1, 2, 3, 4]
    assert [each.bytes for each in store.egress(2)] == [3, 4]


def test_refusals_cannot_fill_the_disk(store: NodeStore) -> None:
    for number in range(REFUSED_MAX + 10):
        store.refuse(1, "plan", f"p{number}", "no", {"number": number})
    store.refuse(1, "plan", "huge", "no", {"text": "x" * REFUSED_BODY_BYTES_MAX})
    refused = store.refused()
    assert len(refused) == REFUSED_MAX
    assert refused[-1].subject == "huge"
    assert refused[-1].body is None


def test_cursor_and_facts(store: NodeStore) -> None:
    assert store.cursor == 0
    store.cursor = 7
    assert store.cursor == 7
    assert store.fact("state") is None
    store.set_fact("state", "active")
    assert store.fact("state") == "active"


def roster(version: int) -> Roster:
    key = public_text(KEY.public_key())
    return Roster(federation="fed", version=version, issued_at=0, coordinator_key=key, organisations=(), nodes=())


def test_of_many_rosters_the_newest_and_what_a_manifest_names_stay_whole_and_of_all_the_digest(
    store: NodeStore,
) -> None:
    """The coordinator can make as many as it likes."""
    manifest = RunManifest(
        run="run-1",
        study="heart",
        plan_digest="1" * 64,
        organisation="acme",
        roster_version=3,
        participants=(Participant(node="n", organisation="acme", dataset="d", dataset_version="0" * 64),),
        cohort_seed=1,
        versions={},
        nonce="0" * 64,
        not_before=0,
        not_after=1,
    )
    store.put("manifest", "run-1", seal(manifest, KEY))
    count = 3 * ROSTERS_MAX
    for version in range(1, count + 1):
        store.put("roster", str(version), seal(roster(version), KEY))
        store.set_fact("roster", str(version))
    assert store.roster() == roster(count)
    found = {int(stored.id): stored for stored in store.all("roster")}
    assert set(found) == set(range(1, count + 1))
    whole = {version for version, stored in found.items() if stored.state != "digest"}
    assert whole == {3, *range(count - ROSTERS_MAX + 1, count + 1)}
    for version in set(found) - whole:
        assert found[version].body == {"digest": roster(version).digest}
    envelope = Envelope.model_validate_json(json.dumps(found[3].body))
    assert open_envelope(envelope, Roster, [KEY.public_key()]) == roster(3)


def test_plans_that_were_ever_approved(store: NodeStore) -> None:
    plans = [plan_of(IMAGES, f"seed={seed}") for seed in (1, 2)]
    for plan in plans:
        store.put("plan", plan.digest, plan.document())
    given = {"plan_digest": plans[0].digest}
    assert put(store, approval(1, "rejected").model_copy(update=given))
    assert store.approved_plans() == []
    assert put(store, approval(2, "approved").model_copy(update=given))
    assert put(store, approval(3, "withdrawn").model_copy(update=given))
    assert put(store, approval(1, "approved"))  # of a plan that is not held
    assert [plan.digest for plan in store.approved_plans()] == [plans[0].digest]


def _write(path: Path, name: str, count: int) -> None:
    with NodeStore(path) as store:
        for number in range(count):
            store.log_egress(0.0, name, "update", str(number), number, "0" * 64)
            store.answered("run", "train", number, 1)


def test_two_processes_write_at_once_and_lose_nothing(tmp_path: Path) -> None:
    """They also create it at once."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write, args=(tmp_path / "node.db", name, 40)) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    with NodeStore(tmp_path / "node.db") as store:
        entries = store.egress()
        for name in ("a", "b"):
            assert [each.bytes for each in entries if each.to == name] == list(range(40))
        assert not store.answered("run", "train", 39, 1)


def test_database_of_another_version_is_refused(tmp_path: Path) -> None:
    NodeStore(tmp_path / "node.db").close()
    with sqlite3.connect(tmp_path / "node.db") as connection:
        connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(ArtefactError, match="version 99"):
        NodeStore(tmp_path / "node.db")


def test_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "node.db").write_bytes(b"not a database" * 100)
    with pytest.raises(ArtefactError, match=r"node\.db"):
        NodeStore(tmp_path / "node.db")


def test_database_held_by_another_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: NodeStore) -> None:
    monkeypatch.setattr("concord_client.store.BUSY_TIMEOUT_S", 0.1)
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(ArtefactError, match="another concord-node holds it"), NodeStore(store.path) as second:
        second.set_fact("a", "b")
    other.close()
    assert store.fact("a") is None


def test_full_disk_changes_nothing_and_says_so(store: NodeStore) -> None:
    store.set_fact("a", "before")
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(ArtefactError, match="free some space"):
        store.set_fact("b", "x" * 1_000_000)
    assert store.fact("a") == "before"
    assert store.fact("b") is None
