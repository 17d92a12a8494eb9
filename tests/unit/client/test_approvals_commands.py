"""The node's commands, as a person types them."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from concord_shared.canonical import canonical_bytes
from concord_shared.documents import Approval, Leave
from concord_shared.errors import ConcordError, ConflictError, UnreachableError, UsageError
from concord_shared.signing import (
    Envelope,
    fingerprint,
    new_identity_key,
    open_envelope,
    read_public_text,
    seal,
    verify_bytes,
)
from unit.client.fake_coordinator import NOW, REQUESTER, Partner, partner_in, use_commands_at
from unit.client.node_cli import run, run_json


@pytest.fixture
def partner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Partner]:
    """Its commands reach the fake coordinator, at the fake coordinator's time."""
    made = partner_in(tmp_path)
    made.ask()
    use_commands_at(made, monkeypatch)
    yield made
    made.store.close()


def asked(partner: Partner) -> str:
    (request,) = run_json("approvals", "list", "--pending")["requests"]
    return str(request["id"])


def test_what_is_asked_is_listed_and_shown(partner: Partner) -> None:
    id = asked(partner)
    assert id in run("approvals", "list")
    shown = run("approvals", "show", id)
    for part in (
        "charite",
        "to know hearts better",
        "patients",
        "logistic-regression",
        "Leaves this machine",
        "pending",
    ):
        assert part in shown


def test_words_of_others_cannot_steer_a_terminal(partner: Partner) -> None:
    hostile = partner.study(purpose="good\x1b[2K\x1b[1Aevil\u202ekcab", issued_at=NOW + 1)
    partner.apply("study", seal(hostile, partner.key(REQUESTER)))
    id = run_json("approvals", "list")["requests"][0]["id"]
    assert all(line.isprintable() for line in run("approvals", "show", id).splitlines())


def test_approve_asks_and_says_what_will_be_used(partner: Partner) -> None:
    id = asked(partner)
    with pytest.raises(UsageError, match="--yes"):
        run("approvals", "approve", id, stdin="")
    assert partner.store.approvals() == []
    told = run_json("approvals", "approve", id, "--yes", "--reason", "good")
    assert (told["decision"], told["rows"], told["evaluation_rows"], told["delivery"]) == ("approved", 16, 4, "sent")
    received = partner.coordinator.received["approvals"]
    approval = open_envelope(
        Envelope.model_validate_json(json.dumps(received[-1])), Approval, [partner.home.identity_key().public_key()]
    )
    assert approval.reason == "good"


def test_decisions_hold_with_the_coordinator_down_and_are_sent_later(partner: Partner) -> None:
    def down(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    id = asked(partner)
    partner.coordinator.overrides["/api/node/approvals"] = down
    assert "kept to be sent later" in run_json("approvals", "approve", id, "--yes")["delivery"]
    assert "kept to be sent later" in run_json("approvals", "withdraw", id)["delivery"]
    assert partner.home.withdrawn_marker("heart", partner.plan.digest, "patients").exists()
    partner.coordinator.overrides.clear()
    assert run_json("approvals", "reject", id, "--yes")["delivery"] == "sent"
    sent = [
        Approval.from_canonical(Envelope.model_validate_json(json.dumps(body)).bytes).decision
        for body in partner.coordinator.received["approvals"]
    ]
    assert sent == ["approved", "withdrawn", "rejected"]


def test_approve_of_what_the_policy_forbids_says_why(partner: Partner) -> None:
    partner.home.policy_file.write_text("rounds_max = 1\n", "utf-8")
    with pytest.raises(ConcordError, match="3 rounds: the policy allows 1"):
        run("approvals", "approve", asked(partner), "--yes")


def test_refused_documents_are_listed_with_their_reason(partner: Partner) -> None:
    partner.refused("plan", {"nonsense": 1})
    assert "expected the fields study" in run("approvals", "list")


def test_data_is_added_published_shown_and_removed(partner: Partner, tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("x,y\n1,2\n", "utf-8")
    added = run_json("data", "add", "b", f"csv:{tmp_path / 'b.csv'}", "--title", "B")
    assert (added["rows"], added["columns"], added["published"], added["card"]) == (1, ["x", "y"], False, "")
    assert "cards" not in partner.coordinator.received
    assert run_json("data", "publish", "b", "--yes")["card"] == "sent"
    assert len(partner.coordinator.received["cards"]) == 1
    assert [each["name"] for each in run_json("data", "list")["datasets"]] == ["b", "patients"]
    assert run_json("data", "show", "b")["files"] == "as registered"
    (tmp_path / "b.csv").write_text("x,y\n1,3\n", "utf-8")
    assert "--replace" in run_json("data", "show", "b")["files"]
    assert run_json("data", "remove", "b", "--yes")["withdrawn"] == 0
    assert "patients" in run("data", "list")
    with pytest.raises(UsageError, match="no dataset b"):
        run("data", "show", "b")


def test_removing_a_dataset_withdraws_its_approvals(partner: Partner) -> None:
    run("approvals", "approve", asked(partner), "--yes")
    assert run_json("data", "remove", "patients", "--yes")["withdrawn"] == 1
    assert partner.store.current_approval("heart", partner.plan.digest, "patients", NOW) is None


def test_policy_is_shown_and_checked(partner: Partner) -> None:
    assert "every plan needs a person" in run("policy", "show").lower()
    assert run_json("policy", "check")["valid"]
    partner.home.policy_file.write_text("rounds_max = 2\n", "utf-8")
    told = run("policy", "check", "digits-cnn", code=1)
    assert "not allowed" in told
    assert "No differential privacy is promised" in told
    assert "Not covered" in run("policy", "check", "mnist-dp", code=1)


def test_policy_edit_keeps_the_rules_where_the_new_ones_are_wrong(
    partner: Partner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("click.edit", lambda text, **_: "rounds_maxx = 2\n")
    with pytest.raises(UsageError, match="stand as they were"):
        run("policy", "edit")
    assert "rounds_max = 1000" in partner.home.policy_file.read_text("utf-8")
    monkeypatch.setattr("click.edit", lambda text, **_: text.replace("rounds_maxx", "rounds_max"))  # the draft
    run("policy", "edit")
    assert partner.home.policy_file.read_text("utf-8") == "rounds_max = 2\n"


def test_egress_lists_what_left(partner: Partner) -> None:
    run("data", "publish", "patients", "--yes")
    entries = run_json("egress")["egress"]
    assert [entry["kind"] for entry in entries] == ["enrolment", "card"]
    assert "fed.example" in run("egress", "--limit", "1")


def test_changed_key_of_an_organisation_is_confirmed_by_its_fingerprint(partner: Partner) -> None:
    new = new_identity_key()
    partner.coordinator.keys[REQUESTER] = new
    partner.apply("roster", seal(partner.coordinator.roster(version=2), partner.coordinator.membership.key))
    assert "trust-organisation charite" in run("approvals", "list")
    print_of = fingerprint(new.public_key())
    groups = [print_of[start : start + 4] for start in range(0, 64, 4)]
    assert "is trusted" in run("trust-organisation", REQUESTER, *groups)
    assert "trust-organisation" not in run("approvals", "list")


def test_leave_erases_everything_but_signed_receipts(partner: Partner) -> None:
    run("approvals", "approve", asked(partner), "--yes")
    identity = partner.home.identity_key().public_key()
    (partner.home.models / "x").mkdir()
    partner.store.close()
    told = run_json("leave", "--yes", "--reason", "over")
    assert told["coordinator_told"] is True
    assert [path.name for path in partner.home.path.iterdir()] == ["receipts.json"]
    receipts = json.loads(partner.home.receipts.read_text("utf-8"))
    signature = base64.b64decode(receipts.pop("signature"))
    assert read_public_text(receipts["identity_key"]) == identity
    verify_bytes(identity, signature, b"concord/receipts/1\0" + canonical_bytes(receipts))
    farewell = open_envelope(Envelope.model_validate_json(json.dumps(receipts["leave"])), Leave, [identity])
    assert (farewell.node, farewell.reason) == ("acme-1", "over")
    assert [entry["kind"] for entry in receipts["egress"]] == ["enrolment", "approval", "approval", "leave"]
    assert len(receipts["approvals"]) == 2  # the yes, and its withdrawal


def test_leave_without_a_coordinator_erases_nothing_unless_told_to(partner: Partner) -> None:
    def down(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    partner.coordinator.overrides["/api/node/leave"] = down
    with pytest.raises(UnreachableError, match="--offline"):
        run("leave", "--yes")
    assert partner.home.is_enrolled
    partner.store.close()
    assert run_json("leave", "--yes", "--offline")["coordinator_told"] is False
    assert [path.name for path in partner.home.path.iterdir()] == ["receipts.json"]


def test_withdraw_of_what_was_never_approved_is_said(partner: Partner) -> None:
    with pytest.raises(ConflictError, match="no approval to withdraw"):
        run("approvals", "withdraw", asked(partner))
