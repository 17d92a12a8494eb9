import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_server import checkpoints
from concord_server.checkpoints import Checkpoint, RunStore
from concord_shared.errors import ArtefactError
from concord_shared.tensors import Layout, model_digest, read_safetensors, write_safetensors

LAYOUT = Layout.of({"w": (3,), "b": (1,)})
PLAN = "a" * 64
STATE = {"velocity": np.array([0.1, 1 / 3, -0.0, 5e-324])}
THETA = np.array([0.1, -0.0, 1e-40, 3], np.float32)
FIRST = Checkpoint(
    plan_digest=PLAN,
    theta=THETA,
    model_digest=model_digest(LAYOUT, THETA),
    state=STATE,
    version=1,
    done=("train", 1),
    aborts=2,
    applied={"alpha": 1},
    preprocessing={"means": {"age": 0.1}},
    counters={"down": 10, "up": 3},
)
SECOND = replace(
    FIRST, theta=THETA + 1, model_digest=model_digest(LAYOUT, THETA + 1), version=2, done=("train", 2), aborts=0
)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path)


def fields(checkpoint: Checkpoint | None) -> dict[str, Any]:
    assert checkpoint is not None
    arrays = {"theta": checkpoint.theta.tobytes(), "state": {k: v.tobytes() for k, v in checkpoint.state.items()}}
    return vars(checkpoint) | arrays


def edit(store: RunStore, change: Callable[[dict[str, Any]], Any]) -> None:
    file = store.directory / "checkpoint" / "state.json"
    document = json.loads(file.read_text())
    changed = change(document)
    file.write_text(json.dumps(document if changed is None else changed))


def test_comes_back_bit_for_bit(store: RunStore) -> None:
    store.save(FIRST)
    assert fields(RunStore(store.directory).load(PLAN, LAYOUT)) == fields(FIRST)


def test_before_the_first_there_is_none_and_no_metrics(store: RunStore) -> None:
    store.append({"round": 1})
    assert RunStore(store.directory).load(PLAN, LAYOUT) is None
    assert store.records() == []


def test_keeps_one_model_only(store: RunStore) -> None:
    store.save(FIRST)
    store.save(SECOND)
    files = sorted(file.name for file in (store.directory / "checkpoint").iterdir())
    assert files == ["round-2.safetensors", "state.json"]


def test_what_a_killed_process_left_half_written_is_removed(store: RunStore) -> None:
    store.save(FIRST)
    torn = store.directory / "checkpoint" / ".round-2.safetensors.1.tmp"
    torn.write_bytes(b"half")
    assert fields(RunStore(store.directory).load(PLAN, LAYOUT)) == fields(FIRST)
    assert not torn.exists()


def test_a_step_without_a_new_model_does_not_write_it_again(store: RunStore) -> None:
    store.save(FIRST)
    file = store.directory / "checkpoint" / "round-1.safetensors"
    file.unlink()
    store.save(replace(FIRST, done=("evaluate", 1)))
    assert not file.exists()


def test_after_loading_the_next_model_replaces_the_loaded_one(store: RunStore) -> None:
    store.save(FIRST)
    resumed = RunStore(store.directory)
    resumed.load(PLAN, LAYOUT)
    resumed.save(SECOND)
    assert fields(RunStore(store.directory).load(PLAN, LAYOUT)) == fields(SECOND)
    assert not (store.directory / "checkpoint" / "round-1.safetensors").exists()


@pytest.mark.parametrize("kill_at", ["tensors", "state"])
def test_a_kill_while_saving_leaves_the_one_before(
    store: RunStore, kill_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append({"round": 1})
    store.save(FIRST)
    store.append({"round": 2})

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, {"tensors": "write_safetensors", "state": "write_atomically"}[kill_at], kill)
    with pytest.raises(KeyboardInterrupt):
        store.save(SECOND)
    monkeypatch.undo()
    resumed = RunStore(store.directory)
    assert fields(resumed.load(PLAN, LAYOUT)) == fields(FIRST)
    assert resumed.records() == [{"round": 1}]
    resumed.save(SECOND)
    assert fields(RunStore(store.directory).load(PLAN, LAYOUT)) == fields(SECOND)


class TestMetrics:
    def test_lines_come_back_in_order(self, store: RunStore) -> None:
        for number in range(3):
            store.append({"round": number, "köln": "é"})
        assert [record["round"] for record in store.records()] == [0, 1, 2]
        assert store.records()[0]["köln"] == "é"

    @pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b", "a\x0bb", "\ud800"])
    def test_no_text_of_a_node_can_split_or_spoil_a_line(self, store: RunStore, text: str) -> None:
        store.append({"reason": text})
        store.append({"reason": "next"})
        assert [record["reason"] for record in store.records()] == [text, "next"]

    def test_refuses_to_write_what_is_not_json(self, store: RunStore) -> None:
        with pytest.raises(ValueError, match="JSON"):
            store.append({"norm": float("nan")})

    def test_loading_cuts_younger_lines_and_a_half_written_one(self, store: RunStore) -> None:
        store.append({"round": 1})
        store.save(FIRST)
        store.append({"round": 2})
        with (store.directory / "metrics.jsonl").open("a") as file:
            file.write('{"rou')
        resumed = RunStore(store.directory)
        resumed.load(PLAN, LAYOUT)
        assert resumed.records() == [{"round": 1}]
        resumed.append({"round": 2})
        assert resumed.records() == [{"round": 1}, {"round": 2}]

    def test_a_file_that_lost_lines_is_refused_and_not_filled_with_zeros(self, store: RunStore) -> None:
        store.append({"round": 1})
        store.save(FIRST)
        (store.directory / "metrics.jsonl").write_bytes(b"")
        with pytest.raises(ArtefactError):
            RunStore(store.directory).load(PLAN, LAYOUT)

    def test_a_directory_that_is_gone_is_an_artefact_error(self, tmp_path: Path) -> None:
        with pytest.raises(ArtefactError, match="cannot write"):
            RunStore(tmp_path / "gone").append({})


class TestRefuses:
    def refused(self, store: RunStore, words: str, plan: str = PLAN, layout: Layout = LAYOUT) -> None:
        with pytest.raises(ArtefactError, match=words):
            RunStore(store.directory).load(plan, layout)

    def test_another_plan(self, store: RunStore) -> None:
        store.save(FIRST)
        self.refused(store, "belongs to plan aaaaaaaaaaaa, not to bbbbbbbbbbbb", plan="b" * 64)

    @pytest.mark.parametrize("shapes", [{"w": (4,), "b": (1,)}, {"w": (1, 3), "b": (1,)}, {"v": (3,), "b": (1,)}])
    def test_another_layout(self, store: RunStore, shapes: dict[str, tuple[int, ...]]) -> None:
        store.save(FIRST)
        with pytest.raises((ArtefactError, AssertionError)):
            RunStore(store.directory).load(PLAN, Layout.of(shapes))

    def test_a_model_with_one_bit_changed(self, store: RunStore) -> None:
        store.save(FIRST)
        file = store.directory / "checkpoint" / "round-1.safetensors"
        tensors, metadata = read_safetensors(file)
        theta = tensors["theta"].copy()
        theta.view(np.uint32)[0] ^= 1
        write_safetensors(file, {**tensors, "theta": theta}, metadata)
        self.refused(store, "the stored model is not the one that the checkpoint names")

    @pytest.mark.parametrize("velocity", [STATE["velocity"] + 1, STATE["velocity"][:2], None])
    def test_a_strategy_state_that_was_changed_cut_or_lost(self, store: RunStore, velocity: Any) -> None:
        store.save(FIRST)
        file = store.directory / "checkpoint" / "round-1.safetensors"
        tensors, metadata = read_safetensors(file)
        changed = {"theta": tensors["theta"]} | ({"state.velocity": velocity} if velocity is not None else {})
        write_safetensors(file, changed, metadata)
        self.refused(store, "checkpoint")

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b'{"schema": "concord/checkpoint/1"}'])
    def test_a_damaged_state_file(self, store: RunStore, content: bytes) -> None:
        store.save(FIRST)
        (store.directory / "checkpoint" / "state.json").write_bytes(content)
        self.refused(store, "not a checkpoint of concord")

    def test_a_truncated_tensor_file(self, store: RunStore) -> None:
        store.save(FIRST)
        file = store.directory / "checkpoint" / "round-1.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
        self.refused(store, "expected a safetensors file")

    def test_a_tensor_file_that_is_gone(self, store: RunStore) -> None:
        store.save(FIRST)
        (store.directory / "checkpoint" / "round-1.safetensors").unlink()
        self.refused(store, "round-1")

    @pytest.mark.parametrize(
        "change",
        [
            lambda d: d.update(schema="concord/checkpoint/2"),
            lambda d: d.update(model_digest="0" * 64),
            lambda d: d.pop("applied") and None,
            lambda d: d.update(tensors=5),
            lambda d: d.update(done=7),
        ],
    )
    def test_an_edited_state_file(self, store: RunStore, change: Any) -> None:
        store.save(FIRST)
        edit(store, change)
        self.refused(store, "checkpoint")

    def test_saving_where_the_run_directory_is_gone(self, tmp_path: Path) -> None:
        with pytest.raises(ArtefactError):
            RunStore(tmp_path / "gone").save(FIRST)
