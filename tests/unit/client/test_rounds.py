"""The round guard: an offer per attack, each refused by name; and what a node does with an honest one."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Message

from concord_client.exposition import Counts
from concord_client.guard import Permit, RoundGuard, RoundRefusedError
from concord_client.rounds import Rounds, what_to_say
from concord_client.training_job import NodeStoppingError, TrainingFailedError
from concord_shared.documents import Participant
from concord_shared.errors import ConcordError, DataError, DocumentRefusedError
from concord_shared.signed_rounds import verify_reply

from .rounds_kit import DIGEST, HOUR_S, NODE, NODES, Scripted, Site, bytes_of_reply, copied, make_site, organisation_of


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = make_site(tmp_path)
    yield made
    made.store.close()


def passed(site: Site, message: Message) -> Permit:
    return RoundGuard(site.home, site.store).check(message)


def refused(site: Site, message: Message, check: str, words: str) -> None:
    with pytest.raises(RoundRefusedError, match=words) as caught:
        passed(site, message)
    assert caught.value.check == check


def rounds(site: Site, responder: Scripted | None = None, **changes: Any) -> Rounds:
    return Rounds(site.home, site.store, responder or Scripted(), Counts(), **changes)


def declined(reply: Message, words: str) -> None:
    assert reply.has_error()
    assert words in str(reply.error.reason)


class TestHonestOffer:
    def test_it_passes_with_all_that_it_rests_on(self, site: Site) -> None:
        permit = passed(site, site.message())
        assert permit.plan == site.plan
        assert permit.dataset.spec == f"npz:{site.data}"
        assert permit.manifest.run == "run-1"
        assert permit.approval.rows == 480

    @pytest.mark.parametrize("kind", ["train", "evaluate"])
    def test_its_answer_is_signed_logged_and_kept(self, site: Site, kind: str) -> None:
        work = rounds(site)
        reply = work.answer(site.message(kind=kind))
        verify_reply(reply, site.home.identity_key().public_key())
        [egress] = site.store.egress()
        assert (egress.kind, egress.to) == ("reply", "127.0.0.1:2")
        assert egress.subject == f"run-1/{kind}/1/1/{NODE}"
        assert egress.bytes > 0
        assert site.store.has_answered("run-1", kind, 1, 1)
        assert work.counts.registry.get_sample_value("concord_node_rounds_answered_total", {"kind": kind}) == 1

    def test_an_offer_that_overtook_its_manifest_waits_for_it(self, tmp_path: Path) -> None:
        site = make_site(tmp_path)
        message = site.message(run="run-2")
        pauses: list[float] = []

        def arrives(pause_s: float) -> bool:
            pauses.append(pause_s)
            if len(pauses) == 3:
                site.start("run-2")
            return False

        assert not rounds(site, lacking=arrives).answer(message).has_error()
        assert len(pauses) == 3
        site.store.close()

    def test_the_responder_gets_what_was_approved(self, site: Site) -> None:
        site.change_policy('device = "auto"', 'device = "cpu"')
        site.change_policy("threads = 0", "threads = 3")
        responder = Scripted()
        rounds(site, responder).answer(site.message())
        [job] = responder.jobs
        assert (job.resources.device, job.resources.threads, job.resources.memory_mb) == ("cpu", 3, None)
        assert (job.spec, job.node, job.rows) == (f"npz:{site.data}", NODE, 480)
        assert job.states == site.home.states / "run-1"
        assert job.until <= time.time() + HOUR_S


class TestRefusesForgeries:
    def test_unsigned(self, site: Site) -> None:
        message = site.message()
        del message.content["signature"]
        refused(site, message, "unsigned", "not signed")

    def test_signed_by_another_key(self, site: Site) -> None:
        refused(site, site.message(Ed25519PrivateKey.generate()), "unsigned", "signature of the offer is wrong")

    def test_signed_by_the_organisation_instead_of_the_coordinator(self, site: Site) -> None:
        refused(site, site.message(site.organisation), "unsigned", "signature of the offer is wrong")

    @pytest.mark.parametrize(
        ("field", "value"), [("attempt", 9), ("round_number", 2), ("nodes_max", 2), ("node", "node-2"), ("run", "x")]
    )
    def test_a_field_changed_after_signing(self, site: Site, field: str, value: Any) -> None:
        message = site.message()
        message.content.config_records["offer"][field] = value
        refused(site, message, "unsigned", "signature of the offer is wrong")

    def test_an_offer_with_a_field_that_this_version_does_not_know(self, site: Site) -> None:
        from concord_shared.signed_rounds import sign_offer

        message = site.message()
        message.content.config_records["offer"]["run_this"] = "rm -rf"
        sign_offer(message, site.coordinator)
        refused(site, message, "malformed", "no offer of this version")

    def test_a_message_without_content(self, site: Site) -> None:
        from concord_shared.messages import decline

        refused(site, decline(site.message(), "nothing"), "malformed", "no content")

    def test_no_roster(self, site: Site) -> None:
        site.store.set_fact("roster", "7")
        refused(site, site.message(), "unsigned", "no roster")


class TestRefusesForeign:
    def test_offer_of_another_node(self, site: Site) -> None:
        refused(site, site.message(node="node-2"), "foreign", "for node 'node-2'")

    def test_run_without_manifest(self, site: Site) -> None:
        refused(site, site.message(run="run-9"), "manifest", "no manifest of run 'run-9'")

    def test_another_plan_than_the_manifests(self, site: Site) -> None:
        refused(site, site.message(plan_digest=DIGEST), "plan", "asks for plan 000000")

    def test_a_manifest_of_a_plan_that_is_not_held(self, site: Site) -> None:
        site.start("run-2", plan_digest=DIGEST)
        refused(site, site.message(run="run-2", plan_digest=DIGEST), "plan", "holds no plan")

    def test_hostile_plan_that_names_own_model(self, tmp_path: Path) -> None:
        """Even with everything signed and approved: nothing is imported, nothing is read."""
        site = make_site(tmp_path)
        document = site.plan.document()
        code = tmp_path / "evil.py"
        code.write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\ndef model(): ...\n")
        document["model"] = {"name": "own", "source": f"{code}:model", "sha256": DIGEST}
        from concord_shared.plan.schema import parse_plan_document

        site.plan = parse_plan_document(document)
        site.store.put("plan", site.plan.digest, site.plan.document())
        site.approve()
        site.start("run-2")
        refused(site, site.message(run="run-2"), "plan", "only models that it has installed")
        responder = Scripted()
        declined(rounds(site, responder).answer(site.message(run="run-2")), "only models that it has installed")
        assert not responder.jobs
        assert not (tmp_path / "pwned").exists()
        site.store.close()

    def test_statistics_that_the_plan_does_not_ask_for(self, site: Site) -> None:
        refused(site, site.message(kind="statistics"), "plan", "no statistics")

    @pytest.mark.parametrize("number", [0, 4])
    def test_a_round_that_the_plan_does_not_have(self, site: Site, number: int) -> None:
        refused(site, site.message(round_number=number), "plan", "no train round")


class TestRefusesManifest:
    @pytest.mark.parametrize("shift_s", [2 * HOUR_S, -2 * HOUR_S])
    def test_before_and_after_its_time(self, site: Site, shift_s: int) -> None:
        now = int(time.time()) + shift_s
        site.start("run-2", not_before=now, not_after=now + 60)
        refused(site, site.message(run="run-2"), "manifest", "outside the time")

    def test_without_this_node(self, site: Site) -> None:
        others = tuple(each for each in site.start("run-2").participants if each.node != NODE)
        site.start("run-2", participants=others)
        refused(site, site.message(run="run-2", nodes_max=2), "manifest", "does not name this node")

    def test_with_nodes_that_nobody_knows(self, site: Site) -> None:
        """A cohort made of inventions would leave this node's update alone in the sum."""
        invented = Participant(node="node-9", organisation="hospital-b", dataset="digits", dataset_version=DIGEST)
        site.start("run-2", participants=(*site.start("run-2").participants, invented))
        refused(site, site.message(run="run-2"), "manifest", "unknown to the roster: node-9")

    def test_with_one_node_twice(self, site: Site) -> None:
        twice = site.start("run-2").participants
        site.start("run-2", participants=(*twice, twice[-1]))
        refused(site, site.message(run="run-2"), "manifest", "twice or unknown")

    def test_of_an_organisation_outside_of_the_study(self, site: Site) -> None:
        site.start("run-2", organisation="insurer")
        refused(site, site.message(run="run-2"), "manifest", "insurer is no member")

    def test_for_another_version_of_the_dataset(self, site: Site) -> None:
        participants = tuple(
            Participant(node=name, organisation=organisation_of(name), dataset="digits", dataset_version=DIGEST)
            for name in NODES
        )
        site.start("run-2", participants=participants)
        refused(site, site.message(run="run-2"), "dataset", "no dataset digits of the run's version")


class TestRefusesAgreement:
    def test_expired(self, site: Site) -> None:
        site.agree(not_after=int(time.time()) - 1)
        refused(site, site.message(), "agreement", "no agreement lets study")

    def test_withdrawn(self, site: Site) -> None:
        agreement = site.store.agreement("agreement-1")
        assert agreement is not None
        site.put("agreement", "agreement-1", agreement, "withdrawn")
        refused(site, site.message(), "agreement", "no agreement lets study")

    def test_of_another_version_of_the_study(self, site: Site) -> None:
        site.put("study", site.study.study, site.study.model_copy(update={"purpose": "something else"}))
        refused(site, site.message(), "agreement", "no agreement lets study")

    def test_a_cohort_below_the_agreed_minimum(self, site: Site) -> None:
        site.agree(minimum_cohort=3)
        refused(site, site.message(nodes_max=2), "agreement", "cohort of 2 is below the 3 agreed")

    def test_a_cohort_larger_than_the_manifest(self, site: Site) -> None:
        refused(site, site.message(nodes_max=50), "agreement", "speaks of 50 nodes")

    def test_more_rounds_than_agreed(self, site: Site) -> None:
        site.agree(rounds_max=2)
        refused(site, site.message(), "policy", "3 rounds: the agreement allows 2")

    def test_a_model_that_was_not_agreed(self, site: Site) -> None:
        site.agree(models=("seed-cnn",))
        refused(site, site.message(), "policy", "the agreement allows seed-cnn")


class TestRefusesApproval:
    def test_none(self, site: Site) -> None:
        from concord_shared.plan.schema import parse_plan_document

        site.plan = parse_plan_document(site.plan.document() | {"name": "another"})
        site.store.put("plan", site.plan.digest, site.plan.document())
        site.start("run-2")
        refused(site, site.message(run="run-2"), "approval", "was never decided here")

    @pytest.mark.parametrize("decision", ["rejected", "withdrawn"])
    def test_no(self, site: Site, decision: str) -> None:
        site.approve(decision=decision)
        refused(site, site.message(), "approval", f"was {decision}")

    def test_expired(self, site: Site) -> None:
        site.approve(not_after=int(time.time()) - 1)
        refused(site, site.message(), "approval", "has expired")

    def test_of_another_version_of_the_dataset(self, site: Site) -> None:
        site.approve(dataset_version=DIGEST)
        refused(site, site.message(), "approval", "approved in another version")

    def test_the_marker_alone_is_enough(self, site: Site) -> None:
        """A withdrawal is a file first: it holds even if the database was not written any more."""
        site.job().marker.touch()
        refused(site, site.message(), "approval", "approval withdrawn")

    def test_withdrawn_while_the_work_went_on(self, site: Site) -> None:
        """What was computed does not leave."""
        reply = rounds(site, Scripted(lambda: site.approve(decision="withdrawn"))).answer(site.message())
        declined(reply, "approval withdrawn")
        assert [each.kind for each in site.store.egress()] == ["decline"]
        assert not site.store.has_answered("run-1", "train", 1, 1)

    def test_withdrawn_before_a_kept_answer_is_asked_again(self, site: Site) -> None:
        work, message = rounds(site), site.message()
        assert not work.answer(message).has_error()
        site.approve(decision="withdrawn")
        declined(work.answer(copied(message)), "was withdrawn")


class TestRefusesByPolicy:
    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("models = []", 'models = ["seed-cnn"]', "model logistic-regression"),
            ("rounds_max = 1000", "rounds_max = 2", "3 rounds"),
            ("deterministic = true", "deterministic = false", "deterministic"),
            ("minimum_cohort = 2", "minimum_cohort = 4", "at least 4"),
        ],
    )
    def test_a_rule_that_the_owner_changed_after_the_approval(self, site: Site, old: str, new: str, words: str) -> None:
        passed(site, site.message())
        site.change_policy(old, new)
        refused(site, site.message(), "policy", words)

    def test_a_cohort_below_the_owners(self, site: Site) -> None:
        site.change_policy("minimum_cohort = 2", "minimum_cohort = 3")
        refused(site, site.message(nodes_max=2), "policy", "cohort of 2 is below the 3")

    def test_outside_of_working_hours(self, site: Site) -> None:
        now = time.localtime()
        begin, end = (now.tm_hour + 2) % 24, (now.tm_hour + 3) % 24
        site.change_policy('working_hours = ""', f'working_hours = "{begin:02d}:00-{end:02d}:00"')
        refused(site, site.message(), "policy", "working hours")

    def test_a_policy_that_cannot_be_read_allows_nothing(self, site: Site) -> None:
        site.home.policy_file.write_text("models = [")
        refused(site, site.message(), "policy", "cannot be read")


class TestRefusesData:
    def test_dataset_file_changed(self, site: Site) -> None:
        with np.load(site.data) as arrays:
            x, y = arrays["x"].copy(), arrays["y"]
        x[0] = 0
        np.savez(site.data, x=x, y=y)
        refused(site, site.message(), "dataset", "changed since it was registered")

    def test_dataset_file_gone(self, site: Site) -> None:
        site.data.unlink()
        refused(site, site.message(), "dataset", "changed since it was registered")

    def test_the_same_file_touched_is_the_same(self, site: Site) -> None:
        os.utime(site.data, (1, 1))
        passed(site, site.message())

    def test_no_path_leaves_with_a_refusal(self, site: Site) -> None:
        site.data.unlink()
        reply = rounds(site).answer(site.message())
        assert str(site.data) not in str(reply.error.reason)
        assert str(site.home.path) not in str(reply.error.reason)


class TestRefusesReplays:
    def test_replayed_offer_of_an_earlier_round(self, site: Site) -> None:
        work, old = rounds(site), site.message(round_number=1)
        work.answer(old)
        work.answer(site.message(round_number=2))
        declined(work.answer(copied(old)), "older than what was answered")

    def test_replayed_offer_of_an_earlier_attempt(self, site: Site) -> None:
        work = rounds(site)
        work.answer(site.message(attempt=2))
        declined(work.answer(site.message(round_number=2, attempt=1)), "older than what was answered")

    def test_another_offer_for_the_step_that_was_answered(self, site: Site) -> None:
        """A second model for one round and attempt would open two updates from one."""
        work = rounds(site)
        work.answer(site.message())
        other = site.theta + np.float32(1)
        declined(work.answer(site.message(theta=other, model_digest=DIGEST)), "answered already, to another offer")

    def test_a_newer_attempt_of_the_same_round_is_no_replay(self, site: Site) -> None:
        responder = Scripted()
        work = rounds(site, responder)
        work.answer(site.message(attempt=1))
        assert not work.answer(site.message(attempt=2)).has_error()
        assert len(responder.jobs) == 2

    @pytest.mark.parametrize("where", ["record", "node"])
    def test_noise_is_drawn_once_a_round_whatever_the_attempt(self, tmp_path: Path, where: str) -> None:
        """Two draws over one training would cost the privacy of two rounds."""
        dp = f"privacy={{mode='plain', dp={{unit='{where}', epsilon=3.0, delta=1e-5, clip=10.0}}}}"
        site = make_site(tmp_path, dp)
        responder = Scripted()
        work = rounds(site, responder)
        first = work.answer(site.message(attempt=1))
        again = rounds(site, responder).answer(site.message(attempt=2))  # of a node that was started anew
        verify_reply(again, site.home.identity_key().public_key())
        assert len(responder.jobs) == 1
        assert bytes_of_reply(again)[1] == bytes_of_reply(first)[1]
        assert again.content.config_records["binding"]["attempt"] == 2
        assert not work.answer(site.message(round_number=2, attempt=2)).has_error()
        assert len(responder.jobs) == 2
        site.store.close()

    @pytest.mark.parametrize("damage", ["gone", "changed"])
    def test_noise_that_was_sent_and_lost_is_not_drawn_again(self, tmp_path: Path, damage: str) -> None:
        site = make_site(tmp_path, "privacy={mode='plain', dp={unit='record', epsilon=3.0, delta=1e-5, clip=1.0}}")
        responder = Scripted()
        work = rounds(site, responder)
        work.answer(site.message(attempt=1))
        kept = site.home.states / "run-1" / "reply"
        if damage == "gone":
            kept.unlink()
        else:
            kept.write_bytes(kept.read_bytes()[:-1] + b"x")
        declined(work.answer(site.message(attempt=2)), "its noise is never drawn twice")
        assert len(responder.jobs) == 1
        site.store.close()

    def test_the_order_of_a_run(self, site: Site) -> None:
        """train 1, evaluate 1, train 2, …; each only forwards."""
        work = rounds(site)
        first = [site.message(kind=kind, round_number=n) for n in (1, 2) for kind in ("train", "evaluate")]
        assert not any(work.answer(message).has_error() for message in first)
        for message in first[:-1]:
            declined(work.answer(copied(message)), "older than what was answered")

    def test_another_run_has_its_own_order(self, site: Site) -> None:
        work = rounds(site)
        work.answer(site.message(round_number=3))
        site.start("run-2")
        assert not work.answer(site.message(run="run-2")).has_error()


class TestSameOfferAgain:
    def test_a_lost_reply_is_sent_again_and_not_trained_again(self, site: Site) -> None:
        responder = Scripted()
        work, message = rounds(site, responder), site.message()
        first, again = work.answer(message), work.answer(copied(message))
        assert bytes_of_reply(first) == bytes_of_reply(again)
        assert len(responder.jobs) == 1
        assert [each.sha256 for each in site.store.egress()] == 2 * [site.store.egress()[0].sha256]

    def test_also_after_the_node_was_killed(self, site: Site) -> None:
        message, responder = site.message(), Scripted()
        first = rounds(site).answer(message)
        with site.home.store() as store:
            again = Rounds(site.home, store, responder, Counts()).answer(copied(message))
        assert bytes_of_reply(first) == bytes_of_reply(again)
        assert not responder.jobs

    def test_a_damaged_copy_is_computed_anew(self, site: Site) -> None:
        responder = Scripted()
        work, message = rounds(site, responder), site.message()
        work.answer(message)
        kept = site.home.states / "run-1" / "reply"
        data = bytearray(kept.read_bytes())
        data[-1] ^= 1
        kept.write_bytes(data)
        assert not work.answer(copied(message)).has_error()
        assert len(responder.jobs) == 2

    def test_what_was_kept_of_ended_runs_is_tidied_away(self, site: Site) -> None:
        work = rounds(site)
        work.answer(site.message())
        work.tidy()
        assert (site.home.states / "run-1" / "reply").exists()
        site.store.put("run", "run-1", {"run": "run-1", "state": "succeeded", "reason": ""}, "succeeded")
        work.tidy()
        assert not (site.home.states / "run-1").exists()


class TestWhatIsSaid:
    """Nothing that a decline says can name a path or a value of a row."""

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (DataError("/data/patients.csv: column age: 3 values are missing"), "DataError: this node's data"),
            (ValueError("could not convert 'Müller'"), "unexpected ValueError; the node's own log"),
            (DocumentRefusedError("/x"), "DocumentRefusedError: this node's data"),
            (TrainingFailedError("took longer than 60 s", "/x"), "TrainingFailedError: took longer than 60 s"),
        ],
    )
    def test_by_error(self, site: Site, error: Exception, said: str) -> None:
        def fail() -> None:
            raise error

        reply = rounds(site, Scripted(fail)).answer(site.message())
        assert str(reply.error.reason).startswith(said)
        assert "/" not in what_to_say(error)

    def test_a_stopping_node_says_nothing(self, site: Site) -> None:
        """It is asked again when it is back."""

        def stop() -> None:
            raise NodeStoppingError("stopping")

        with pytest.raises(NodeStoppingError):
            rounds(site, Scripted(stop)).answer(site.message())
        assert not site.store.egress()

    def test_a_failure_can_be_tried_again(self, site: Site) -> None:
        fails: list[ConcordError] = [TrainingFailedError("died")]

        def fail_once() -> None:
            if fails:
                raise fails.pop()

        work, message = rounds(site, Scripted(fail_once)), site.message()
        assert work.answer(message).has_error()
        assert not work.answer(copied(message)).has_error()


def test_refusals_are_counted_by_check(site: Site) -> None:
    work = rounds(site)
    work.answer(site.message(run="run-9"))
    work.answer(site.message(node="node-2"))
    for check in ("manifest", "foreign"):
        assert work.counts.registry.get_sample_value("concord_node_rounds_refused_total", {"reason": check}) == 1


def test_what_reaches_the_child_is_only_what_was_signed(site: Site) -> None:
    """A record that nobody asked for is refused with the whole message, because it breaks the signature."""
    message = site.message()
    message.content["extra"] = ConfigRecord({"run": "rm"})
    refused(site, message, "unsigned", "signature of the offer is wrong")


def test_an_answer_is_never_sent_if_it_cannot_be_logged(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from concord_shared.errors import ArtefactError

    def full(*_: Any, **__: Any) -> None:
        raise ArtefactError("the disk is full")

    monkeypatch.setattr(site.store, "log_egress", full)
    with pytest.raises(ArtefactError):
        rounds(site).answer(site.message())


Make = Callable[[], Site]


def test_a_facts_text_is_json(site: Site) -> None:
    rounds(site).answer(site.message())
    assert json.loads(site.store.fact("answered/run-1") or "")[:2] == [1, [1, 0, 0]]
