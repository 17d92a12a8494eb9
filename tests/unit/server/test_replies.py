"""One test for each refusal, named after the attack. Every attack starts from an honest reply."""

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from hypothesis import given
from hypothesis import strategies as st

from concord_server.replies import Expectation, accept_reply
from concord_shared.blocks import LANES, Block, encode_update, lanes_of
from concord_shared.errors import UpdateRefusedError
from concord_shared.fitting import programme_of
from concord_shared.messages import RING, decline
from concord_shared.metrics import ClassificationSums, metrics_block
from concord_shared.quantiser import levels_of
from concord_shared.strategies import strategy_for
from concord_shared.tensors import Layout
from concord_shared.transport import NodeEntry
from helpers import IMAGES, REGRESSION, TABLE, offer_of, plan_of, reply_of, request_of

ROWS, WEIGHT_CAP, NODES = 100, 400, 10
LEVELS = levels_of(32, NODES)
DELTA = Block("delta", 5, "examples", bound=1.0)
CONTRACT = plan_of(IMAGES).data
TABLE_PLAN = plan_of(TABLE)

TRAINING = Expectation(offer_of(), NodeEntry("alpha", 2, ROWS, 20), (DELTA, LANES), WEIGHT_CAP, CONTRACT)
EVALUATION = replace(TRAINING, offer=offer_of(kind="evaluate"), blocks=(metrics_block(CONTRACT), LANES))
STATISTICS = replace(
    TRAINING,
    offer=offer_of(kind="statistics", round_number=1),
    blocks=(programme_of(TABLE_PLAN).block(1), LANES),
    contract=TABLE_PLAN.data,
    programme=programme_of(TABLE_PLAN),
)


def honest_update(vector: Any = (0.3, -0.4, 0, 0, 0), rows: int = ROWS) -> dict[str, np.ndarray]:
    blocks = encode_update((DELTA,), {"delta": np.array(vector, np.float32)}, rows, WEIGHT_CAP, NODES).blocks
    return {name: values.copy() for name, values in blocks.items()}


def honest_metrics(rows: int = 3) -> dict[str, np.ndarray]:
    probabilities, targets = np.full((rows, 3), 1 / 3, np.float32), np.arange(rows) % 3
    sums = ClassificationSums.of(CONTRACT, 1.5, probabilities, targets)
    return {"metrics": sums.vector, "lanes": lanes_of(ROWS, WEIGHT_CAP)}


def honest_statistics(rows: int = ROWS) -> dict[str, np.ndarray]:
    raw = np.stack([np.full(rows, 120.0), np.full(rows, 1.0), np.full(rows, 5.0)], 1)
    sums = programme_of(TABLE_PLAN).measure(1, [(raw, None)], {}, offer_of().rows_max)
    return {"statistics": sums, "lanes": lanes_of(ROWS, WEIGHT_CAP)}


def refused(message: Message, reason: str, words: str = ":", expected: Expectation = TRAINING) -> None:
    with pytest.raises(UpdateRefusedError, match=words) as caught:
        accept_reply(message, expected)
    assert caught.value.reason == reason


def with_array(array: Array, name: str = "delta") -> Message:
    """The honest reply with one block replaced."""
    message = reply_of(TRAINING.offer, honest_update())
    message.content["blocks"] = ArrayRecord(dict(message.content.array_records["blocks"]) | {name: array})
    return message


class TestHonest:
    def test_an_update_is_accepted_as_it_was_sent(self) -> None:
        sent = honest_update()
        accepted = accept_reply(reply_of(TRAINING.offer, sent), TRAINING)
        assert {name: values.tolist() for name, values in accepted.items()} == {
            name: values.tolist() for name, values in sent.items()
        }

    def test_metrics_and_statistics_are_accepted(self) -> None:
        accept_reply(reply_of(EVALUATION.offer, honest_metrics()), EVALUATION)
        accept_reply(reply_of(STATISTICS.offer, honest_statistics()), STATISTICS)

    def test_a_node_without_rows_may_evaluate(self) -> None:
        lanes = lanes_of(1, WEIGHT_CAP)
        node = NodeEntry("alpha", 2, 0, 20)
        accept_reply(reply_of(EVALUATION.offer, honest_metrics() | {"lanes": lanes}), replace(EVALUATION, node=node))

    @given(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5),
        st.integers(1, 3000),
        st.integers(1, 3000),
        st.integers(1, 1000),
        st.floats(1e-2, 1e2),
    )
    def test_every_update_of_an_honest_node_is_accepted(
        self, vector: list[float], rows: int, weight_cap: int, nodes: int, bound: float
    ) -> None:
        self.send(vector, rows, weight_cap, nodes, bound, 32)

    @pytest.mark.parametrize(("rows", "weight_cap", "nodes"), [(2, 10_000, 1000), (2, 1000, 10_000)])
    def test_a_clipped_update_of_a_small_node_is_accepted_at_64_bits(
        self, rows: int, weight_cap: int, nodes: int
    ) -> None:
        self.send([30, 40, 0, 0, 0], rows, weight_cap, nodes, 1.0, 64)

    def send(self, vector: list[float], rows: int, weight_cap: int, nodes: int, bound: float, ring_bits: Any) -> None:
        block = Block("delta", 5, "examples", bound, ring_bits)
        sent = encode_update((block,), {"delta": np.array(vector, np.float32)}, rows, weight_cap, nodes)
        offer = offer_of(nodes_max=nodes)
        expected = Expectation(offer, NodeEntry("alpha", 2, rows, 0), (block, LANES), weight_cap, CONTRACT)
        accept_reply(reply_of(offer, sent.blocks), expected)


class TestBinding:
    def test_refuses_an_error_with_its_reason(self) -> None:
        refused(decline(request_of(TRAINING.offer), "out of policy"), "declined", "out of policy")

    def test_refuses_an_error_and_keeps_its_reason_short(self) -> None:
        with pytest.raises(UpdateRefusedError) as caught:
            accept_reply(decline(request_of(TRAINING.offer), "x" * 10_000_000), TRAINING)
        assert len(str(caught.value)) < 600

    @pytest.mark.parametrize(
        "changes",
        [
            {"run": "run-2"},
            {"node": "beta"},
            {"plan_digest": "q" * 64},
            {"model_digest": "n" * 64},
            {"layout_digest": "k" * 64},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_refuses_a_foreign_binding(self, changes: dict[str, Any]) -> None:
        refused(reply_of(offer_of(**changes), honest_update()), "foreign", next(iter(changes)))

    @pytest.mark.parametrize("round_number", [2, 4])
    def test_refuses_a_foreign_round(self, round_number: int) -> None:
        refused(reply_of(offer_of(round_number=round_number), honest_update()), "foreign", "round_number is")

    def test_refuses_a_replayed_attempt(self) -> None:
        second = replace(TRAINING, offer=offer_of(attempt=2))
        refused(reply_of(offer_of(attempt=1), honest_update()), "foreign", "attempt", second)

    def test_refuses_an_answer_to_another_kind_of_step(self) -> None:
        refused(reply_of(offer_of(kind="evaluate"), honest_update()), "foreign", "kind is 'evaluate'")

    def test_refuses_a_reply_without_a_binding(self) -> None:
        message = reply_of(TRAINING.offer, honest_update())
        del message.content["binding"]
        refused(message, "foreign", "run is 'None'")

    def test_refuses_a_binding_without_a_field(self) -> None:
        message = reply_of(TRAINING.offer, honest_update())
        del message.content.config_records["binding"]["attempt"]
        refused(message, "foreign", "attempt is 'None'")

    def test_refuses_numbers_as_text(self) -> None:
        message = reply_of(TRAINING.offer, honest_update())
        message.content["binding"] = ConfigRecord({**TRAINING.offer.binding, "round_number": "3"})
        refused(message, "foreign", "round_number is '3'")

    def test_refuses_a_huge_binding_with_a_short_message(self) -> None:
        message = reply_of(TRAINING.offer, honest_update())
        message.content["binding"] = ConfigRecord({**TRAINING.offer.binding, "run": "x" * 1_000_000})
        with pytest.raises(UpdateRefusedError) as caught:
            accept_reply(message, TRAINING)
        assert len(str(caught.value)) < 300


class TestLayout:
    def test_refuses_a_missing_block(self) -> None:
        blocks = honest_update()
        del blocks["delta"]
        refused(reply_of(TRAINING.offer, blocks), "layout", r"got \['lanes'\]")

    def test_refuses_missing_lanes(self) -> None:
        blocks = honest_update()
        del blocks["lanes"]
        refused(reply_of(TRAINING.offer, blocks), "layout", r"got \['delta'\]")

    def test_refuses_an_extra_block(self) -> None:
        refused(reply_of(TRAINING.offer, honest_update() | {"gradient": np.zeros(1, "<i4")}), "layout", "gradient")

    def test_refuses_a_hundred_thousand_blocks_with_a_short_message(self) -> None:
        blocks = {f"block-{i}": np.zeros(0, "<i4") for i in range(10_000)}
        with pytest.raises(UpdateRefusedError) as caught:
            accept_reply(reply_of(TRAINING.offer, blocks), TRAINING)
        assert len(str(caught.value)) < 1000

    def test_refuses_no_blocks_at_all(self) -> None:
        message = reply_of(TRAINING.offer, honest_update())
        del message.content["blocks"]
        refused(message, "layout")

    @pytest.mark.parametrize("bad", [np.nan, np.inf, 0.5])
    def test_refuses_nan_block_sent_as_float(self, bad: float) -> None:
        values = np.full(5, bad, "<f4")
        refused(with_array(Array("float32", (5,), RING, values.tobytes())), "layout", "float32")

    def test_refuses_integers_of_another_ring(self) -> None:
        refused(reply_of(TRAINING.offer, honest_update() | {"delta": np.zeros(5, "<i8")}), "layout", "int64")

    def test_refuses_broadcastable_shape_1(self) -> None:
        refused(reply_of(TRAINING.offer, honest_update() | {"delta": np.ones(1, "<i4")}), "layout", r"\[1\]")

    @pytest.mark.parametrize("shape", [(5, 1), (1, 5), (4,), (6,), (0,), ()])
    def test_refuses_another_shape(self, shape: tuple[int, ...]) -> None:
        refused(reply_of(TRAINING.offer, honest_update() | {"delta": np.zeros(shape, "<i4")}), "layout")

    def test_refuses_huge_claimed_shape_without_allocation(self) -> None:
        message = with_array(Array("int32", (1 << 45,), RING, b"\0" * 20))
        tracemalloc.start()
        refused(message, "layout", "got")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20

    @pytest.mark.parametrize("size", [0, 4, 19, 21, 4096])
    def test_refuses_right_shape_with_other_bytes(self, size: int) -> None:
        refused(with_array(Array("int32", (5,), RING, b"\0" * size)), "layout", f"expected 20 bytes, got {size}")

    def test_refuses_numpy_file_bytes(self) -> None:
        refused(with_array(Array("int32", (5,), "numpy.ndarray", b"\0" * 20)), "layout", "numpy.ndarray")


class TestWeight:
    def changed(self, index: int, value: int) -> Message:
        blocks = honest_update()
        blocks["lanes"][index] = value
        return reply_of(TRAINING.offer, blocks)

    def test_refuses_weight_above_registered_rows(self) -> None:
        honest = honest_update()["lanes"][0]
        refused(self.changed(0, honest + 1), "weight", "the weight of its registered rows")
        refused(reply_of(TRAINING.offer, honest_update(rows=ROWS + 1)), "weight")

    @pytest.mark.parametrize("weight", [0, -1, -(2**63), 2**63 - 1])
    def test_refuses_weight_that_is_none_or_negative_or_huge(self, weight: int) -> None:
        refused(self.changed(0, weight), "weight")

    @pytest.mark.parametrize("count", [0, 2, -1, 2**32 + 1])
    def test_refuses_a_node_that_counts_itself_not_once(self, count: int) -> None:
        refused(self.changed(1, count), "weight", "not those of one node")

    @pytest.mark.parametrize("scaled", [-1, 3])
    def test_refuses_an_impossible_number_of_scaled_blocks(self, scaled: int) -> None:
        refused(self.changed(2, scaled), "weight")

    @pytest.mark.parametrize("rows", [-1, ROWS + 1])
    def test_refuses_an_impossible_number_of_rows_above_the_cap(self, rows: int) -> None:
        refused(self.changed(3, rows), "weight")


class TestBound:
    def with_delta(self, *values: int) -> Message:
        return reply_of(TRAINING.offer, honest_update() | {"delta": np.array([*values, 0, 0, 0, 0], "<i4")[:5]})

    def test_refuses_norm_above_bound(self) -> None:
        share = ROWS / WEIGHT_CAP
        limit = round(share * LEVELS)
        accept_reply(self.with_delta(limit), TRAINING)
        refused(self.with_delta(limit + limit // 1000), "bound", "block delta has the norm")

    def test_refuses_norm_that_only_all_coordinates_together_exceed(self) -> None:
        each = round(ROWS / WEIGHT_CAP * LEVELS / 5**0.5)
        accept_reply(self.with_delta(*[each] * 5), TRAINING)
        refused(self.with_delta(*[each + each // 1000] * 5), "bound", "norm")

    def test_a_large_weight_does_not_stretch_the_bound_of_a_uniform_block(self) -> None:
        uniform = replace(TRAINING, blocks=(replace(DELTA, weight="uniform"), LANES))
        accept_reply(self.with_delta(LEVELS), uniform)
        refused(self.with_delta(LEVELS, LEVELS // 10), "bound", "norm", uniform)

    @pytest.mark.parametrize("value", [LEVELS + 1, -LEVELS - 1, 2**31 - 1, -(2**31)])
    def test_refuses_coordinate_above_its_share_of_the_ring(self, value: int) -> None:
        refused(self.with_delta(value), "bound", f"above the {LEVELS} levels of one node")

    def test_refuses_a_full_norm_with_a_small_weight(self) -> None:
        """The weight lane shrinks the divisor: a node may not claim few rows and send the update of many."""
        blocks = honest_update([1.0, 0, 0, 0, 0]) | {"lanes": lanes_of(1, WEIGHT_CAP)}
        refused(reply_of(TRAINING.offer, blocks), "bound", "norm")


class TestCounts:
    def metrics(self, index: int, value: int) -> Message:
        blocks = honest_metrics()
        blocks["metrics"][index] += value
        return reply_of(EVALUATION.offer, blocks)

    def statistics(self, changes: dict[int, int]) -> Message:
        blocks = honest_statistics()
        for index, value in changes.items():
            blocks["statistics"][index] = value
        return reply_of(STATISTICS.offer, blocks)

    def test_refuses_more_evaluated_rows_than_registered(self) -> None:
        accept_reply(reply_of(EVALUATION.offer, honest_metrics(20)), EVALUATION)
        refused(reply_of(EVALUATION.offer, honest_metrics(21)), "counts", "21 rows, where 20", EVALUATION)

    def test_refuses_negative_count_in_metrics(self) -> None:
        refused(self.metrics(11 + 1000, -1), "counts", "a count is negative", EVALUATION)

    def test_refuses_a_row_counted_twice(self) -> None:
        refused(self.metrics(2, 1), "counts", "confusion matrix", EVALUATION)

    def test_refuses_a_loss_beyond_one_nodes_share_of_63_bits(self) -> None:
        refused(self.metrics(1, 2**62 // NODES + 2), "counts", "the share of one node", EVALUATION)

    def test_refuses_squares_below_zero_in_a_regression(self) -> None:
        contract = plan_of(REGRESSION).data
        expected = replace(EVALUATION, contract=contract, blocks=(metrics_block(contract), LANES))
        blocks = {"metrics": np.array([3, -1, 5, 0, 9]), "lanes": lanes_of(ROWS, WEIGHT_CAP)}
        refused(reply_of(expected.offer, blocks), "counts", "squares", expected)

    @pytest.mark.parametrize("rows", [-1, ROWS + 1])
    def test_refuses_statistics_of_rows_that_are_not_registered(self, rows: int) -> None:
        refused(self.statistics({0: rows}), "counts", f"{rows} rows, where {ROWS} are registered", STATISTICS)

    @pytest.mark.parametrize("value", [2**62, -(2**62), 2**63 - 1, -(2**63)])
    def test_refuses_a_statistic_beyond_the_nodes_share_of_63_bits(self, value: int) -> None:
        refused(self.statistics({3: value}), "counts", "share of one node", STATISTICS)

    @pytest.mark.parametrize(
        "changes",
        [{1: -1}, {1: ROWS + 1}, {2: -1}, {2: 1}, {4: -50}, {5: ROWS + 1}, {4: ROWS, 5: ROWS}, {7: -1}],
        ids=[
            "negative values",
            "more values than rows",
            "negative outside",
            "inside and outside",
            "negative category",
            "too many of one",
            "rows counted twice",
            "negative unknown",
        ],
    )
    def test_refuses_negative_count_or_more_values_than_rows_in_statistics(self, changes: dict[int, int]) -> None:
        refused(self.statistics(changes), "counts", expected=STATISTICS)

    def test_refuses_a_sum_that_no_values_within_the_contracts_range_have(self) -> None:
        refused(self.statistics({3: -(1 << 50)}), "counts", expected=STATISTICS)

    def test_refuses_more_rows_in_least_squares_than_registered(self) -> None:
        plan = plan_of(REGRESSION, "rounds.count=1", "strategy.name=least-squares")
        layout = Layout.of({"1.bias": (1,), "1.weight": (1, 3)})
        blocks = (*strategy_for(plan).blocks(plan, layout), LANES)
        expected = replace(TRAINING, blocks=blocks)
        sent = {
            "moments": np.zeros(15, "<i8"),
            "rows": np.array([ROWS]),
            "lanes": lanes_of(ROWS, WEIGHT_CAP),
        }
        accept_reply(reply_of(TRAINING.offer, sent), expected)
        for rows in (ROWS + 1, -1):
            refused(reply_of(TRAINING.offer, sent | {"rows": np.array([rows])}), "counts", "registered", expected)
