"""A node and the coordinator watch each other's logs; receipts are checked against what was sent."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from concord_client.control import ControlChannel
from concord_client.doctor import examine
from concord_client.evidence import accept_logs, alarms, exchange, own_head, remembered_head, take_receipt
from concord_client.farewell import verify_farewell, write_farewell
from concord_client.guard import RoundGuard, RoundRefusedError
from concord_client.home import NodeHome
from concord_client.policy import Policy
from concord_client.store import NodeStore
from concord_shared.documents import Leave
from concord_shared.errors import ArtefactError, DocumentRefusedError, LogForkedError, UsageError
from concord_shared.evidence.heads import TreeHead
from concord_shared.evidence.log import export_log, verify_log
from concord_shared.evidence.receipts import Receipt
from concord_shared.signing import Envelope, fingerprint, new_identity_key, open_envelope, seal
from unit.client.fake_coordinator import FEDERATION, NODE, NOW, ORGANISATION, REQUESTER, FakeLog, Partner, partner_in
from unit.client.rounds_kit import make_site

SENT = "5" * 64


@pytest.fixture
def partner(tmp_path: Path) -> Iterator[Partner]:
    made = partner_in(tmp_path)
    made.ask()
    yield made
    made.store.close()


def swap(partner: Partner) -> None:
    """One exchange of heads and receipts."""
    channel = ControlChannel(partner.home, partner.store, lambda: NOW, partner.coordinator.transport())
    with channel:
        exchange(partner.home, partner.store, channel, NOW)


def grow(partner: Partner, *leaves: bytes) -> None:
    partner.coordinator.log = FakeLog([*partner.coordinator.log.leaves, *leaves])


def exported(home: NodeHome, store: NodeStore) -> bytes:
    key = home.identity_key()
    entries = [(each.canonical, found) for each, found in store.log_entries()]
    return b"".join(export_log(seal(own_head(home, store), key), key.public_key(), entries))


def test_what_happened_before_is_in_the_log_and_the_log_is_verified(partner: Partner) -> None:
    actions = [each.action for each, _ in partner.store.log_entries()]
    assert actions[0] == "egress:enrolment"
    assert {"roster:accept", "study:accept", "agreement:accept", "plan:accept", "dataset:register"} <= set(actions)
    key = fingerprint(partner.home.identity_key().public_key())
    found = verify_log(exported(partner.home, partner.store), key)
    assert found.entries == len(actions)


def test_heads_are_exchanged_and_remembered(partner: Partner) -> None:
    swap(partner)
    first = remembered_head(partner.store)
    assert first is not None
    assert partner.coordinator.remembered is not None
    theirs = Envelope.model_validate_json(json.dumps(partner.coordinator.remembered))
    identity = partner.home.identity_key().public_key()
    assert open_envelope(theirs, TreeHead, [identity]).size == partner.store.log_size()
    grow(partner, b"a", b"b", b"c")
    swap(partner)
    second = remembered_head(partner.store)
    assert second is not None
    assert (first.size, second.size) == (1, 4)
    assert alarms(partner.store) == []


@pytest.mark.parametrize(
    ("leaves", "why"),
    [
        ([b"begin", b"x"], "the log was cut"),
        ([b"other", b"1", b"2"], "two different logs"),
        ([b"begin", b"1", b"other", b"3", b"4"], "rewritten"),
    ],
)
def test_a_coordinator_that_rewrites_its_log_is_an_alarm(partner: Partner, leaves: list[bytes], why: str) -> None:
    grow(partner, b"1", b"2")
    swap(partner)
    held = remembered_head(partner.store)
    partner.coordinator.log = FakeLog(leaves)
    with pytest.raises(LogForkedError, match=why):
        swap(partner)
    [alarm] = alarms(partner.store)
    assert alarm.whose == "coordinator"
    key = partner.coordinator.coordinator_key.public_key()
    signed = [open_envelope(each, TreeHead, [key]) for each in (alarm.held, alarm.shown)]
    assert [each.size for each in signed] == [3, len(leaves)]
    assert remembered_head(partner.store) == held
    assert "log:alarm" in [each.action for each, _ in partner.store.log_entries()]


def test_a_coordinator_that_appends_after_a_fork_is_still_an_alarm(partner: Partner) -> None:
    grow(partner, b"1", b"2")
    swap(partner)
    partner.coordinator.log = FakeLog([b"begin", b"1", b"other", *(b"%d" % n for n in range(20))])
    for _ in range(2):
        with pytest.raises(LogForkedError):
            swap(partner)
    assert len(alarms(partner.store)) == 1


def test_an_alarm_is_in_doctor_until_a_person_accepts(partner: Partner) -> None:
    def finding() -> Any:
        found = examine(partner.home, partner.store, _no_channel, lambda: NOW, with_device=False)
        return next(each for each in found if each.name == "evidence")

    swap(partner)
    assert finding().state == "ok"
    partner.coordinator.log = FakeLog([b"another"])
    with pytest.raises(LogForkedError):
        swap(partner)
    assert finding().state == "fail"
    assert "concord-node audit accept" in finding().advice
    accept_logs(partner.store, "they told me on the phone")
    swap(partner)
    assert finding().state == "ok"
    entry = next(each for each, _ in partner.store.log_entries() if each.action == "log:accept")
    assert entry.detail["reason"] == "they told me on the phone"
    with pytest.raises(UsageError, match="no alarm"):
        accept_logs(partner.store, "again")


def _no_channel(home: NodeHome, store: NodeStore) -> Any:
    raise DocumentRefusedError("not asked here")


def test_silence_about_heads_is_a_warning(partner: Partner) -> None:
    swap(partner)
    found = examine(partner.home, partner.store, _no_channel, lambda: NOW + 2 * 86_400, with_device=False)
    assert next(each for each in found if each.name == "evidence").state == "warn"


def test_a_head_of_another_signer_or_log_is_refused(partner: Partner) -> None:
    coordinator = partner.coordinator
    real, coordinator.coordinator_key = coordinator.coordinator_key, new_identity_key()
    with pytest.raises(DocumentRefusedError, match="lacks the signature"):
        swap(partner)
    coordinator.coordinator_key = real
    coordinator.log.head = lambda log: TreeHead(log="other/coordinator", size=1, root="0" * 64, issued_at=1)  # type: ignore[method-assign]
    with pytest.raises(DocumentRefusedError, match="other/coordinator"):
        swap(partner)
    assert remembered_head(partner.store) is None


def test_a_node_put_back_to_an_older_state_is_an_alarm(partner: Partner, tmp_path: Path) -> None:
    partner.store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    backup = partner.home.database.read_bytes()
    partner.store.record("owner", "test:happen", "something")
    swap(partner)
    partner.store.close()
    for file in partner.home.path.glob("node.db*"):
        file.unlink()
    partner.home.database.write_bytes(backup)
    partner.store = partner.home.store()
    with pytest.raises(LogForkedError, match="older backup"):
        swap(partner)
    assert [each.whose for each in alarms(partner.store)] == ["own"]


def test_a_coordinator_that_says_this_node_rewrote_its_log_is_an_alarm(partner: Partner) -> None:
    import httpx

    def refuse(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            del partner.coordinator.overrides["/api/node/heads"]
            answer = partner.coordinator.handle(request)
            partner.coordinator.overrides["/api/node/heads"] = refuse
            return answer
        content = {"type": "about:blank", "title": "t", "status": 409, "detail": "it was cut", "code": "log-forked"}
        return httpx.Response(409, json=content)

    partner.coordinator.overrides["/api/node/heads"] = refuse
    with pytest.raises(LogForkedError, match="it was cut"):
        swap(partner)
    assert [each.whose for each in alarms(partner.store)] == ["own"]


@pytest.mark.parametrize("on_fork", ["stop", "warn"])
def test_the_policy_decides_whether_rounds_go_on_under_an_alarm(tmp_path: Path, on_fork: str) -> None:
    site = make_site(tmp_path)
    guard = RoundGuard(site.home, site.store)
    guard.check(site.message())
    alarm = {"whose": "coordinator", "at": 1, "reason": "cut"}
    head = seal(TreeHead(log="x", size=1, root="0" * 64, issued_at=1), new_identity_key()).model_dump(mode="json")
    site.store.set_fact("alarm/coordinator", json.dumps(alarm | {"held": head, "shown": head}))
    site.change_policy('on_fork = "stop"', f'on_fork = "{on_fork}"')
    if on_fork == "warn":
        guard.check(site.message())
        return
    with pytest.raises(RoundRefusedError, match="has to look") as caught:
        guard.check(site.message())
    assert caught.value.check == "evidence"
    assert Policy().evidence.on_fork == "stop"


def test_a_changed_policy_is_in_the_log(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    guard = RoundGuard(site.home, site.store)
    for _ in range(2):
        guard.check(site.message())
    site.change_policy('on_fork = "stop"', 'on_fork = "warn"')
    guard.check(site.message())
    assert [each.action for each, _ in site.store.log_entries()].count("policy:change") == 2


# Receipts


@pytest.fixture
def taken(partner: Partner) -> Callable[..., Receipt]:
    """A receipt for what was sent in round 1 of a run that the node holds."""
    manifest = partner.manifest()
    assert partner.apply("manifest", seal(manifest, partner.key(REQUESTER))).refused == []
    partner.store.log_egress(NOW, "fleet", "reply", f"run-1/train/1/1/{NODE}", 10, SENT)
    own = manifest.participants[0]

    def make(**changes: Any) -> Receipt:
        fields: dict[str, Any] = {
            "run": "run-1",
            "plan_digest": partner.plan.digest,
            "manifest_digest": manifest.digest,
            "kind": "train",
            "round_number": 1,
            "attempt": 1,
            "node": NODE,
            "organisation": ORGANISATION,
            "dataset": own.dataset,
            "dataset_version": own.dataset_version,
            "sent": SENT,
            "taken_at": NOW,
        }
        return Receipt(**fields | changes)

    return make


def test_receipts_arrive_with_the_heads_and_are_kept(partner: Partner, taken: Callable[..., Receipt]) -> None:
    partner.coordinator.receipts.append(seal(taken(), partner.coordinator.coordinator_key))
    swap(partner)
    swap(partner)
    [kept] = partner.store.receipts("run-1")
    assert Receipt.from_canonical(kept.bytes) == taken()
    assert [each.action for each, _ in partner.store.log_entries()].count("receipt:take") == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"node": "another"}, "not for this node"),
        ({"organisation": "another"}, "not for this node"),
        ({"run": "run-2"}, "not of the manifest"),
        ({"plan_digest": "0" * 64}, "not of the manifest"),
        ({"manifest_digest": "0" * 64}, "not of the manifest"),
        ({"dataset": "another"}, "another dataset"),
        ({"dataset_version": "0" * 64}, "another dataset"),
        ({"sent": "6" * 64}, "does not say it sent"),
        ({"round_number": 2}, "does not say it sent"),
        ({"attempt": 2}, "does not say it sent"),
        ({"kind": "evaluate"}, "does not say it sent"),
        ({"charge": "7" * 64}, "names another charge"),
    ],
)
def test_a_receipt_for_anything_else_is_refused_and_noted(
    partner: Partner, taken: Callable[..., Receipt], changes: dict[str, Any], why: str
) -> None:
    partner.coordinator.receipts.append(seal(taken(**changes), partner.coordinator.coordinator_key))
    swap(partner)
    assert partner.store.receipts() == []
    assert why in partner.store.refused()[-1].reason


def test_a_receipt_of_another_signer_is_refused(partner: Partner, taken: Callable[..., Receipt]) -> None:
    with (
        partner.home.ledger() as ledger,
        pytest.raises(DocumentRefusedError, match="lacks the signature"),
    ):
        take_receipt(
            partner.home,
            partner.store,
            ledger,
            seal(taken(), new_identity_key()),
            partner.coordinator.coordinator_key.public_key(),
        )


def test_receipts_survive_the_node_and_are_verified_without_it(partner: Partner, taken: Callable[..., Receipt]) -> None:
    partner.coordinator.receipts.append(seal(taken(), partner.coordinator.coordinator_key))
    swap(partner)
    leave = seal(Leave(node=NODE, reason="", issued_at=NOW), partner.home.identity_key())
    write_farewell(partner.home, partner.store, leave)
    file, root = partner.home.receipts, partner.home.config.root
    found = verify_farewell(file, root)
    assert (found["node"], found["receipts"]) == (NODE, 1)
    with pytest.raises(DocumentRefusedError, match="root key"):
        verify_farewell(file, "0" * 64)
    content = json.loads(file.read_text("utf-8"))
    for name in content:
        changed = json.loads(file.read_text("utf-8"))
        changed[name] = changed[name][:-1] if isinstance(changed[name], (str, list)) else {}
        if changed[name] == content[name]:
            continue
        file.write_text(json.dumps(changed), "utf-8")
        with pytest.raises(DocumentRefusedError):
            verify_farewell(file, root)
        file.write_text(json.dumps(content), "utf-8")
    assert content["federation"] == FEDERATION


# The log itself


def test_the_log_only_grows(partner: Partner) -> None:
    for statement in (
        "UPDATE audit SET actor = 'x' WHERE id = 1",
        "DELETE FROM audit WHERE id = 1",
        "DELETE FROM audit",
        "UPDATE audit_subtree SET hash = 'x'",
        "DELETE FROM audit_subtree",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="only grows"):
            partner.store._connection.execute(statement)


def test_a_stored_entry_that_was_altered_is_named(partner: Partner) -> None:
    connection = partner.store._connection
    connection.execute("DROP TRIGGER audit_no_UPDATE")
    connection.execute("UPDATE audit SET subject = 'another' WHERE id = 3")
    with pytest.raises(DocumentRefusedError, match="entry 3 was altered"):
        verify_log(exported(partner.home, partner.store))


def test_a_home_of_before_keeps_its_egress_in_the_new_log(tmp_path: Path) -> None:
    from concord_client.store import SCHEMA

    egress = (
        "CREATE TABLE egress (id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, receiver TEXT NOT NULL, "
        "kind TEXT NOT NULL, subject TEXT NOT NULL, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL)"
    )
    with sqlite3.connect(tmp_path / "node.db") as old:
        for statement in (*SCHEMA.split(";"), egress, "PRAGMA user_version=1"):
            old.execute(statement)
        old.execute(
            "INSERT INTO egress (at, receiver, kind, subject, bytes, sha256) VALUES (1.5,'f','reply','s',7,'d')"
        )
    old.close()
    with NodeStore(tmp_path / "node.db") as store:
        [left] = store.egress()
        assert (left.at, left.to, left.kind, left.subject, left.bytes, left.sha256) == (1.5, "f", "reply", "s", 7, "d")
        assert store.log_size() == 1
    NodeStore(tmp_path / "node.db").close()


APPENDING = """
import sys
from pathlib import Path
from concord_client.store import NodeStore
with NodeStore(Path(sys.argv[1])) as store:
    print("ready", flush=True)
    for number in range(100000):
        store.record("node", "test:happen", f"{sys.argv[2]}-{number}")
"""


def test_killed_while_appending_the_log_is_whole(partner: Partner) -> None:
    """Two processes append; each is killed in the middle, again and again."""
    for turn in range(2):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", APPENDING, str(partner.home.database), f"{turn}{name}"], stdout=subprocess.PIPE
            )
            for name in "ab"
        ]
        before = partner.store.log_size()
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        while partner.store.log_size() < before + 20:
            time.sleep(0.01)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    found = verify_log(exported(partner.home, partner.store))
    assert found.entries == partner.store.log_size() > 40
    subjects = [each.subject for each, _ in partner.store.log_entries() if each.action == "test:happen"]
    assert {each[0] for each in subjects} == {"0", "1"}
    for name in {each[:2] for each in subjects}:  # of each process all up to some number, in its order
        numbers = [int(each[3:]) for each in subjects if each.startswith(name)]
        assert numbers == list(range(len(numbers)))


def test_an_entry_that_cannot_be_written_undoes_what_it_tells_of(partner: Partner) -> None:
    partner.store._connection.execute("DROP TABLE audit_subtree")
    if partner.store.log_size() % 2 == 0:  # every second entry completes a subtree
        partner.store.pin_organisation("another", "k" * 20)
    with pytest.raises(ArtefactError):
        partner.store.pin_organisation("one-more", "k" * 20)
    known = partner.store.organisations_known()
    actions = [each.action for each, _ in partner.store.log_entries()]
    assert actions.count("organisation-key:pin") == known
