"""Plans of kind statistics in a node's rounds: policy, guard and ledger stand before any row is read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from concord_client.approvals import count_rows
from concord_client.exposition import Counts
from concord_client.plan_words import describe_plan
from concord_client.rounds import Rounds
from concord_client.statistics_guard import StatisticsGuard
from concord_shared.messages import ring_blocks
from concord_shared.plan import Plan, parse_plan

from .rounds_kit import NODE, Scripted, Site, make_site

TEXT = """
name = "digits-statistics"
kind = "statistics"
[data]
task = "classification"
input = "image"
shape = [1, 8, 8]
classes = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
"""
DP = "privacy={mode='plain', dp={unit='record', epsilon=2.0, delta=1e-5, clip=1.0}}"


def plan(*overrides: str) -> Plan:
    return parse_plan(TEXT, "digits-statistics", overrides).plan


def site_of(path: Path, *overrides: str) -> Site:
    made = make_site(path, plan=plan(*overrides))
    dataset = made.store.dataset("digits")
    assert dataset is not None
    rows, evaluated = count_rows(made.store, dataset, made.plan, NODE)
    made.approve(rows=rows, evaluation_rows=evaluated)
    return made


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = site_of(tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def noisy(tmp_path: Path) -> Iterator[Site]:
    made = site_of(tmp_path, DP)
    yield made
    made.store.close()


def rounds(site: Site, responder: Scripted | None = None) -> Rounds:
    return Rounds(site.home, site.store, responder or Scripted(), Counts())


def refused(site: Site, words: str, **changes: object) -> None:
    responder = Scripted()
    reply = rounds(site, responder).answer(site.message(kind="statistics", **changes))
    assert reply.has_error()
    assert words in str(reply.error.reason)
    assert responder.jobs == [], "no row was read"


def test_all_rows_count_as_those_that_it_is_of(site: Site) -> None:
    approval = site.store.last_approval(site.study.study, site.plan.digest, "digits")
    assert approval is not None
    assert (approval.rows, approval.evaluation_rows) == (599, 0)


def test_an_exact_answer_is_remembered_before_it_leaves(site: Site) -> None:
    reply = rounds(site).answer(site.message(kind="statistics"))
    assert not reply.has_error()
    [answer] = StatisticsGuard(site.store).answers()
    assert (answer.run, answer.plan_digest, answer.selection, answer.cohort) == ("run-1", site.plan.digest, "all", ())


def test_the_guard_stands_before_the_rows(site: Site) -> None:
    for name in site.store.facts("statistics/rows/"):
        site.store.drop_fact(name)
    refused(site, "approves the plan again")


def test_training_is_not_what_such_a_plan_is_for(site: Site) -> None:
    responder = Scripted()
    reply = rounds(site, responder).answer(site.message(kind="statistics", round_number=3))
    assert "no statistics round 3" in str(reply.error.reason)
    assert responder.jobs == []


def test_the_policy_decides_kind_and_minimum_count(site: Site) -> None:
    site.change_policy('kinds = ["train", "statistics"]', 'kinds = ["train"]')
    refused(site, 'kind statistics: the policy allows train; its owner adds "statistics" to kinds')
    site.change_policy('kinds = ["train"]', 'kinds = ["train", "statistics"]')
    site.change_policy("minimum_count = 5", "minimum_count = 6")
    refused(site, "counts from 5 on: the policy tells none below 6")


def test_each_stage_is_charged_before_rows_are_read(noisy: Site) -> None:
    seen: list[set[int]] = []

    def look() -> None:
        with noisy.home.ledger() as ledger:
            seen.append(set(ledger.books().standings["run-1"].charged))

    answering = rounds(noisy, Scripted(then=look))
    assert not answering.answer(noisy.message(kind="statistics")).has_error()
    assert not answering.answer(noisy.message(kind="statistics", round_number=2)).has_error()
    assert seen == [{1}, {1, 2}]
    with noisy.home.ledger() as ledger:
        word = ledger.books().standings["run-1"].word
        assert (word.rounds, word.rows) == (2, 599)
        assert word.epsilon is not None
        assert 1.9 < word.epsilon <= 2.0
    assert StatisticsGuard(noisy.store).answers() == [], "the ledger adds them up"


def test_noise_is_drawn_once_for_all_attempts_at_a_stage(noisy: Site) -> None:
    responder = Scripted()
    first = rounds(noisy, responder).answer(noisy.message(kind="statistics"))
    again = rounds(noisy, responder).answer(noisy.message(kind="statistics", attempt=2))
    assert len(responder.jobs) == 1
    assert ring_blocks(first)["delta"].tolist() == ring_blocks(again)["delta"].tolist()


def test_a_plan_says_in_words_what_leaves() -> None:
    words = " ".join(describe_plan(plan()))
    assert "Trains no model" in words
    assert "The coordinator sees this node's figures by themselves" in words
    assert "no count below 5" in words
    promised = " ".join(describe_plan(plan(DP)))
    assert "one record more or less at a node" in promised
    assert "figures of evaluation" not in promised
