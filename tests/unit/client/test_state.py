from pathlib import Path

import numpy as np
import pytest

from concord_client.state import NodeStates
from concord_shared.errors import ArtefactError


@pytest.fixture
def states(tmp_path: Path) -> NodeStates:
    return NodeStates(tmp_path / "states")


def state(value: float) -> dict[str, np.ndarray]:
    return {"control": np.array([value, -value])}


def value(settled: dict[str, np.ndarray]) -> float | None:
    return float(settled["control"][0]) if settled else None


def test_nothing_at_first(states: NodeStates) -> None:
    assert states.settle("alpha", 0) == {}


def test_pending_becomes_current_when_its_round_was_applied(states: NodeStates) -> None:
    states.write_pending("alpha", 3, state(1.5))
    assert value(states.settle("alpha", 3)) == 1.5
    assert value(states.settle("alpha", 3)) == 1.5


@pytest.mark.parametrize("applied", [0, 2, 4])
def test_pending_is_dropped_when_another_round_was_applied_last(states: NodeStates, applied: int) -> None:
    states.write_pending("alpha", 3, state(1.5))
    assert states.settle("alpha", applied) == {}
    assert states.settle("alpha", 3) == {}  # for good


def test_an_aborted_round_keeps_the_state_before_it(states: NodeStates) -> None:
    states.write_pending("alpha", 1, state(1))
    states.settle("alpha", 1)
    states.write_pending("alpha", 2, state(2))
    assert value(states.settle("alpha", 1)) == 1
    states.write_pending("alpha", 3, state(3))
    assert value(states.settle("alpha", 3)) == 3


def test_the_same_round_trained_again_replaces_what_is_pending(states: NodeStates) -> None:
    states.write_pending("alpha", 1, state(1))
    states.write_pending("alpha", 1, state(7))
    assert value(states.settle("alpha", 1)) == 7


def test_nodes_do_not_share_states(states: NodeStates) -> None:
    states.write_pending("alpha", 1, state(1))
    states.write_pending("beta", 1, state(2))
    assert (value(states.settle("alpha", 1)), value(states.settle("beta", 0))) == (1, None)


def test_survives_a_restart_bit_for_bit(states: NodeStates, tmp_path: Path) -> None:
    written = {"control": np.array([0.1, -0.0, 5e-324]), "personal": np.arange(3, dtype=np.float32)}
    states.write_pending("alpha", 1, written)
    read = NodeStates(tmp_path / "states").settle("alpha", 1)
    assert {name: (v.dtype, v.tobytes()) for name, v in read.items()} == {
        name: (v.dtype, v.tobytes()) for name, v in written.items()
    }


def test_two_files_a_node_at_the_most(states: NodeStates, tmp_path: Path) -> None:
    for number in range(1, 5):
        states.settle("alpha", number - 1)
        states.write_pending("alpha", number, state(number))
    assert len(list((tmp_path / "states").iterdir())) == 2


def test_a_damaged_file_is_named(states: NodeStates, tmp_path: Path) -> None:
    states.write_pending("alpha", 1, state(1))
    (tmp_path / "states" / "alpha.pending.safetensors").write_bytes(b"\x08")
    with pytest.raises(ArtefactError, match=r"alpha\.pending"):
        states.settle("alpha", 1)
