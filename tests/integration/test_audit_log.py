"""The coordinator's audit log: chained however many write, only growing, proven to whoever asks."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlmodel import Session, col, select
from typer.testing import CliRunner

from concord_client.store import NodeStore
from concord_local.cli import app
from concord_server.audit.service import entries, entry_of, head, record, signed_head, size
from concord_server.audit.tables import AuditEvent, NodeHead
from concord_server.client import Coordinator as Api
from concord_server.database import Database
from concord_server.evidence import entry_proof, exported_log
from concord_server.evidence import signed_head as head_of
from concord_server.status import status
from concord_shared.errors import ConflictError, DocumentRefusedError, LogBrokenError
from concord_shared.evidence.heads import TreeHead, check_grown, node_log
from concord_shared.evidence.log import export_log, verify_log
from concord_shared.protocol import HeadSent
from concord_shared.signing import Envelope, fingerprint, new_identity_key, open_envelope, seal
from coordinators import FEDERATION, Coordinator, NodeKeys, make_coordinator

KEY = new_identity_key()


def exported(database: Database) -> bytes:
    with database.reading() as session:
        _, envelope = signed_head(session, "test", KEY)
        rows = [(entry_of(row).canonical, bytes.fromhex(row.hash)) for row in entries(session, 1, 10**6)]
    return b"".join(export_log(envelope, KEY.public_key(), rows))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    made = Database(database_url)
    made.upgrade()
    yield made
    made.close()


APPENDING = """
import sys
from concord_server.audit.service import record
from concord_server.database import Database, lock
database = Database(sys.argv[1])
print("ready", flush=True)
for number in range(int(sys.argv[3])):
    with database.session() as session:
        if number % 3:
            lock(session, "other")  # locks of others are taken before or after an event is recorded
        record(session, "coordinator", "test:happen", f"{sys.argv[2]}-{number}", number=number, share=0.1 * number)
        if not number % 3:
            lock(session, "other")
        record(session, "coordinator", "test:follow", f"{sys.argv[2]}-{number}")
"""


def appending(url: str, name: str, count: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", APPENDING, url, name, str(count)], stdout=subprocess.PIPE)


def test_processes_that_append_at_once_make_one_chain(database: Database, database_url: str) -> None:
    processes = [appending(database_url, name, 25) for name in "abc"]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    found = verify_log(exported(database), fingerprint(KEY.public_key()))
    assert found.entries == 150
    with database.reading() as session:
        told = [(row.action, row.subject) for row in entries(session, 1, 1000)]
    assert told[::2] == [("test:happen", subject) for _, subject in told[1::2]]  # a transaction's events stay together


def test_killed_while_appending_the_log_is_whole(database: Database, database_url: str) -> None:
    for turn in range(2):
        processes = [appending(database_url, f"{turn}{name}", 100_000) for name in "ab"]
        with database.reading() as session:
            before = size(session)
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        now = before
        while now < before + 20:
            time.sleep(0.01)
            with database.reading() as session:
                now = size(session)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    with database.session() as session:
        record(session, "coordinator", "test:happen", "after")
    assert verify_log(exported(database)).entries > 40


def test_the_log_only_grows(database: Database) -> None:
    with database.session() as session:
        for number in range(5):
            record(session, "coordinator", "test:happen", str(number))
    statements = [
        "UPDATE audit_event SET actor = 'x' WHERE id = 2",
        "DELETE FROM audit_event WHERE id = 5",
        "UPDATE audit_subtree SET hash = 'x'",
        "DELETE FROM audit_subtree",
    ]
    if database._engine.dialect.name == "postgresql":
        statements += ["TRUNCATE audit_event", "TRUNCATE audit_subtree"]
    for statement in statements:
        with pytest.raises(ConflictError), database.session() as session:
            session.execute(text(statement))
    assert verify_log(exported(database)).entries == 5


@pytest.mark.parametrize(
    ("change", "why", "entry"),
    [
        ("UPDATE audit_event SET subject = 'another' WHERE id = 3", "entry 3 was altered", 3),
        ("UPDATE audit_event SET detail = '{}' WHERE id = 4", "entry 4 was altered", 4),
        ("DELETE FROM audit_event WHERE id = 2", "entry 2 was removed", 2),
    ],
)
def test_a_row_that_was_changed_around_the_triggers_is_named(
    database: Database, change: str, why: str, entry: int
) -> None:
    with database.session() as session:
        for number in range(6):
            record(session, "coordinator", "test:happen", str(number), number=number)
    with database.session() as session:
        _drop_triggers(session)
        session.execute(text(change))
    with pytest.raises(LogBrokenError, match=why) as caught:
        verify_log(exported(database))
    assert caught.value.entry == entry


def _drop_triggers(session: Session) -> None:
    postgresql = session.get_bind().dialect.name == "postgresql"
    for name in ("no_update", "no_delete") if not postgresql else ("no_update",):
        session.execute(text(f"DROP TRIGGER audit_event_{name}" + (" ON audit_event" if postgresql else "")))


def test_events_of_before_are_chained_by_the_migration(database: Database, database_url: str) -> None:
    """Also where their numbers have gaps, as PostgreSQL's may."""
    with database.session() as session:
        for number in range(5):
            record(session, "coordinator", "test:happen", str(number), share=0.1, text="größe")
    before = exported(database)
    database.downgrade("0001")
    with database.session() as session:
        session.execute(text("UPDATE audit_event SET id = id + 10 WHERE id > 3"))
    database.upgrade()
    database.check()
    assert exported(database).splitlines()[1:] == before.splitlines()[1:]
    with database.session() as session:
        record(session, "coordinator", "test:happen", "after")
    assert verify_log(exported(database)).entries == 6


def test_what_a_stranger_sends_is_recorded_whatever_it_holds(database: Database) -> None:
    with database.session() as session:
        record(session, "address:x", "test:happen", "lone \ud800 half", text="\ud800", e="é", pair=(1, 2))
    assert verify_log(exported(database)).entries == 1


def test_a_transaction_that_fails_leaves_no_entry(database: Database) -> None:
    def fail(session: Session) -> None:
        record(session, "coordinator", "test:happen", "never")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), database.session() as session:
        fail(session)
    with database.session() as session:
        record(session, "coordinator", "test:happen", "then")
    assert verify_log(exported(database)).entries == 1


def test_every_head_follows_from_every_one_before(database: Database) -> None:
    from concord_server.audit.service import grown_since

    found: list[TreeHead] = []
    for number in range(20):
        with database.session() as session:
            record(session, "coordinator", "test:happen", str(number))
        with database.reading() as session:
            found.append(head(session, "test"))
            for each in found:
                check_grown(each, found[-1], grown_since(session, each.size, found[-1].size))


# Over the API


@pytest.fixture
def api(coordinator: Coordinator) -> Api:
    return _api(coordinator, coordinator.token)


def _api(coordinator: Coordinator, token: str) -> Api:
    made = Api("https://testserver", token, transport=coordinator.admin._transport)
    made.root_pem = coordinator.authority.root_pem
    return made


def test_a_person_verifies_the_log_from_the_pinned_root_on(api: Api, coordinator: Coordinator) -> None:
    content, key = exported_log(api)
    assert key == fingerprint(coordinator.app.state.concord.signer.public_key())
    assert verify_log(content, key).log == f"{FEDERATION}/coordinator"
    made, found = entry_proof(api, 2)
    assert found["entry"]["sequence"] == 2
    assert made.before == json.loads(content.splitlines()[1])["hash"]
    api.root_pem = make_root()
    with pytest.raises(DocumentRefusedError, match="root key"):
        head_of(api)


def make_root() -> str:
    import datetime

    from concord_server.pki import make_root as made

    return made("others", datetime.datetime.now(datetime.UTC))[1]


def test_only_auditors_of_the_federation_see_it(coordinator: Coordinator) -> None:
    paths = ("audit/head", "audit/entries", "audit/entries/1/proof", "audit/heads")
    for who, code in (
        (coordinator.new_person("ada", "hospital-a", "auditor"), 403),
        (coordinator.new_person("ben", None, "auditor@*"), 200),
        (coordinator.new_person("cid", "hospital-a", "researcher"), 403),
        (coordinator.anyone, 401),
    ):
        assert {who.get(f"/api/v1/{path}").status_code for path in paths} == {code}
    assert coordinator.admin.get("/api/v1/audit/entries/100000/proof").status_code == 404
    ben = coordinator.new_person("dan", None, "auditor@*")
    assert ben.post("/api/v1/audit/heads/ward-1/accept", json={}).status_code == 403


@pytest.fixture
def commands(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    from concord_server.client import Coordinator as Client

    monkeypatch.setattr(Client, "from_profile", classmethod(lambda cls: _api(coordinator, coordinator.token)))
    return coordinator


def run(*words: str) -> Any:
    result = CliRunner().invoke(app, [*words, "--json"], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return json.loads(result.output)


def test_the_commands_verify_export_and_prove(commands: Coordinator, tmp_path: Path) -> None:
    first = run("audit", "head")
    commands.new_organisation("hospital-c")
    log, proof = tmp_path / "log.jsonl", tmp_path / "entry.json"
    assert run("audit", "verify", "--head", first["head"])["verified"] is True
    assert run("audit", "export", "-o", str(log))["key"] == first["key"]
    assert run("audit", "verify", str(log), "--key", first["key"], "--head", first["head"])["verified"] is True
    assert run("audit", "prove", "3", "-o", str(proof))["entry"]["sequence"] == 3
    assert run("audit", "verify", str(proof), "--key", first["key"])["entry"]["sequence"] == 3
    with pytest.raises(DocumentRefusedError, match="expected 0000"):
        run("audit", "verify", str(log), "--key", "0" * 64)
    with pytest.raises(DocumentRefusedError, match="expected 0000"):
        run("audit", "verify", str(proof), "--key", "0" * 64)
    content = json.loads(proof.read_text("utf-8"))
    proof.write_text(json.dumps(content | {"body": content["body"].replace("coordinator", "somebody")}), "utf-8")
    with pytest.raises(DocumentRefusedError, match="entry 3 is not in the log"):
        run("audit", "verify", str(proof))
    log.write_bytes(log.read_bytes().replace(b"hospital-c", b"hospital-d", 1))
    with pytest.raises(LogBrokenError, match="was altered"):
        run("audit", "verify", str(log))
    assert [each["action"] for each in run("audit", "--limit", "1")["items"]] == ["organisation:create"]


def test_the_log_of_a_coordinator_that_cut_it_is_found_by_who_remembers(commands: Coordinator, tmp_path: Path) -> None:
    remembered = run("audit", "head")["head"]
    with commands.database.session() as session:
        _drop_triggers(session)
        last = session.exec(select(AuditEvent).order_by(col(AuditEvent.id).desc())).first()
        assert last is not None
        session.delete(last)
    assert run("audit", "verify")["verified"] is True  # the log itself cannot tell
    with pytest.raises(LogBrokenError, match="the log was cut") as caught:
        run("audit", "verify", "--head", remembered)
    assert caught.value.entry == last.id


# Heads of nodes


@pytest.fixture
def ward(coordinator: Coordinator) -> tuple[NodeKeys, Any]:
    return coordinator.enrol("ward-1", "hospital-a")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[NodeStore]:
    with NodeStore(tmp_path / "node.db") as store:
        store.record("node", "test:happen", "first")
        yield store


LOG = node_log(FEDERATION, "hospital-a", "ward-1")


def send(client: Any, keys: NodeKeys, found: TreeHead, proof: tuple[str, ...] = ()) -> Any:
    sent = HeadSent(head=seal(found, keys.identity), proof=proof)
    return client.post("/api/node/heads", content=sent.model_dump_json())


def test_a_nodes_head_is_remembered_and_must_follow(
    coordinator: Coordinator, ward: tuple[NodeKeys, Any], own: NodeStore, commands: Coordinator
) -> None:
    keys, client = ward
    told = client.get("/api/node/heads").json()
    key = coordinator.app.state.concord.signer.public_key()
    assert open_envelope(Envelope.model_validate_json(json.dumps(told["head"])), TreeHead, [key]).size > 0
    assert told["remembered"] is None
    first = own.log_head(LOG)
    assert send(client, keys, first).status_code == 204
    own.record("node", "test:happen", "second")
    second = own.log_head(LOG)
    assert send(client, keys, second, own.log_grown(1, 2)).status_code == 204
    assert client.get("/api/node/heads").json()["remembered"] == seal(second, keys.identity).model_dump(mode="json")
    assert coordinator.audited("log:grow-refused") == []
    refused = send(client, keys, first)
    assert (refused.status_code, refused.json()["code"]) == (409, "log-forked")
    send(client, keys, first)
    assert len(coordinator.audited("log:grow-refused")) == 1
    [shown] = run("audit", "heads")["items"]
    assert (shown["node"], shown["size"]) == ("ward-1", 2)
    assert "cut" in shown["alarm"]
    assert status(coordinator.home.path)["alarms"] == {"ward-1": shown["alarm"]}
    run("audit", "accept", "ward-1", "--reason", "a backup was put back")
    assert send(client, keys, second, own.log_grown(1, 2)).status_code == 204
    assert run("audit", "heads")["items"][0]["alarm"] == ""
    assert status(coordinator.home.path)["alarms"] == {}
    with pytest.raises(ConflictError, match="no alarm"):
        run("audit", "accept", "ward-1", "--reason", "again")


def test_a_rewritten_log_of_a_node_is_an_alarm(
    coordinator: Coordinator, ward: tuple[NodeKeys, Any], own: NodeStore, tmp_path: Path
) -> None:
    keys, client = ward
    assert send(client, keys, own.log_head(LOG)).status_code == 204
    with NodeStore(tmp_path / "another.db") as other:
        for number in range(3):
            other.record("node", "test:happen", f"other {number}")
        answer = send(client, keys, other.log_head(LOG), other.log_grown(1, 3))
    assert answer.status_code == 409
    assert "rewritten" in answer.json()["detail"]
    with coordinator.database.reading() as session:
        row = session.get_one(NodeHead, "ward-1")
    assert row.offered != row.head


def test_heads_of_others_are_refused(coordinator: Coordinator, ward: tuple[NodeKeys, Any], own: NodeStore) -> None:
    keys, client = ward
    assert send(client, keys, own.log_head("hearts/hospital-b/ward-2")).status_code == 400
    assert send(client, NodeKeys(), own.log_head(LOG)).status_code == 400
    future = own.log_head(LOG).model_copy(update={"issued_at": 1 << 39})
    assert send(client, keys, future).status_code == 400
    assert client.post("/api/node/heads", json={"head": {}, "proof": ["x"]}).status_code in (400, 422)
    assert coordinator.anyone.get("/api/node/heads", headers={"Concord-Protocol": "1"}).status_code == 401


def test_a_node_that_enrols_anew_begins_a_new_log(
    coordinator: Coordinator, ward: tuple[NodeKeys, Any], own: NodeStore
) -> None:
    keys, client = ward
    own.record("node", "test:happen", "second")
    assert send(client, keys, own.log_head(LOG)).status_code == 204
    assert coordinator.admin.post("/api/v1/nodes/ward-1/revoke", json={}).status_code == 200
    fresh, again = coordinator.enrol("ward-1", "hospital-a")
    assert again.get("/api/node/heads").json()["remembered"] is None
    assert send(again, fresh, own.log_head(LOG, 1)).status_code == 204


def test_the_whole_log_of_a_coordinator_verifies_on_each_database(tmp_path: Path, database_url: str) -> None:
    coordinator = make_coordinator(tmp_path / "c", database_url)
    coordinator.enrol("ward-1", "hospital-a")
    content, key = exported_log(_api(coordinator, coordinator.token))
    assert verify_log(content, key).entries > 8
    coordinator.close()
