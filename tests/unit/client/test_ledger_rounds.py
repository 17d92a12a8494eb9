"""The privacy ledger in a node's rounds: what is not reserved and charged is not trained, whatever else is in order."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from concord_client.exposition import Counts
from concord_client.ledger.books import Standing
from concord_client.ledger.filter import choose_order
from concord_client.ledger.ledger import PrivacyLedger
from concord_client.ledger.marks import Mark
from concord_client.ledger.witness import KIND, note_witness, witnessed
from concord_client.ledger.words import Cap
from concord_client.rounds import NO_ROOM, Rounds
from concord_client.training_job import Job
from concord_client.training_process import TrainingProcess
from concord_shared.accounting import plan_epsilon, round_rdp
from concord_shared.errors import DocumentRefusedError
from concord_shared.messages import ring_blocks
from concord_shared.protocol import LedgerHead
from concord_shared.signed_rounds import verify_reply
from concord_shared.signing import new_identity_key, open_envelope, seal

from .rounds_kit import DIGEST, Scripted, Site, alive, make_site

DP = "privacy={mode='plain', dp={unit='record', epsilon=2.0, delta=1e-5, clip=1.0}}"
ENOUGH, TOO_LITTLE = 10.0, 1.9


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = make_site(tmp_path, DP, "training.batch_size=480")
    yield made
    made.store.close()


def set_cap(site: Site, epsilon: float, **changes: Any) -> None:
    with site.home.ledger() as ledger:
        opened = ledger.books().opened
        assert opened is not None
        order = choose_order(opened.orders, epsilon, 1e-5)
        fields = {"group": "digits", "datasets": ("digits",), "epsilon": epsilon, "delta": 1e-5, "order": order}
        ledger.set_cap(Cap(**{**fields, **changes}))


def rounds(site: Site, responder: Any = None) -> Rounds:
    return Rounds(site.home, site.store, responder or Scripted(), Counts())


def standing(site: Site, run: str = "run-1") -> Standing | None:
    with site.home.ledger() as ledger:
        return ledger.books().standings.get(run)


def charged(site: Site) -> set[int]:
    found = standing(site)
    return found.charged if found else set()


def reason(reply: Message) -> str:
    assert reply.has_error(), "was answered"
    return str(reply.error.reason)


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """What this node's own log says of the newest refusal."""
    return str(caplog.records[-1].detail)  # type: ignore[attr-defined]


class TestBeforeTraining:
    def test_the_whole_plan_is_reserved_and_the_round_charged(self, site: Site) -> None:
        set_cap(site, ENOUGH)
        seen: list[set[int]] = []
        assert not rounds(site, Scripted(then=lambda: seen.append(charged(site)))).answer(site.message()).has_error()
        assert seen == [{1}], "before anything was trained"
        found = standing(site)
        assert found is not None
        assert found.word.rounds == site.plan.rounds.count
        assert found.word.rdp == round_rdp(site.plan, 480)
        assert (found.word.rows, found.word.epsilon) == (480, plan_epsilon(site.plan, 480))

    def test_the_charge_is_there_though_the_training_process_dies_at_its_first_batch(self, site: Site) -> None:
        set_cap(site, ENOUGH)
        process = TrainingProcess(target=die_at_once)
        try:
            assert "died twice" in reason(rounds(site, process).answer(site.message()))
        finally:
            process.close()
        seen = json.loads((site.home.path / "seen.json").read_text())
        assert seen["charged"] == [1]
        assert not alive(seen["pid"])
        assert charged(site) == {1}, "and nothing is given back"

    def test_a_plan_that_does_not_fit_is_refused_with_figures_and_not_trained(
        self, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        set_cap(site, TOO_LITTLE)
        responder = Scripted()
        reason(rounds(site, responder).answer(site.message()))
        said = logged(caplog)
        assert said.startswith("this plan costs ε 2.199 of 1.9 left")
        assert "of 1.9 left in budget digits (ε 1.9 at δ 1e-05) of dataset digits" in said
        assert responder.jobs == []
        assert standing(site) is None

    def test_the_coordinator_hears_no_figure_of_a_budget_that_other_runs_spend_from(self, site: Site) -> None:
        heard = set()
        for epsilon in (0.5, TOO_LITTLE):
            set_cap(site, epsilon, order=64.0)
            heard.add(reason(rounds(site).answer(site.message())))
        assert heard == {f"BudgetRefusedError: {NO_ROOM}"}
        assert not any(character.isdigit() or character == "ε" for character in NO_ROOM)

    @pytest.mark.parametrize("kind", ["evaluate", "train"])
    def test_nothing_of_a_run_that_does_not_fit_is_answered(self, site: Site, kind: str) -> None:
        set_cap(site, TOO_LITTLE)
        assert NO_ROOM in reason(rounds(site).answer(site.message(kind=kind)))

    def test_a_raised_cap_lets_the_next_round_in(self, site: Site) -> None:
        set_cap(site, TOO_LITTLE)
        work = rounds(site)
        assert work.answer(site.message()).has_error()
        with site.home.ledger() as ledger:
            before = ledger.books().budgets["digits"].word
        set_cap(site, ENOUGH, order=before.order)
        assert not work.answer(site.message(attempt=2)).has_error()

    def test_a_closed_run_is_answered_no_more(self, site: Site) -> None:
        work = rounds(site)
        assert not work.answer(site.message()).has_error()
        with site.home.ledger() as ledger:
            ledger.close_run("run-1")
        for kind in ("evaluate", "train"):
            assert NO_ROOM in reason(work.answer(site.message(kind=kind, round_number=2)))

    def test_evaluation_charges_nothing(self, site: Site) -> None:
        assert not rounds(site).answer(site.message(kind="evaluate")).has_error()
        assert charged(site) == set()

    def test_a_second_run_of_the_plan_has_its_own_reservation(self, site: Site) -> None:
        set_cap(site, 3.0)
        work = rounds(site)
        assert not work.answer(site.message()).has_error()
        site.start("run-2")
        assert NO_ROOM in reason(work.answer(site.message(run="run-2")))


class TestWithoutDifferentialPrivacy:
    @pytest.fixture
    def plain(self, tmp_path: Path) -> Iterator[Site]:
        made = make_site(tmp_path)
        yield made
        made.store.close()

    def test_it_is_refused_under_a_cap(self, plain: Site, caplog: pytest.LogCaptureFixture) -> None:
        set_cap(plain, ENOUGH)
        responder = Scripted()
        assert NO_ROOM in reason(rounds(plain, responder).answer(plain.message()))
        assert "no differential privacy" in logged(caplog)
        assert responder.jobs == []

    def test_it_is_written_down_without_one(self, plain: Site) -> None:
        assert not rounds(plain).answer(plain.message()).has_error()
        found = standing(plain)
        assert found is not None
        assert (found.is_bounded, found.charged, found.released) == (False, {1}, {1})

    def test_noise_that_the_coordinator_would_add_bounds_nothing_here(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        bound = "{unit='node', epsilon=2.0, delta=1e-5, clip=10.0}"
        site = make_site(tmp_path, f"privacy={{mode='plain', dp={bound}}}", "rounds.update_bound=10.0")
        assert site.plan.noise == "central"
        set_cap(site, 100.0)
        assert NO_ROOM in reason(rounds(site).answer(site.message()))
        assert "no differential privacy of this node's own" in logged(caplog)
        site.store.close()


class TestAttempts:
    def test_another_attempt_charges_nothing_and_draws_no_noise_again(self, site: Site) -> None:
        responder = Scripted()
        work = rounds(site, responder)
        first, second = work.answer(site.message()), work.answer(site.message(attempt=2))
        assert len(responder.jobs) == 1
        for name, values in ring_blocks(first).items():
            assert np.array_equal(values, ring_blocks(second)[name])
        verify_reply(second, site.home.identity_key().public_key())
        assert second.content.config_records["binding"]["attempt"] == 2
        assert charged(site) == {1}

    def test_also_after_a_restart(self, site: Site) -> None:
        responder = Scripted()
        rounds(site).answer(site.message())
        assert not rounds(site, responder).answer(site.message(attempt=2)).has_error()
        assert responder.jobs == []

    def test_an_update_that_is_not_kept_any_more_is_not_made_anew(self, site: Site) -> None:
        responder = Scripted()
        work = rounds(site, responder)
        work.answer(site.message())
        shutil.rmtree(site.home.states / "run-1")
        assert "its noise is never drawn twice" in reason(work.answer(site.message(attempt=2)))
        assert len(responder.jobs) == 1

    def test_what_never_left_is_made_anew_at_no_further_cost(self, site: Site) -> None:
        def dies() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            rounds(site, Scripted(then=dies)).answer(site.message())
        responder = Scripted()
        assert not rounds(site, responder).answer(site.message(attempt=2)).has_error()
        assert (len(responder.jobs), charged(site)) == (1, {1})

    def test_an_answer_that_was_kept_and_then_sent_is_the_only_draw(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Killed after the answer was kept and before its release was noted, a node sends it when it is asked again."""
        with monkeypatch.context() as killed:
            killed.setattr(PrivacyLedger, "release", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                rounds(site).answer(site.message())
        responder = Scripted()
        first = rounds(site, responder).answer(site.message())
        found = standing(site)
        assert found is not None
        assert found.released == {1}
        again = rounds(site, responder).answer(site.message(attempt=2))
        assert responder.jobs == []
        for name, values in ring_blocks(first).items():
            assert np.array_equal(values, ring_blocks(again)[name])
        assert "another model" in reason(rounds(site).answer(site.message(attempt=3, model_digest=DIGEST)))

    def test_a_release_is_of_the_bytes_that_left(self, site: Site) -> None:
        rounds(site).answer(site.message())
        with site.home.ledger() as ledger:
            release = ledger.entries()[-1].word
        assert (release.kind, release.sha256) == ("release", site.store.egress()[-1].sha256)  # type: ignore[union-attr]


class TestUnderMasks:
    @pytest.fixture
    def masked(self, tmp_path: Path) -> Iterator[Site]:
        made = make_site(tmp_path, "privacy={mode='private', dp={unit='record', epsilon=2.0, delta=1e-5, clip=1.0}}")
        yield made
        made.store.close()

    def test_the_first_stage_is_refused_and_no_keys_leave(self, masked: Site) -> None:
        set_cap(masked, TOO_LITTLE)
        responder = Scripted()
        assert NO_ROOM in reason(rounds(masked, responder).answer(masked.message(stage="keys")))
        assert responder.jobs == []

    def test_it_is_charged_before_the_training_that_runs_beside(self, masked: Site) -> None:
        set_cap(masked, ENOUGH)
        seen: list[set[int]] = []
        work = rounds(masked, Scripted(then=lambda: seen.append(charged(masked))))
        for attempt in (1, 2):
            assert not work.answer(masked.message(stage="keys", attempt=attempt)).has_error()
        until = time.monotonic() + 10
        while not seen and time.monotonic() < until:
            time.sleep(0.01)
        assert seen == [{1}]

    def test_an_update_that_left_under_masks_and_is_lost_is_not_made_anew(self, masked: Site) -> None:
        """More colluders than the plan reckons with could open both attempts: two draws for one charge."""
        assert not rounds(masked).answer(masked.message(stage="keys")).has_error()
        with masked.home.ledger() as ledger:
            ledger.release("run-1", 1, DIGEST)
        responder = Scripted()
        work = rounds(masked, responder)  # of a node that was started anew
        assert "its noise is never drawn twice" in reason(work.answer(masked.message(stage="keys", attempt=2)))
        assert responder.jobs == []

    def test_in_the_process_that_holds_it_another_attempt_masks_the_same_update(self, masked: Site) -> None:
        responder = Scripted()
        work = rounds(masked, responder)
        assert not work.answer(masked.message(stage="keys")).has_error()
        with masked.home.ledger() as ledger:
            ledger.release("run-1", 1, DIGEST)
        assert not work.answer(masked.message(stage="keys", attempt=2)).has_error()
        assert len(responder.jobs) == 1


class TestRolledBack:
    @pytest.fixture
    def restored(self, site: Site) -> Site:
        """The ledger of before the first round, put in its place again."""
        set_cap(site, ENOUGH)
        backup = site.home.path / "backup.db"
        shutil.copy(site.home.ledger_file, backup)
        rounds(site).answer(site.message())
        for file in site.home.path.glob("ledger.db*"):
            file.unlink()
        shutil.copy(backup, site.home.ledger_file)
        return site

    def test_nothing_is_trained(self, restored: Site) -> None:
        responder = Scripted()
        said = reason(rounds(restored, responder).answer(restored.message(round_number=2)))
        assert said == (
            "RoundRefusedError: this node's privacy ledger cannot be used; its own log says why, and what to do"
        ), "the coordinator hears no path"
        assert responder.jobs == []

    def test_a_node_that_runs_finds_its_ledger_mended(self, restored: Site) -> None:
        work = rounds(restored)
        assert work.answer(restored.message(round_number=2)).has_error()
        with restored.home.ledger(repairing=True) as ledger:
            ledger.repair(ledger.noted())
            order = ledger.books().budgets["digits"].word.order
        assert NO_ROOM in reason(work.answer(restored.message(round_number=2, attempt=2)))
        set_cap(restored, 2 * ENOUGH, order=order)
        assert not work.answer(restored.message(round_number=2, attempt=3)).has_error()


class TestWitness:
    def posted(self, site: Site) -> list[LedgerHead]:
        key = site.home.identity_key().public_key()
        return [open_envelope(each.envelope, LedgerHead, [key]) for each in site.store.outbox() if each.kind == KIND]

    def test_the_newest_state_is_posted_once(self, site: Site) -> None:
        work = rounds(site)
        for number in (1, 2, 3):
            work.answer(site.message(round_number=number))
        [said] = self.posted(site)
        with site.home.ledger() as ledger:
            assert ledger.entries()[said.sequence - 1].word.kind == "charge"
            assert (said.sequence, said.hash) == (said.sequence, ledger.entries()[said.sequence - 1].digest)

    def test_a_whole_home_from_a_backup_is_refused_by_what_the_coordinator_was_told(
        self, site: Site, tmp_path: Path
    ) -> None:
        """Ledger and mark are both of yesterday, and fit."""
        set_cap(site, ENOUGH)
        shutil.copytree(site.home.path, tmp_path / "backup")
        rounds(site).answer(site.message())
        [envelope] = [each.envelope for each in site.store.outbox() if each.kind == KIND]
        site.store.close()
        shutil.rmtree(site.home.path)
        shutil.copytree(tmp_path / "backup", site.home.path)
        site.store = site.home.store()
        with site.home.ledger():
            pass
        note_witness(site.home, site.store, envelope)
        responder = Scripted()
        assert "ledger cannot be used" in reason(rounds(site, responder).answer(site.message()))
        assert responder.jobs == []

    def test_the_coordinator_cannot_make_it_up(self, site: Site) -> None:
        word = LedgerHead(node="node-1", organisation="hospital-a", sequence=99, hash=DIGEST, issued_at=0)
        with pytest.raises(DocumentRefusedError, match="signature"):
            note_witness(site.home, site.store, seal(word, new_identity_key()))
        other = word.model_copy(update={"node": "node-2"})
        with pytest.raises(DocumentRefusedError, match="another node"):
            note_witness(site.home, site.store, seal(other, site.home.identity_key()))
        assert witnessed(site.store) == Mark(0, DIGEST)

    def test_an_older_word_takes_nothing_back(self, site: Site) -> None:
        for sequence in (7, 5):
            word = LedgerHead(node="node-1", organisation="hospital-a", sequence=sequence, hash=DIGEST, issued_at=0)
            note_witness(site.home, site.store, seal(word, site.home.identity_key()))
        assert witnessed(site.store).sequence == 7


def die_at_once(connection: "Connection[Any, Any]", parent: int) -> None:
    """A training process that is killed when it is asked for a first batch; it notes what the ledger held then."""
    connection.send_bytes(b'{"buffers": 0}')
    request = json.loads(connection.recv_bytes())
    home = Job.of(request["job"]).states.parents[1]
    from concord_client.home import NodeHome

    with NodeHome(home).ledger() as ledger:
        seen = {"charged": sorted(ledger.books().standings["run-1"].charged), "pid": os.getpid()}
    (home / "seen.json").write_text(json.dumps(seen))
    os.kill(os.getpid(), signal.SIGKILL)
