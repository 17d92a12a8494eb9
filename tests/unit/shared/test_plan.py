import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from concord_shared.errors import PlanError, UsageError
from concord_shared.plan import load_plan, parse_plan, parse_plan_document, shipped_plans
from concord_shared.plan.privacy import Robust
from concord_shared.plan.rounds import share_of
from helpers import IMAGES, REGRESSION, TABLE, TOPICS, one_column_plan, plan_of

ALL_SHIPPED = list(shipped_plans())

RECORD = "privacy={mode='plain', dp={unit='record', epsilon=3.0, delta=1e-5, clip=0.1}}"
NODE = "privacy={mode='private', dp={unit='node', epsilon=3.0, delta=1e-5, clip=10.0}}"
SOLVED = "strategy.name=least-squares", "rounds.count=1"
FITTED = (
    "preprocessing={scope='per-node', standardise=true}",
    "preprocessing={scope='federated', standardise=true}",
)

MISTAKES = [
    (IMAGES, "rounds.cout=3", "rounds.cout: unknown key. Did you mean count?"),
    (IMAGES, "trainning.batch_size=3", "trainning: unknown key. Did you mean training?"),
    (IMAGES, "privacy.epsilon=1", "privacy.mode: missing. Add it; it says which one"),
    (IMAGES, "model={name='plugin'}", 'model.package: missing. Add it; model.name = "plugin" needs it'),
    (TOPICS, "model={name='pretrained-encoder'}", 'model.sha256: missing. Add it; model.name = "pretrained-encoder"'),
    (IMAGES, "privacy={mode='plain', dp={unit='node'}}", "privacy.dp.epsilon: missing. Add it; privacy.dp needs it"),
    (IMAGES, "data={input='image'}", "data.task: missing. Add it; every plan needs it"),
    (IMAGES, "compression={}", "compression.kind: missing. Add it; compression needs it"),
    (IMAGES, "privacy={mode='private', qq=1}", "privacy.qq: unknown key. Known here: mode, minimum_cohort"),
    (IMAGES, "privacy={mode='private', collusion=-1}", "privacy.collusion: expected greater than or equal to 0"),
    (IMAGES, "privacy={mode='robust', attackers=0}", "privacy.attackers: expected greater than or equal to 1"),
    (IMAGES, "privacy={mode='robust', rule='krum'}", "privacy.rule: expected 'nnm-trimmed-mean', 'trimmed-mean'"),
    (IMAGES, "privacy={mode='robust', collusion=3}", "privacy.collusion: unknown key. Known here: mode, rule"),
    (TABLE, "privacy.mode=robust", 'are a plain sum, which one node can bend. Set preprocessing.scope = "per-node"'),
    (IMAGES, "model.hidden=[3]", "model.hidden: unknown key. Known here: name"),
    (IMAGES, "privacy.mode=masked", "privacy.mode: expected one of plain, private, robust, got 'masked'"),
    (IMAGES, "rounds.count=0", "rounds.count: expected greater than or equal to 1, got 0"),
    (IMAGES, "rounds.count=true", "rounds.count: expected a integer, got true"),
    (IMAGES, "rounds.count=5.0", "rounds.count: expected a integer, got 5.0"),
    (IMAGES, "rounds.count='5'", 'rounds.count: expected a integer, got "5"'),
    (IMAGES, "rounds.ring_bits=48", "rounds.ring_bits: expected 32 or 64, got 48"),
    (IMAGES, "rounds.cohort=0", 'rounds.cohort: expected "all", a whole number of at least 1, or a fraction'),
    (IMAGES, "rounds.quorum=1.0", "a fraction between 0 and 1, got 1.0"),
    (IMAGES, "rounds.quorum=nan", "a fraction between 0 and 1, got NaN"),
    (IMAGES, "rounds.quorum=true", "a fraction between 0 and 1, got true"),
    (IMAGES, "training.learning_rate=-1", "training.learning_rate: expected greater than 0, got -1"),
    (IMAGES, "training.learning_rate=nan", "training.learning_rate: expected a finite number, got NaN"),
    (IMAGES, "rounds.update_bound=inf", "rounds.update_bound: expected a finite number, got Infinity"),
    (IMAGES, "training.optimiser=adamm", "got \"adamm\". Did you mean adam"),
    (IMAGES, "training.local_epochs=0", "training: give local_epochs or local_steps, one of them above 0"),
    (IMAGES, "training={local_epochs=1, local_steps=1}", "training: give local_epochs or local_steps"),
    (IMAGES, "training.nesterov=true", "training: nesterov needs momentum above 0"),
    (IMAGES, "training={optimiser='adam', momentum=0.9}", 'momentum belongs to optimiser = "sgd"'),
    (IMAGES, "strategy.name=fedavgg", "got 'fedavgg'. Did you mean fedavg?"),
    (IMAGES, "strategy={name='fedprox', muu=1}", "strategy.muu: unknown key. Did you mean mu?"),
    (IMAGES, "strategy={name='fedadam', beta1=1.0}", "strategy.beta1: expected less than 1, got 1.0"),
    (IMAGES, "strategy.name=least-squares", "needs model linear-regression and rounds.count = 1"),
    (IMAGES, "model.name=linear-regression", "does not solve data.task = 'classification'"),
    (REGRESSION, "model.name=2nn", "does not solve data.task = 'regression'"),
    (TABLE, "model.name=seed-cnn", 'model seed-cnn reads images: expected data.input = "image"'),
    (IMAGES, "data.shape=[8, 8]", "data: an image has shape = [channels, height, width]"),
    (IMAGES, "data.classes=['a', 'a']", "data: a classification lists at least 2 different classes"),
    (IMAGES, "data.classes=['a']", "data: a classification lists at least 2 different classes"),
    (IMAGES, "data.classes=[1, 2]", "data.classes.0: expected a string, got 1"),
    (REGRESSION, "data.target_range=[1, 1]", "data: expected target_range = [low, high] with low < high"),
    (REGRESSION, "data.classes=['a', 'b']", "data: a regression has target_range = [low, high] and no classes"),
    (REGRESSION, "data.target=x1", "the target is not one of the columns"),
    (REGRESSION, "data.shape=[1, 2, 3]", "data: a table lists its [[data.columns]] and has no shape"),
    (IMAGES, "preprocessing.standardise=true", 'need scope = "federated" or "per-node"'),
    (IMAGES, "evaluation.on=validation", 'on = "validation" needs validation_fraction above 0'),
    (IMAGES, "name=Two Words", 'name: expected'),
    (IMAGES, "seed=-1", "seed: expected greater than or equal to 0, got -1"),
    (IMAGES, f"seed={2**63}", f"seed: expected less than {2**63}"),
    (IMAGES, "kind=evaluate", "kind: expected 'train' or 'statistics', got \"evaluate\""),
    (IMAGES, "simulate.nodes=0", "simulate.nodes: expected greater than or equal to 1, got 0"),
    (IMAGES, "simulate.node=3", "simulate.node: unknown key. Did you mean nodes?"),
    (IMAGES, "about.titel=x", "about.titel: unknown key. Did you mean title?"),
    (IMAGES, "privacy={mode='plain', dp={}}", "privacy.dp.unit: missing"),
    (IMAGES, "privacy={mode='plain', dp={unit='person'}}", "privacy.dp.unit: expected 'record' or 'node'"),
    (IMAGES, RECORD.replace("3.0", "-1"), "privacy.dp.epsilon: expected greater than or equal to 0.001, got -1"),
    (IMAGES, RECORD.replace("3.0", "nan"), "privacy.dp.epsilon: expected a finite number, got NaN"),
    (IMAGES, RECORD.replace("1e-5", "0.5"), "privacy.dp.delta: expected less than or equal to 0.001, got 0.5"),
    (IMAGES, RECORD.replace("clip", "clipp"), "privacy.dp.clipp: unknown key. Did you mean clip?"),
    (IMAGES, "model={}", "model"),
    (IMAGES, "strategy.tau=1", "strategy"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "override", "words"), MISTAKES, ids=[override for _, override, _ in MISTAKES])
def test_a_mistake_names_file_key_expected_and_got(text: str, override: str, words: str) -> None:
    words = words.replace("name: expected", "name: String should match") if "Two Words" in override else words
    with pytest.raises(PlanError, match=re.escape(words)) as caught:
        plan_of(text, override)
    assert str(caught.value).startswith("plan.toml: ")
    assert len(str(caught.value)) < 400


NOT_COVERED = [
    (REGRESSION, (RECORD, *SOLVED), "least-squares sends exact sums of products"),
    (REGRESSION, (NODE, *SOLVED), "least-squares sends exact sums of products"),
    (REGRESSION, (RECORD, FITTED[0]), "nothing may be fitted to the rows before training"),
    (REGRESSION, (NODE, FITTED[1]), 'does not cover the exact sums of preprocessing.scope = "federated"'),
    (IMAGES, (RECORD, "training.gradient_clip=1.0"), "its place is privacy.dp.clip"),
    (IMAGES, (RECORD, "training.precision=bf16"), 'needs training.precision = "fp32"'),
    (IMAGES, (NODE, "rounds.update_bound=5.0"), "set privacy.dp.clip and rounds.update_bound equal, got 10 and 5"),
]


@pytest.mark.parametrize(("text", "overrides", "words"), NOT_COVERED, ids=[words for _, _, words in NOT_COVERED])
def test_differential_privacy_is_refused_where_it_would_promise_more_than_it_keeps(
    text: str, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(PlanError, match=re.escape(words)):
        plan_of(text, *overrides)


def test_a_plan_says_where_its_noise_comes_from() -> None:
    assert plan_of(IMAGES).noise == "none"
    assert plan_of(IMAGES, RECORD).noise == plan_of(IMAGES, RECORD, "privacy.mode=private").noise == "dp-sgd"
    assert plan_of(IMAGES, NODE).noise == "distributed"
    assert plan_of(IMAGES, NODE, "privacy.mode=plain").noise == "central"
    assert plan_of(IMAGES).is_repeatable
    assert not plan_of(IMAGES, RECORD).is_repeatable


def test_a_plan_without_differential_privacy_has_no_key_of_it_and_keeps_its_digest() -> None:
    assert "dp" not in plan_of(IMAGES).document()["privacy"]
    assert plan_of(IMAGES, RECORD).digest != plan_of(IMAGES).digest
    for plan in (plan_of(IMAGES), plan_of(IMAGES, RECORD), plan_of(IMAGES, NODE)):
        assert parse_plan_document(plan.document()) == plan


def test_another_mode_keeps_the_promise_of_differential_privacy() -> None:
    assert plan_of(IMAGES, RECORD, "privacy.mode=private").privacy.dp == plan_of(IMAGES, RECORD).privacy.dp


def test_every_mistake_is_named_once() -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(IMAGES, "rounds.count=0", "training.batch_size=0", "seed=-1")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["seed", "training.batch_size", "rounds.count"]


def test_a_missing_section_is_named() -> None:
    with pytest.raises(PlanError, match=r"plan\.toml: data: missing\. Add it[^\n]*\nplan\.toml: model: missing"):
        parse_plan('name = "x"', "plan.toml")


@pytest.mark.parametrize("override", ["model={}", "strategy.tau=1"])
def test_a_section_without_its_name_says_that_the_name_is_missing(override: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(IMAGES, override)
    assert ".name: " in str(caught.value)
    assert "discriminator" not in str(caught.value)


def test_a_section_that_is_no_table_is_named_without_a_dangling_dot() -> None:
    with pytest.raises(PlanError, match="simulate: expected an object, got 3"):
        plan_of(IMAGES, "simulate=3")


def test_federated_preprocessing_names_the_columns_without_a_range() -> None:
    with pytest.raises(PlanError, match=r"each number column needs range = \[low, high\]; missing for: x0$"):
        one_column_plan("preprocessing.scope=federated", column_range="")


def test_a_date_does_not_become_a_name() -> None:
    with pytest.raises(PlanError):
        plan_of(IMAGES, "name=1979-05-27")


class TestOverrides:
    def test_set_values_of_each_type(self) -> None:
        plan = plan_of(
            IMAGES, "rounds.count=5", "training.learning_rate=1", "training.optimiser=adam", "rounds.quorum=all"
        )
        assert (plan.rounds.count, plan.rounds.quorum, plan.training.optimiser) == (5, "all", "adam")
        assert type(plan.training.learning_rate) is float

    def test_the_last_one_wins(self) -> None:
        assert plan_of(IMAGES, "rounds.count=5", "rounds.count=6").rounds.count == 6

    def test_another_strategy_starts_from_its_own_defaults(self) -> None:
        text = IMAGES + '[strategy]\nname = "fedadam"\ntau = 0.5\n'
        changed = plan_of(text, "strategy.name=fedprox", "strategy.mu=0.25").strategy
        assert changed.model_dump() == {"name": "fedprox", "mu": 0.25}

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("rounds.count", "expected KEY=VALUE"),
            ("=3", "expected KEY=VALUE"),
            ("name.first=3", "name is not a section"),
        ],
    )
    def test_refuses_what_is_no_key_and_value(self, override: str, words: str) -> None:
        with pytest.raises(PlanError, match=words):
            plan_of(IMAGES, override)

    def test_simulate_and_about_are_not_part_of_the_digest(self) -> None:
        loaded = parse_plan(IMAGES, "f", ["simulate.nodes=3", "about.title=Bilder"])
        assert (loaded.simulate.nodes, loaded.about.title) == (3, "Bilder")
        assert loaded.plan.digest == plan_of(IMAGES).digest


class TestLoading:
    @pytest.mark.parametrize("name", ALL_SHIPPED)
    def test_each_shipped_plan_is_valid_and_named_as_its_file(self, name: str) -> None:
        loaded = load_plan(name)
        assert (loaded.plan.name, loaded.source) == (name, name)
        assert all([loaded.about.title, loaded.about.title_zh, loaded.about.target])

    def test_there_are_shipped_plans(self) -> None:
        assert "digits-cnn" in ALL_SHIPPED

    def test_an_unknown_name_suggests_the_nearest(self) -> None:
        with pytest.raises(PlanError, match=r"no plan 'digits-cn'.*Did you mean digits-cnn\?"):
            load_plan("digits-cn")

    def test_reads_a_file_by_its_path(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.toml"
        file.write_text(IMAGES, "utf-8")
        assert load_plan(str(file)).plan == plan_of(IMAGES)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"name = \n", "not valid TOML"),
            (b"name = '\xff'", "expected UTF-8 text, got other bytes at offset 8"),
            (b"#" * (1 << 20) + b"\n", "expected a plan of at most 1048576 bytes, got 1048577"),
        ],
    )
    def test_a_damaged_file_is_named(self, tmp_path: Path, content: bytes, words: str) -> None:
        file = tmp_path / "mine.toml"
        file.write_bytes(content)
        with pytest.raises(PlanError, match=words) as caught:
            load_plan(str(file))
        assert str(caught.value).startswith(f"{file}: ")

    def test_refuses_a_file_of_a_hundred_thousand_brackets(self, tmp_path: Path) -> None:
        (tmp_path / "deep.toml").write_text("x = " + "[" * 100_000)
        with pytest.raises(PlanError):
            load_plan(str(tmp_path / "deep.toml"))


class TestDigest:
    def test_canonical_bytes_hold_every_default_and_hash_to_the_digest(self) -> None:
        plan = plan_of(IMAGES)
        assert hashlib.sha256(plan.canonical).hexdigest() == plan.digest
        document = json.loads(plan.canonical)
        assert document["schema"] == "concord/plan/1"
        assert document["rounds"]["grace_s"] == (30.0).hex()
        assert document["strategy"] == {"name": "fedavg"}
        left_out = {"statistics", "compression"}  # where they say nothing
        assert document.keys() == {"schema", *type(plan).model_fields} - left_out

    def test_writing_a_default_out_does_not_change_it(self) -> None:
        assert plan_of(IMAGES, "rounds.count=10", "training.learning_rate=0.1").digest == plan_of(IMAGES).digest

    def test_order_and_spelling_of_the_file_do_not_change_it(self) -> None:
        head, _, model = IMAGES.replace('"', "'").partition("[model]")
        name, _, data = head.partition("[data]")
        text = f"# spelt otherwise{name}[model]{model}[data] # sic{data}"
        assert plan_of(text).digest == plan_of(IMAGES).digest

    @pytest.mark.parametrize(
        "override", ["seed=1", "rounds.weight_cap=1001", "rounds.cohort=1", "training.deterministic=false", "name=b"]
    )
    def test_a_change_of_meaning_changes_it(self, override: str) -> None:
        assert plan_of(IMAGES, override).digest != plan_of(IMAGES).digest

    def test_one_node_and_a_share_of_all_are_different_cohorts(self) -> None:
        digests = {plan_of(IMAGES, f"rounds.cohort={share}").digest for share in ("1", "0.5", "all", "2")}
        assert len(digests) == 4

    def test_committed_vector(self, vectors: dict[str, Any]) -> None:
        assert load_plan("digits-cnn").plan.digest == vectors["digits-cnn"]["plan_digest"]

    @pytest.mark.parametrize("name", ALL_SHIPPED)
    def test_a_plan_is_the_same_after_its_document_travelled_as_json(self, name: str) -> None:
        plan = load_plan(name).plan
        back = parse_plan_document(json.loads(json.dumps(plan.document())))
        assert back == plan
        assert back.canonical == plan.canonical

    @given(st.floats(1e-300, 1e300), st.integers(0, 2**63 - 1))
    def test_no_number_is_rounded_on_the_way(self, rate: float, seed: int) -> None:
        plan = plan_of(IMAGES, f"training.learning_rate={rate!r}", f"seed={seed}")
        assert (plan.training.learning_rate, plan.seed) == (rate, seed)
        assert parse_plan_document(json.loads(json.dumps(plan.document()))).digest == plan.digest

    def test_another_seed_is_another_plan_also_when_the_digest_was_read_before(self) -> None:
        plan = plan_of(IMAGES)
        before = plan.digest
        assert plan.with_seed(7).seed == 7
        assert plan.with_seed(7).digest == plan_of(IMAGES, "seed=7").digest != before
        assert plan.with_seed(7).canonical == plan_of(IMAGES, "seed=7").canonical

    @pytest.mark.parametrize("seed", [-1, 2**63])
    def test_another_seed_is_checked_as_in_a_file(self, seed: int) -> None:
        with pytest.raises((UsageError, ValidationError)):
            plan_of(IMAGES).with_seed(seed)

    def test_equal_plans_have_equal_digests_also_at_minus_zero(self) -> None:
        one, other = (plan_of(IMAGES, f"training.weight_decay={zero}") for zero in ("0.0", "-0.0"))
        assert one == other
        assert one.digest == other.digest

    def test_a_document_of_another_schema_is_refused(self) -> None:
        document = plan_of(IMAGES).document() | {"schema": "concord/plan/2"}
        with pytest.raises((UsageError, ValidationError)):
            parse_plan_document(document)


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        plan_of(IMAGES).rounds.count = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("share", "total", "expected"),
    [("all", 7, 7), (3, 7, 3), (0.5, 4, 2), (0.1, 100, 10), (0.001, 10, 1), (0.999, 10, 10), (1, 1, 1)],
)
def test_share_of(share: Any, total: int, expected: int) -> None:
    assert share_of(share, total) == expected


@pytest.mark.parametrize("total", [5, 9])
def test_a_quorum_of_one_half_is_never_less_than_half(total: int) -> None:
    assert share_of(0.5, total) >= math.ceil(total / 2)


class TestRobust:
    """`privacy.mode = "robust"`: a plan that cannot keep its word is refused before anybody is asked."""

    def test_is_exclusive_with_masks(self) -> None:
        plan = plan_of(IMAGES, "privacy={mode='robust', attackers=3}")
        assert plan.privacy == Robust(mode="robust", rule="nnm-trimmed-mean", attackers=3, quarantine_after=3)
        with pytest.raises(PlanError, match=r"privacy\.attackers: unknown key"):
            plan_of(IMAGES, "privacy={mode='private', attackers=3}")

    @pytest.mark.parametrize("key", ["cohort", "quorum"])
    @pytest.mark.parametrize("nodes", [1, 5, 6])
    def test_attackers_cannot_be_half_of_a_round(self, key: str, nodes: int) -> None:
        with pytest.raises(PlanError, match=rf"rounds\.{key} of {nodes} nodes cannot outvote .* at least 7"):
            plan_of(IMAGES, "privacy={mode='robust', attackers=3}", f"rounds.{key}={nodes}")
        assert plan_of(IMAGES, "privacy={mode='robust', attackers=3}", f"rounds.{key}=7").rounds

    def test_exact_moments_are_refused(self) -> None:
        overrides = ["strategy.name=least-squares", "rounds.count=1", "privacy.mode=robust"]
        with pytest.raises(PlanError, match="in which one node can hide anything"):
            one_column_plan(*overrides)

    def test_preprocessing_of_each_node_alone_is_allowed(self) -> None:
        assert plan_of(TABLE, "preprocessing.scope=per-node", "privacy.mode=robust").privacy.mode == "robust"

    def test_more_nodes_than_can_be_compared_are_refused(self) -> None:
        with pytest.raises(PlanError, match="robust mode compares at most 1000"):
            plan_of(IMAGES, "privacy.mode=robust", "rounds.cohort=1001")
