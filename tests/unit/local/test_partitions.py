import re
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from concord_client.data import RawData, Split
from concord_local.partitions import deal, is_natural
from concord_shared.errors import ConcordError, DataError, UsageError
from helpers import IMAGES, REGRESSION, plan_of

CLASSES, REAL = plan_of(IMAGES).data, plan_of(REGRESSION).data
RULES = st.sampled_from(["iid", "dirichlet:0.1", "dirichlet:5", "shards:2", "shards:3", "quantity:0.5"])


def data_of(targets: Any, split: Any = None, **groups: Any) -> RawData:
    return RawData(np.zeros((len(targets), 1)), np.asarray(targets), split, {k: np.array(v) for k, v in groups.items()})


def random_data(seed: int, rows: int, own_split: bool, regression: bool) -> RawData:
    rng = np.random.default_rng(seed)
    split = rng.choice([Split.TRAIN, Split.TEST], rows, p=[0.8, 0.2]).astype(np.uint8) if own_split else None
    return data_of(rng.normal(size=rows) if regression else rng.integers(0, 3, rows), split)


@given(RULES, st.integers(1, 8), st.integers(40, 300), st.booleans(), st.booleans(), st.integers(0, 9))
def test_every_row_goes_to_exactly_one_node_the_same_one_every_time(
    rule: str, nodes: int, rows: int, own_split: bool, regression: bool, seed: int
) -> None:
    data, contract = random_data(seed, rows, own_split, regression), REAL if regression else CLASSES
    try:
        dealt = deal(data, contract, rule, nodes, seed)
    except DataError:
        assume(False)
    assert len(dealt) == nodes
    assert sorted(np.concatenate(list(dealt.values()))) == list(range(rows))
    training = np.arange(rows) if data.split is None else np.flatnonzero(data.split == Split.TRAIN)
    assert all(np.isin(own, training).any() for own in dealt.values())
    again = deal(data, contract, rule, nodes, seed)
    assert again.keys() == dealt.keys()
    assert all(np.array_equal(again[name], own) for name, own in dealt.items())


@pytest.mark.parametrize("rule", ["iid", "dirichlet:1", "shards:2", "quantity:1"])
def test_another_seed_deals_otherwise(rule: str) -> None:
    data = data_of(np.arange(200) % 3)
    one, other = (deal(data, CLASSES, rule, 4, seed) for seed in (1, 2))
    assert any(not np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("nodes", "names"), [(3, ["node-1", "node-3"]), (10, ["node-01", "node-10"])])
def test_names_sort_as_they_count(nodes: int, names: list[str]) -> None:
    dealt = deal(data_of(np.arange(100) % 3), CLASSES, "iid", nodes, 0)
    assert [next(iter(dealt)), list(dealt)[-1]] == names
    assert list(dealt) == sorted(dealt)


class TestRules:
    def counts(self, dealt: dict[str, np.ndarray], targets: np.ndarray, classes: int) -> np.ndarray:
        return np.array([np.bincount(targets[rows], minlength=classes) for rows in dealt.values()])

    def test_iid_gives_equal_counts_of_mixed_classes(self) -> None:
        targets = np.sort(np.arange(3001) % 3)
        dealt = deal(data_of(targets), CLASSES, "iid", 4, 0)
        assert sorted(len(rows) for rows in dealt.values()) == [750, 750, 750, 751]
        assert self.counts(dealt, targets, 3).min() > 200

    def test_shards_are_pure_and_as_many_as_asked_for(self) -> None:
        """McMahan et al. 2017: 2 shards a node, of one class each where the counts allow it."""
        targets = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
        counts = self.counts(deal(data_of(targets), CLASSES, "shards:2", 20, 0), targets, 10)
        assert counts.sum(1).tolist() == [50] * 20
        assert (counts > 0).sum(1).max() == 2
        assert set(np.unique(counts)) <= {0, 25, 50}

    def test_shards_of_the_test_rows_are_those_of_the_training_rows(self) -> None:
        targets = np.tile(np.repeat(np.arange(10), 20), 2)
        split = np.repeat([Split.TRAIN, Split.TEST], 200).astype(np.uint8)
        for rows in deal(data_of(targets, split), CLASSES, "shards:1", 10, 3).values():
            assert len(rows) == 40
            assert len(set(targets[rows])) == 1

    def test_dirichlet_is_nearly_even_for_a_large_alpha(self) -> None:
        targets = np.arange(3000) % 3
        counts = self.counts(deal(data_of(targets), CLASSES, "dirichlet:100000", 5, 0), targets, 3)
        assert counts == pytest.approx(200, abs=10)

    def test_dirichlet_is_uneven_for_a_small_alpha(self) -> None:
        targets = np.arange(3000) % 3
        counts = self.counts(deal(data_of(targets), CLASSES, "dirichlet:0.1", 5, 0), targets, 3)
        assert counts.max() > 600
        assert counts.min() < 20

    def test_dirichlet_deals_test_rows_by_the_same_proportions(self) -> None:
        targets = np.tile(np.arange(1000) % 3, 2)
        split = np.repeat([Split.TRAIN, Split.TEST], 1000).astype(np.uint8)
        for rows in deal(data_of(targets, split), CLASSES, "dirichlet:0.5", 6, 1).values():
            train, test = (np.bincount(targets[rows[split[rows] == s]], minlength=3) for s in (0, 2))
            assert train == pytest.approx(test, abs=1)

    def test_quantity_is_uneven_in_counts_and_even_in_classes(self) -> None:
        targets = np.arange(6000) % 3
        counts = self.counts(deal(data_of(targets), CLASSES, "quantity:0.5", 5, 0), targets, 3)
        sizes = counts.sum(1)
        assert sizes.max() > 3 * sizes.min()
        largest = counts[sizes.argmax()]
        assert largest / largest.sum() == pytest.approx(1 / 3, abs=0.05)

    def test_a_regression_is_dealt_by_tenths_of_its_target(self) -> None:
        targets = np.random.default_rng(0).permutation(1000) / 10.0
        for rows in deal(data_of(targets), REAL, "shards:1", 10, 0).values():
            assert np.ptp(targets[rows]) < 10

    @pytest.mark.parametrize("rule", ["dirichlet:0.5", "quantity:0.5"])
    def test_nobody_is_left_with_almost_nothing(self, rule: str) -> None:
        for seed in range(5):
            dealt = deal(data_of(np.arange(1000) % 3), CLASSES, rule, 10, seed)
            assert min(len(rows) for rows in dealt.values()) >= 10

    def test_gives_up_with_advice(self) -> None:
        with pytest.raises(DataError, match="quantity:1e-05 leaves a node with almost no rows in 1000 draws; raise"):
            deal(data_of(np.arange(100) % 3), CLASSES, "quantity:1e-05", 10, 0)


class TestNatural:
    DATA = data_of([0, 1, 2, 0, 1], site=["Ulm", "Köln am Rhein", "Ulm", "", "ulm-2"], directory=list("bbaab"))

    def test_one_node_for_each_value(self) -> None:
        dealt = deal(self.DATA, CLASSES, "natural:site", None, 0)
        assert {name: rows.tolist() for name, rows in dealt.items()} == {
            "koln-am-rhein": [1],
            "site-e3b0c4": [3],
            "ulm": [0, 2],
            "ulm-2": [4],
        }

    @given(st.lists(st.text(max_size=80).map(lambda text: text.replace("\0", "")), min_size=1, max_size=5))
    def test_names_are_short_and_plain_whatever_the_script(self, site: list[str]) -> None:
        try:
            dealt = deal(data_of(np.zeros(len(site), int), site=site), CLASSES, "natural:site", None, 0)
        except DataError:
            assume(False)
        assert all(re.fullmatch("[a-z0-9][a-z0-9-]{0,62}", name) for name in dealt)
        assert sorted(np.concatenate(list(dealt.values()))) == list(range(len(site)))

    def test_values_in_another_script_get_names_of_their_own(self) -> None:
        dealt = deal(data_of([0, 1, 2], site=["北京", "上海", "北京"]), CLASSES, "natural:site", None, 0)
        assert sorted(rows.tolist() for rows in dealt.values()) == [[0, 2], [1]]
        assert all(name.startswith("site-") for name in dealt)

    def test_one_node_for_each_directory(self) -> None:
        dealt = deal(self.DATA, CLASSES, "directory", 2, 0)
        assert {name: rows.tolist() for name, rows in dealt.items()} == {"a": [2, 3], "b": [0, 1, 4]}

    @given(st.lists(st.sampled_from(["A", "b", "c c", "1"]), min_size=1, max_size=30), st.integers(0, 3))
    def test_is_total_and_needs_no_seed(self, site: list[str], seed: int) -> None:
        data = data_of(np.zeros(len(site), int), site=site)
        dealt = deal(data, CLASSES, "natural:site", None, seed)
        assert sorted(np.concatenate(list(dealt.values()))) == list(range(len(site)))
        assert all(len({site[row] for row in rows}) == 1 for rows in dealt.values())

    def test_two_values_of_one_name_are_refused(self) -> None:
        with pytest.raises(DataError, match="two values give the same node name"):
            deal(data_of([0, 1], site=["St. Ulm", "st ulm"]), CLASSES, "natural:site", None, 0)

    def test_a_column_that_is_not_there_lists_those_that_are(self) -> None:
        with pytest.raises(UsageError, match="natural:town: the data have no such column; found site, directory"):
            deal(self.DATA, CLASSES, "natural:town", None, 0)

    def test_another_number_of_nodes_is_refused(self) -> None:
        with pytest.raises(UsageError, match="--nodes 3: column directory makes 2 nodes"):
            deal(self.DATA, CLASSES, "directory", 3, 0)

    def test_knows_which_are_natural(self) -> None:
        assert is_natural("directory")
        assert is_natural("natural:site")
        assert not is_natural("iid")


class TestGrouped:
    GUESTS = np.array([f"guest {number % 25}" for number in range(200)])

    def test_all_rows_of_a_value_are_at_one_node_and_values_are_dealt_evenly(self) -> None:
        data = data_of(np.arange(200) % 3, guest=self.GUESTS)
        dealt = deal(data, CLASSES, "grouped:guest", 4, 1)
        assert list(dealt) == ["node-1", "node-2", "node-3", "node-4"]
        assert sorted(np.concatenate(list(dealt.values())).tolist()) == list(range(200))
        guests = [set(self.GUESTS[rows]) for rows in dealt.values()]
        assert sorted(map(len, guests)) == [6, 6, 6, 7]
        assert len(set.union(*guests)) == 25

    def test_another_seed_deals_otherwise(self) -> None:
        data = data_of(np.arange(200) % 3, guest=self.GUESTS)
        first, second = (deal(data, CLASSES, "grouped:guest", 4, seed)["node-1"].tolist() for seed in (1, 2))
        assert first != second

    def test_more_nodes_than_values_are_refused(self) -> None:
        with pytest.raises(UsageError, match="column guest has only 25 values"):
            deal(data_of(np.arange(200) % 3, guest=self.GUESTS), CLASSES, "grouped:guest", 26, 0)

    def test_a_column_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(UsageError, match="grouped:town: the data have no such column; found guest"):
            deal(data_of(np.arange(200) % 3, guest=self.GUESTS), CLASSES, "grouped:town", 3, 0)


class TestRefuses:
    def refused(self, spec: str, words: str, nodes: int | None = 3) -> None:
        with pytest.raises(UsageError, match=words):
            deal(data_of(np.arange(30) % 3), CLASSES, spec, nodes, 0)

    @pytest.mark.parametrize("spec", ["", "even", "iid:3", "Dirichlet:1"])
    def test_an_unknown_rule(self, spec: str) -> None:
        self.refused(
            spec, "expected iid, dirichlet:ALPHA, shards:K, quantity:ALPHA, grouped:COLUMN, natural:COLUMN or directory"
        )

    @pytest.mark.parametrize("value", ["", "0", "-1", "x", "nan", "inf", "1e6"])
    @pytest.mark.parametrize("rule", ["dirichlet", "quantity", "shards"])
    def test_a_parameter_out_of_range(self, rule: str, value: str) -> None:
        self.refused(f"{rule}:{value}", f"number above 0 and below 1,000,000 after the colon, got '{value}'")

    def test_half_a_shard(self) -> None:
        self.refused("shards:1.5", "expected a whole number above 0")

    def test_no_number_of_nodes(self) -> None:
        self.refused("iid", "say how many nodes with --nodes", None)

    def test_more_nodes_than_rows(self) -> None:
        self.refused("iid", r"--nodes 31: more nodes than training rows \(30\)", 31)

    def test_more_nodes_than_training_rows(self) -> None:
        split = np.array([0, 0, 2, 2, 2], np.uint8)
        with pytest.raises(UsageError, match=r"more nodes than training rows \(2\)"):
            deal(data_of(np.zeros(5, int), split), CLASSES, "iid", 3, 0)

    @pytest.mark.parametrize("nodes", [0, -1])
    def test_less_than_one_node(self, nodes: int) -> None:
        with pytest.raises(ConcordError, match="nodes"):
            deal(data_of(np.arange(30) % 3), CLASSES, "iid", nodes, 0)
