"""Masked steps at a partner's node: who takes part is the signed manifest's word, whose keys they are the owner's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from concord_client.exposition import Counts
from concord_client.masked_rounds import MaskedRounds, trust_peer
from concord_client.masked_step import Journal
from concord_client.rounds import Rounds
from concord_shared.errors import MaskingRefusedError, UsageError
from concord_shared.masking.tables import read_table
from concord_shared.signing import fingerprint, public_text, read_public_text
from unit.client.rounds_kit import DIGEST, NODE, Scripted, Site, make_site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = make_site(tmp_path, "privacy.mode=private")
    yield made
    made.store.close()


def rounds(site: Site, responder: Scripted | None = None) -> Rounds:
    return Rounds(site.home, site.store, responder or Scripted(), Counts())


def keys_offer(site: Site, **changes: Any) -> Message:
    return site.message(**{"stage": "keys", **changes})


def reason(reply: Message) -> str:
    assert reply.has_error(), "was answered"
    return str(reply.error.reason)


def replace_key(site: Site, node: str) -> str:
    """A new roster, signed as any other, in which `node` has another identity key; its fingerprint."""
    roster = site.store.roster()
    assert roster is not None
    other = Ed25519PrivateKey.generate().public_key()
    rows = tuple(
        row.model_copy(update={"identity_key": public_text(other)}) if row.name == node else row for row in roster.nodes
    )
    changed = roster.model_copy(update={"version": roster.version + 1, "nodes": rows})
    site.put("roster", str(changed.version), changed)
    site.store.set_fact("roster", str(changed.version))
    return fingerprint(other)


class TestTheFirstStage:
    def test_brings_this_nodes_keys_and_begins_to_train(self, site: Site) -> None:
        responder = Scripted()
        reply = rounds(site, responder).answer(keys_offer(site))
        adverts = read_table(reply.content.config_records, "adverts")
        assert list(adverts) == [0]
        assert not reply.content.array_records
        assert len(responder.jobs) == 1

    def test_the_same_offer_again_gets_the_same_keys(self, site: Site) -> None:
        work, message = rounds(site), keys_offer(site)
        first, second = (work.answer(message).content.config_records["masking.adverts"] for _ in range(2))
        assert first == second

    def test_a_plain_offer_for_a_masked_plan_is_refused(self, site: Site) -> None:
        assert "asks for the stage ''" in reason(rounds(site).answer(site.message()))

    @pytest.mark.parametrize("stage", ["shares", "masked", "consent", "open"])
    def test_no_stage_comes_before_it(self, site: Site, stage: str) -> None:
        assert "holds no keys for this step" in reason(rounds(site).answer(site.message(stage=stage)))

    def test_a_smaller_cohort_than_the_manifests(self, site: Site) -> None:
        assert "the manifest's cohort are node-1, node-2, node-3" in reason(
            rounds(site).answer(keys_offer(site, nodes_max=2))
        )


class TestAttempts:
    def test_the_update_is_not_made_again(self, site: Site) -> None:
        responder = Scripted()
        work = rounds(site, responder)
        assert not work.answer(keys_offer(site)).has_error()
        assert not work.answer(keys_offer(site, attempt=2)).has_error()
        assert len(responder.jobs) == 1

    def test_another_model_is_refused_and_not_trained_on(self, site: Site) -> None:
        responder = Scripted()
        work = rounds(site, responder)
        work.answer(keys_offer(site))
        assert "another model" in reason(work.answer(keys_offer(site, attempt=2, model_digest=DIGEST)))
        assert len(responder.jobs) == 1

    def test_a_plain_step_too_is_about_one_model(self, tmp_path: Path) -> None:
        """Else one approval answers any number of questions: 1,024 bins of scores for each model of their choice."""
        site = make_site(tmp_path)
        work = rounds(site)
        for kind in ("train", "evaluate"):
            assert not work.answer(site.message(kind=kind)).has_error()
            for changes in ({"model_digest": DIGEST}, {"rows_max": 1 << 40}, {"preprocessing": "{}"}):
                assert "another model" in reason(work.answer(site.message(kind=kind, attempt=2, **changes)))
        site.store.close()

    def test_what_was_opened_is_never_joined_again_also_after_a_restart(self, site: Site) -> None:
        permit = keys_offer(site)
        work = rounds(site)
        work.answer(permit)
        live = work._masked._live["run-1"]
        Journal(site.store).close(live.step.attempt)
        again = rounds(site)
        assert "opened this step already" in reason(again.answer(keys_offer(site, attempt=2)))

    def test_a_killed_node_holds_no_keys(self, site: Site) -> None:
        rounds(site).answer(keys_offer(site))
        assert "holds no keys" in reason(rounds(site).answer(site.message(stage="shares")))


class TestPeers:
    def test_a_key_that_changed_is_refused_until_a_person_confirms_it(self, site: Site) -> None:
        """The online membership key alone cannot put the coordinator in the place of a peer that this node has met."""
        work = rounds(site)
        assert not work.answer(keys_offer(site)).has_error()
        changed = replace_key(site, "node-2")
        words = reason(work.answer(keys_offer(site, attempt=2)))
        assert f"concord-node trust-node node-2 {changed}" in words
        with pytest.raises(UsageError, match="you gave another"):
            trust_peer(site.store, "node-2", DIGEST)
        trust_peer(site.store, "node-2", changed.upper())
        assert "other nodes" in reason(work.answer(keys_offer(site, attempt=3)))  # not within this step any more
        assert not work.answer(keys_offer(site, attempt=3, round_number=2)).has_error()

    def test_pins_count_by_fingerprint(self, site: Site) -> None:
        roster = site.store.roster()
        assert roster is not None
        keys = {row.name: fingerprint(read_public_text(row.identity_key)) for row in roster.nodes}
        site.change_policy("pinned = []", f'pinned = ["node-2:{keys["node-2"]}", "node-3:{DIGEST}"]')
        assert "fewer than 3 of the nodes" in reason(rounds(site).answer(keys_offer(site)))
        site.change_policy(DIGEST, keys["node-3"])
        assert not rounds(site).answer(keys_offer(site)).has_error()

    def test_trusting_needs_a_node_of_the_roster(self, site: Site) -> None:
        with pytest.raises(UsageError, match="no node node-9"):
            trust_peer(site.store, "node-9", DIGEST)


class TestPolicy:
    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("minimum_cohort = 3 ", "minimum_cohort = 4 ", "sums of 3 updates: the policy asks for at least 4"),
            ("collusion = 0 ", "collusion = 1 ", "safe against 0 nodes"),
            (
                'modes = ["plain", "private", "robust"]',
                'modes = ["plain"]',
                "privacy.mode private: the policy allows plain",
            ),
        ],
    )
    def test_is_the_owners_and_holds(self, site: Site, old: str, new: str, words: str) -> None:
        site.change_policy(old, new)
        assert words in reason(rounds(site).answer(keys_offer(site)))

    def test_an_owner_may_refuse_plain_plans(self, tmp_path: Path) -> None:
        site = make_site(tmp_path)
        site.change_policy('modes = ["plain", "private", "robust"]', 'modes = ["private"]')
        assert "privacy.mode plain: the policy allows private" in reason(rounds(site).answer(site.message()))
        site.store.close()


def test_training_that_failed_leaves_nothing_to_mask(site: Site) -> None:
    masked = MaskedRounds(site.store, NODE, site.home.identity_key())
    with pytest.raises(MaskingRefusedError, match="holds no keys"):
        masked.answer(
            site.message(stage="masked"),
            site.offer(stage="masked"),
            site.plan,
            site.start("run-9"),
            None,  # type: ignore[arg-type]
            lambda: pytest.fail("nothing is trained"),
        )
