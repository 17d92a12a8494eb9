"""Attacks on purpose: who attacks, and what leaves an attacker's node."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_client.data import NodeDataset, Split
from concord_client.devices import prepare_process
from concord_local.attacks import Attack, flipped
from concord_local.nodes import NodeHost
from concord_server.replies import Expectation, accept_reply
from concord_shared.blocks import LANES
from concord_shared.errors import UpdateRefusedError, UsageError
from concord_shared.messages import Offer, model_record, offer_message, ring_blocks
from concord_shared.models import new_vector
from concord_shared.preprocessing import unfitted
from concord_shared.strategies import strategy_for
from concord_shared.tensors import model_digest
from federations import federation, small_plan
from helpers import REGRESSION, plan_of

NAMES = tuple(f"node-{index}" for index in range(1, 6))
PLAN = small_plan("privacy={mode='robust', attackers=2}")


class TestChoice:
    def test_is_drawn_by_the_plans_seed(self) -> None:
        chosen = {Attack.of("alie", 2, NAMES, small_plan(f"seed={seed}")).nodes for seed in range(9)}  # type: ignore[union-attr]
        assert len(chosen) > 3
        again = Attack.of("alie", 2, tuple(reversed(NAMES)), PLAN)
        assert again == Attack.of("alie", 2, NAMES, PLAN)

    def test_is_as_many_as_the_plan_tolerates_unless_said(self) -> None:
        assert len(Attack.of("alie", None, NAMES, PLAN).nodes) == 2  # type: ignore[union-attr]
        assert len(Attack.of("alie", None, NAMES, small_plan()).nodes) == 1  # type: ignore[union-attr]
        assert Attack.of("", None, NAMES, PLAN) is None

    @pytest.mark.parametrize(
        ("text", "kind", "value"), [("scale:-3", "scale", -3), ("scale", "scale", -10), ("alie:2", "alie", 2)]
    )
    def test_knows_how_hard(self, text: str, kind: str, value: float) -> None:
        attack = Attack.of(text, 1, NAMES, PLAN)
        assert (attack.kind, attack.value) == (kind, value)  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        "text", ["", "flip", "scale:", "scale:x", "scale:inf", "nan:3", "label-flip:1", "alie:nan"]
    )
    def test_refuses_what_is_no_attack(self, text: str) -> None:
        with pytest.raises(UsageError, match=r"--attack"):
            Attack.of(text, 1, NAMES, PLAN)

    def test_refuses_nan_under_masks(self) -> None:
        with pytest.raises(UsageError, match="under masks"):
            Attack.of("nan", 1, NAMES, small_plan("privacy.mode=private"))


def test_wrong_labels_are_for_training_alone() -> None:
    dataset = federation(PLAN).dataset("node-2")
    wrong = flipped(dataset, PLAN)
    for split, expected in ((Split.TRAIN, 9 - dataset.take(Split.TRAIN)[1]), (Split.TEST, dataset.take(Split.TEST)[1])):
        assert wrong.take(split)[1].tolist() == expected.tolist()
    assert federation(PLAN).dataset("node-2").take(Split.TRAIN)[1].tolist() == dataset.take(Split.TRAIN)[1].tolist()


def test_targets_of_a_regression_are_mirrored_in_their_range() -> None:
    rows = {Split.TRAIN: np.array([0, 1]), Split.VALIDATION: np.array([], int), Split.TEST: np.array([2])}
    dataset = NodeDataset("a", np.zeros((3, 3)), np.array([-100.0, 30, 7]), rows)
    assert flipped(dataset, plan_of(REGRESSION)).targets.tolist() == [100, -30, 7]


class Site:
    """One node of a small federation, honest and under each attack."""

    def __init__(self, folder: Path) -> None:
        prepare_process(threads=1)
        self.layout, self.theta = new_vector(PLAN)
        self.nodes, self.folder = federation(PLAN), folder

    def reply(self, node: str, attack: str = "") -> Any:
        chosen = Attack.of(attack, None, self.nodes.names, PLAN)
        host = NodeHost(PLAN, self.nodes, self.folder, "cpu", attack=chosen)
        place = self.nodes.names.index(node)
        message = offer_message(self.offer(node), model_record(self.theta, {}), place + 2, 1.7e9)
        return host.respond(message)

    def update(self, node: str, attack: str = "") -> np.ndarray:
        return ring_blocks(self.reply(node, attack))["delta"].astype(np.int64)

    def offer(self, node: str) -> Offer:
        return Offer(
            "run", "train", 1, 1, node, PLAN.digest, model_digest(self.layout, self.theta), self.layout.digest, 5, 1024,
            preprocessing=json.dumps(unfitted(PLAN).document()),
        )  # fmt: skip

    def expectation(self, node: str) -> Expectation:
        entry = next(each for each in self.nodes.entries(PLAN) if each.name == node)
        blocks = (*strategy_for(PLAN).blocks(PLAN, self.layout), LANES)
        return Expectation(self.offer(node), entry, blocks, PLAN.rounds.weight_cap, PLAN.data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("states"))


ATTACKERS = Attack.of("alie", 2, NAMES, PLAN).nodes  # type: ignore[union-attr]
HONEST = sorted(set(NAMES) - set(ATTACKERS))


class TestUpdates:
    def test_others_stay_honest(self, site: Site) -> None:
        assert site.update(HONEST[0], "scale:-10").tolist() == site.update(HONEST[0]).tolist()

    def test_sign_flip_and_scale_are_multiples_within_the_bound(self, site: Site) -> None:
        node, honest = ATTACKERS[0], site.update(ATTACKERS[0])
        assert site.update(node, "sign-flip").tolist() == (-honest).tolist()
        scaled = site.update(node, "scale:-10")
        assert np.dot(scaled, honest) / np.linalg.norm(scaled) / np.linalg.norm(honest) == pytest.approx(-1, abs=1e-3)
        accept_reply(site.reply(node, "scale:-10"), site.expectation(node))

    def test_a_free_rider_sends_zeros(self, site: Site) -> None:
        assert not site.update(ATTACKERS[0], "free-rider").any()

    def test_wrong_labels_give_another_update(self, site: Site) -> None:
        assert site.update(ATTACKERS[0], "label-flip").tolist() != site.update(ATTACKERS[0]).tolist()

    def test_colluders_send_one_and_the_same(self, site: Site) -> None:
        honest = np.stack([site.update(node) for node in ATTACKERS])
        sent = [site.update(node, "alie:1") for node in ATTACKERS]
        assert sent[0].tolist() == sent[1].tolist()
        np.testing.assert_allclose(sent[0], honest.mean(0) - honest.std(0), atol=2)

    def test_nan_is_refused_at_the_door(self, site: Site) -> None:
        node = ATTACKERS[0]
        with pytest.raises(UpdateRefusedError, match="float32") as caught:
            accept_reply(site.reply(node, "nan"), site.expectation(node))
        assert caught.value.reason == "layout"
