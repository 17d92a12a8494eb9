import json
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from concord_shared.errors import ConsentRefusedError
from concord_shared.messages import (
    RAW,
    RING,
    Offer,
    answer,
    array_of,
    bytes_of,
    decline,
    model_record,
    offer_message,
    read_array,
    read_offer,
)
from helpers import offer_of, request_of

DTYPES = st.sampled_from([np.dtype(d) for d in ("float32", "float64", "int32", "int64")])


@given(DTYPES.flatmap(lambda dtype: arrays(dtype, array_shapes(min_dims=0, min_side=0))))
def test_arrays_come_back_bit_for_bit(values: np.ndarray) -> None:
    read = read_array(array_of(values, RAW), values.dtype, values.shape, RAW)
    assert read.tobytes() == values.tobytes()
    assert read.shape == values.shape


def test_arrays_travel_little_endian() -> None:
    assert array_of(np.array([1], ">i4"), RING).data == b"\x01\0\0\0"
    assert array_of(np.arange(4, dtype="<i8")[::2], RING).data == b"\0" * 8 + b"\x02" + b"\0" * 7


class TestReadArray:
    def refused(self, array: Array, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            read_array(array, np.dtype("<i4"), (3,), RING)

    def test_accepts_what_was_expected(self) -> None:
        array = Array("int32", (3,), RING, b"\x01\0\0\0" * 3)
        assert read_array(array, np.dtype("<i4"), (3,), RING).tolist() == [1, 1, 1]

    def test_refuses_another_stype(self) -> None:
        self.refused(Array("int32", (3,), "numpy.ndarray", b"\0" * 12), r"expected concord\.ring/1 int32")

    @pytest.mark.parametrize("dtype", ["float32", "uint32", "object", "<i4"])
    def test_refuses_another_dtype(self, dtype: str) -> None:
        self.refused(Array(dtype, (3,), RING, b"\0" * 12), "int32")

    @pytest.mark.parametrize("shape", [(1,), (), (3, 1), (1, 3), (-3,)])
    def test_refuses_another_shape(self, shape: tuple[int, ...]) -> None:
        self.refused(Array("int32", shape, RING, b"\0" * 12), r"\[3\]")

    @pytest.mark.parametrize("size", [0, 11, 13, 24])
    def test_refuses_another_number_of_bytes(self, size: int) -> None:
        self.refused(Array("int32", (3,), RING, b"\0" * size), f"expected 12 bytes, got {size}")

    def test_refuses_a_huge_claimed_shape_without_allocation(self) -> None:
        array = Array("int32", (1 << 40, 1 << 20), RING, b"")
        tracemalloc.start()
        self.refused(array, "got")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20


class TestOffer:
    @pytest.mark.parametrize("kind", ["statistics", "train", "evaluate"])
    def test_comes_back_as_it_was_sent(self, kind: Any) -> None:
        offer = offer_of(kind=kind, evaluate_incoming=True, preprocessing='{"a": "ü"}', applied_round=2)
        assert read_offer(offer_message(offer, None, 7, 1.0)) == offer

    def test_is_addressed_to_the_node(self) -> None:
        metadata = offer_message(offer_of(), None, 7, 12.5).metadata
        assert (metadata.dst_node_id, metadata.src_node_id, metadata.created_at) == (7, 1, 12.5)
        assert metadata.message_type == "train"

    def test_message_ids_tell_round_attempt_and_node_apart(self) -> None:
        offers = [offer_of(), offer_of(attempt=2), offer_of(round_number=4), offer_of(node="b"), offer_of(run="r2")]
        assert len({request_of(offer).metadata.message_id for offer in offers}) == 5

    def test_carries_the_model(self) -> None:
        theta, velocity = np.array([1, 2], np.float32), np.array([0.1, 0.2])
        message = offer_message(offer_of(), model_record(theta, {"velocity": velocity}), 2, 1.0)
        record = message.content.array_records["model"]
        assert set(record) == {"theta", "state.velocity"}
        assert read_array(record["theta"], theta.dtype, (2,), RAW).tolist() == [1, 2]
        assert read_array(record["state.velocity"], velocity.dtype, (2,), RAW).tolist() == [0.1, 0.2]

    def changed(self, **changes: Any) -> Message:
        message = request_of(offer_of())
        config = dict(message.content.config_records["offer"]) | changes
        message.content["offer"] = ConfigRecord({key: value for key, value in config.items() if value is not None})
        return message

    @pytest.mark.parametrize(
        "changes",
        [
            {"node": 3},
            {"round_number": "3"},
            {"round_number": True},
            {"round_number": 3.0},
            {"round_number": -1},
            {"nodes_max": 1 << 62},
            {"evaluate_incoming": 1},
            {"plan_digest": b"p"},
            {"attempt": [1]},
        ],
        ids=str,
    )
    def test_refuses_a_field_of_another_type(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ConsentRefusedError, match=rf"offer\.{next(iter(changes))}: expected"):
            read_offer(self.changed(**changes))

    @pytest.mark.parametrize("changes", [{"attempt": None}, {"extra": 1}])
    def test_refuses_a_missing_or_unknown_field(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ConsentRefusedError, match="no offer of this version"):
            read_offer(self.changed(**changes))

    def test_refuses_a_message_without_an_offer(self) -> None:
        message = request_of(offer_of())
        with pytest.raises(ConsentRefusedError, match="no offer"):
            read_offer(Message(content=RecordDict(), metadata=message.metadata))

    @pytest.mark.parametrize("kind", ["evaluate", "statistics", "query.statistics", "", "deploy"])
    def test_refuses_a_kind_that_is_not_the_messages(self, kind: str) -> None:
        with pytest.raises(ConsentRefusedError, match="came as 'train'"):
            read_offer(self.changed(kind=kind))


class TestAnswer:
    def test_repeats_every_field_that_binds_it(self) -> None:
        offer = offer_of()
        reply = answer(request_of(offer), offer, {}, {})
        assert dict(reply.content.config_records["binding"]) == {
            "run": "run-1",
            "kind": "train",
            "round_number": 3,
            "attempt": 1,
            "node": "alpha",
            "plan_digest": "p" * 64,
            "model_digest": "m" * 64,
            "layout_digest": "l" * 64,
            "stage": "",
        }

    @pytest.mark.parametrize("name", ["run", "round_number", "attempt", "node", "plan_digest", "model_digest", "stage"])
    def test_the_binding_of_another_offer_differs(self, name: str) -> None:
        value: Any = getattr(offer_of(), name)
        changed = replace(offer_of(), **{name: value + 1 if isinstance(value, int) else value + "x"})
        assert changed.binding != offer_of().binding

    def test_goes_back_to_who_asked(self) -> None:
        request = request_of(offer_of(), node_id=9)
        metadata = answer(request, offer_of(), {}, {}).metadata
        assert (metadata.src_node_id, metadata.dst_node_id) == (9, 1)
        assert metadata.reply_to_message_id == request.metadata.message_id

    def test_blocks_and_notes_arrive(self) -> None:
        reply = answer(request_of(offer_of()), offer_of(), {"delta": np.array([1, -1], "<i4")}, {"steps": 3})
        array = reply.content.array_records["blocks"]["delta"]
        assert read_array(array, np.dtype("<i4"), (2,), RING).tolist() == [1, -1]
        assert json.loads(str(reply.content.config_records["notes"]["json"])) == {"steps": 3}

    def test_declining_carries_the_reason(self) -> None:
        reply = decline(request_of(offer_of()), "out of policy")
        assert reply.has_error()
        assert reply.error.reason == "out of policy"
        assert bytes_of(reply) == 13


def test_bytes_of_counts_tensors_and_settings() -> None:
    without = offer_message(offer_of(), None, 2, 1.0)
    with_model = offer_message(offer_of(), model_record(np.zeros(10, np.float32), {"v": np.zeros(10)}), 2, 1.0)
    assert bytes_of(with_model) - bytes_of(without) == 40 + 80
    assert bytes_of(without) == sum(len(str(getattr(offer_of(), name))) for name in Offer.__dataclass_fields__)
