"""A card's terms are a ceiling at the node: over agreements as they arrive, plans, each round and releases."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from concord_client.approvals import approve, questions
from concord_client.cards import CardChoices, choices_of, drop_choices, put_choices
from concord_client.guard import RoundGuard, RoundRefusedError
from concord_client.policy import Policy
from concord_client.store import NodeStore
from concord_shared.documents import DataTerms, ModelFile, Release, Terms
from concord_shared.errors import ConsentRefusedError
from concord_shared.signing import seal
from helpers import plan_of
from unit.client.fake_coordinator import DAY, NOW, REQUESTER, TABLE_PLAN, Partner, partner_in
from unit.client.rounds_kit import Site, make_site

UNTIL = NOW + 100 * DAY
FITS = {"purposes": ("research",), "outputs": ("release",), "not_after": UNTIL, "minimum_cohort": 3}
"""Of an agreement that each of these ceilings allows."""
CEILINGS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"purposes": ("research", "care")}, {"purposes": ()}, "names no purpose"),
    ({"purposes": ("research", "care")}, {"purposes": ("research", "marketing")}, "names research, marketing"),
    ({"not_after": UNTIL}, {"not_after": UNTIL + 1}, "the dataset's terms end"),
    ({"minimum_cohort": 3}, {"minimum_cohort": 2}, "asks for 2 nodes in a round"),
    ({"outputs": ("release",)}, {"outputs": None}, "does not say what may be made of models"),
    ({"outputs": ("release",)}, {"outputs": ("release", "commercial")}, "allows release, commercial"),
    ({"outputs": ()}, {"outputs": ("release",)}, "the dataset's terms allow nothing"),
]
"""The owner's terms, what of an agreement is beyond them, and the reason."""


@pytest.fixture
def partner(tmp_path: Path) -> Iterator[Partner]:
    made = partner_in(tmp_path)
    assert made.apply("study", seal(made.study(), made.key(REQUESTER))).refused == []
    yield made
    made.store.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = make_site(tmp_path)
    yield made
    made.store.close()


def allow(store: NodeStore, dataset: str, **terms: Any) -> None:
    held = store.dataset(dataset)
    assert held is not None
    put_choices(store, held, CardChoices(terms=DataTerms(**terms)))


def agreed(partner: Partner, **terms: Any) -> dict[str, Any]:
    return partner.agreed(partner.agreement(terms=Terms(**FITS | terms)))


class TestAgreements:
    @pytest.mark.parametrize(("ceiling", "beyond", "reason"), CEILINGS)
    def test_beyond_a_term_is_refused_though_both_signed(
        self, partner: Partner, ceiling: dict[str, Any], beyond: dict[str, Any], reason: str
    ) -> None:
        allow(partner.store, "patients", **ceiling)
        assert reason in partner.refused("agreement", agreed(partner, **beyond))
        assert partner.store.agreement("heart-acme") is None
        within = {"outputs": ceiling.get("outputs", FITS["outputs"])}
        assert partner.apply("agreement", agreed(partner, **within)).refused == []

    def test_of_another_organisation_is_refused(self, partner: Partner) -> None:
        allow(partner.store, "patients", who=("somebody",))
        assert f"requester {REQUESTER}" in partner.refused("agreement", agreed(partner))
        allow(partner.store, "patients", who=("somebody", REQUESTER))
        assert partner.apply("agreement", agreed(partner)).refused == []

    def test_an_own_dataset_of_several_that_does_not_allow_it_is_enough(self, partner: Partner) -> None:
        allow(partner.store, "patients", minimum_cohort=5)
        given = partner.agreement(terms=Terms(**FITS), datasets=("acme-1/other", "acme-1/patients"))
        assert "dataset patients" in partner.refused("agreement", partner.agreed(given))

    def test_terms_that_cannot_be_read_allow_nothing(self, partner: Partner) -> None:
        """And nothing else waits for them: what comes after the agreement is heard."""
        assert partner.apply("agreement", agreed(partner)).refused == []
        assert partner.apply("plan", partner.request()).refused == []
        partner.store.set_fact("card/patients", '{"terms": {"from": "a later version"}}')
        later = partner.agreement(terms=Terms(**FITS), issued_at=NOW + 1)
        assert "another version" in partner.refused("agreement", partner.agreed(later))
        assert partner.store.cursor == partner.sequence
        [question] = questions(partner.home, partner.store, Policy(), NOW)
        with pytest.raises(ConsentRefusedError, match="another version"):
            approve(partner.home, partner.store, Policy(), question, NOW)
        drop_choices(partner.store, "patients")
        assert choices_of(partner.store, "patients") == CardChoices()


class TestPlans:
    @pytest.mark.parametrize(("ceiling", "beyond", "reason"), CEILINGS)
    def test_terms_that_were_narrowed_later_hold_for_what_was_agreed(
        self, partner: Partner, ceiling: dict[str, Any], beyond: dict[str, Any], reason: str
    ) -> None:
        assert partner.apply("agreement", agreed(partner, **beyond)).refused == []
        assert partner.apply("plan", partner.request()).refused == []
        [question] = questions(partner.home, partner.store, Policy(), NOW)
        assert question.missing == ()
        allow(partner.store, "patients", **ceiling)
        [question] = questions(partner.home, partner.store, Policy(), NOW)
        with pytest.raises(ConsentRefusedError, match=reason):
            approve(partner.home, partner.store, Policy(), question, NOW)

    @pytest.mark.parametrize(
        ("dp", "reason"),
        [
            ("", "no differential privacy of this node's own"),
            ("unit='record', epsilon=3.5", "epsilon 3.5: the dataset's terms allow 3"),
            ("unit='node', epsilon=2.0", "no differential privacy of this node's own"),
            ("unit='record', epsilon=3.0", ""),
        ],
        ids=["none", "too much", "of the coordinator", "fits"],
    )
    def test_beyond_the_cap_on_epsilon_is_refused(self, partner: Partner, dp: str, reason: str) -> None:
        plan = plan_of(TABLE_PLAN, *([f"privacy={{mode='plain', dp={{{dp}, delta=1e-5, clip=10.0}}}}"] if dp else []))
        verdict = Policy().verdict(
            plan, partner.study(), partner.agreement(), None, "patients", ceiling=DataTerms(epsilon="3")
        )
        assert verdict.allowed == (not reason)
        assert any(reason in each for each in verdict.reasons or ("",)), verdict.reasons

    def test_a_cohort_below_the_terms_is_refused(self, partner: Partner) -> None:
        """By the agreement, which cannot ask for less than the card."""
        given = partner.study(), partner.agreement(terms=Terms(**FITS))
        ceiling = DataTerms(minimum_cohort=3)
        assert Policy().verdict(partner.plan, *given, 3, ceiling=ceiling).allowed
        assert not Policy().verdict(partner.plan, *given, 2, ceiling=ceiling).allowed


class TestRounds:
    def test_within_the_terms_it_passes(self, site: Site) -> None:
        site.agree(purposes=("research",), outputs=("release",))
        allow(site.store, "digits", purposes=("research",), who=("hospital-b",), outputs=("release", "commercial"))
        assert RoundGuard(site.home, site.store).check(site.message())

    @pytest.mark.parametrize(
        ("ceiling", "reason"),
        [
            ({"purposes": ("care",)}, "names research: the dataset's terms allow care"),
            ({"who": ("hospital-c",)}, "requester hospital-b"),
            ({"not_after": int(time.time())}, "the dataset's terms end"),
            ({"minimum_cohort": 4}, "the dataset's terms ask for at least 4"),
            ({"epsilon": "3"}, "an epsilon of at most 3"),
            ({"outputs": ()}, "the dataset's terms allow nothing"),
        ],
    )
    def test_each_term_is_looked_at_in_each_round(self, site: Site, ceiling: dict[str, Any], reason: str) -> None:
        site.agree(purposes=("research",), outputs=("release",))
        message = site.message()
        assert RoundGuard(site.home, site.store).check(message)
        allow(site.store, "digits", **ceiling)
        with pytest.raises(RoundRefusedError, match=reason) as caught:
            RoundGuard(site.home, site.store).check(message)
        assert caught.value.check == "policy"

    def test_terms_that_cannot_be_read_let_no_round_through(self, site: Site) -> None:
        site.store.set_fact("card/digits", "{}}")
        with pytest.raises(RoundRefusedError, match="cannot be read"):
            RoundGuard(site.home, site.store).check(site.message())

    def test_a_run_that_another_member_started_is_refused(self, site: Site) -> None:
        """The agreement is the requester's; the manifest is signed by a member of the study that is not listed."""
        allow(site.store, "digits", who=("hospital-b",))
        site.start("run-2", organisation="hospital-a")
        with pytest.raises(RoundRefusedError, match="run started by hospital-a"):
            RoundGuard(site.home, site.store).check(site.message(run="run-2"))

    def test_an_offer_that_speaks_of_fewer_nodes_is_refused(self, site: Site) -> None:
        site.agree(minimum_cohort=3)
        allow(site.store, "digits", minimum_cohort=3)
        with pytest.raises(RoundRefusedError, match="below the 3"):
            RoundGuard(site.home, site.store).check(site.message(nodes_max=2))


class TestReleases:
    def release(self, partner: Partner) -> Any:
        given = Release(
            model_digest="a" * 64,
            plan_digest=partner.plan.digest,
            study="heart",
            run="run-1",
            organisation=REQUESTER,
            files=(ModelFile(name="model.safetensors", sha256="b" * 64, size=3),),
            metrics={},
            issued_at=NOW,
        )
        return seal(given, partner.key(REQUESTER))

    @pytest.mark.parametrize("agreement", [True, False], ids=["by the agreement", "by the card"])
    def test_of_a_model_that_the_terms_do_not_allow_is_refused(self, partner: Partner, agreement: bool) -> None:
        outputs = () if agreement else ("release",)
        partner.apply("agreement", agreed(partner, outputs=outputs))
        partner.apply("plan", partner.request())
        assert partner.apply("manifest", seal(partner.manifest(), partner.key(REQUESTER))).refused == []
        if not agreement:
            allow(partner.store, "patients", outputs=("commercial",))
        assert "allow no release" in partner.refused("release", self.release(partner))

    def test_that_the_terms_allow_is_taken(self, partner: Partner) -> None:
        partner.apply("agreement", agreed(partner))
        partner.apply("plan", partner.request())
        partner.apply("manifest", seal(partner.manifest(), partner.key(REQUESTER)))
        allow(partner.store, "patients", outputs=("release",))
        assert partner.apply("release", self.release(partner)).refused == []
