from pathlib import Path

import numpy as np
import pytest

from concord_client.data import RawData, Split
from concord_local.federation import Federation
from concord_shared.errors import ArtefactError, DataError
from helpers import IMAGES, plan_of

PLAN = plan_of(IMAGES, "evaluation.validation_fraction=0.25")
DATA = RawData(np.arange(200.0)[:, None], np.arange(200) % 3, groups={"site": np.repeat(["ulm", "bonn"], [150, 50])})


def test_each_row_is_at_one_node_in_one_split() -> None:
    federation = Federation.of(DATA, PLAN, "iid", 4)
    parts = [rows for splits in federation.rows.values() for rows in splits.values()]
    assert sorted(np.concatenate(parts)) == list(range(200))
    assert federation.names == ("node-1", "node-2", "node-3", "node-4")


def test_pooled_rows_are_the_nodes_rows_split_by_split() -> None:
    federation = Federation.of(DATA, PLAN, "dirichlet:1", 4)
    pooled = federation.all_rows()
    for split in Split:
        inputs, _ = pooled.take(split)
        own = np.concatenate([federation.dataset(name).take(split)[0] for name in federation.names])
        assert sorted(inputs[:, 0]) == sorted(own[:, 0])


def test_entries_register_training_and_evaluation_rows() -> None:
    bonn, ulm = Federation.of(DATA, PLAN, "natural:site", None).entries(PLAN)
    assert (bonn.name, bonn.node_id, bonn.rows, bonn.evaluation_rows) == ("bonn", 2, 30, 10)
    assert (ulm.name, ulm.node_id, ulm.rows, ulm.evaluation_rows) == ("ulm", 3, 90, 30)
    validation = plan_of(IMAGES, "evaluation={on='validation', validation_fraction=0.25}")
    federation = Federation.of(DATA, validation, "natural:site", None)
    assert [entry.evaluation_rows for entry in federation.entries(validation)] == [10, 30]


def test_mapped_by_another_process_it_is_the_same(tmp_path: Path) -> None:
    federation = Federation.of(DATA, PLAN, "dirichlet:0.5", 5)
    federation.share(tmp_path / "shared")
    mapped = Federation.map(tmp_path / "shared")
    assert mapped.names == federation.names
    for name in federation.names:
        for split in Split:
            one, other = federation.dataset(name).take(split), mapped.dataset(name).take(split)
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(ValueError, match="read-only"):
        mapped.inputs[0] = 1


def test_sharing_replaces_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "rows.npy").write_text("half a file")
    shared = Federation.of(DATA, PLAN, "iid", 2).share(tmp_path / "shared")
    assert (shared.directory, len(shared.inputs)) == (tmp_path / "shared", 200)


def test_sharing_where_nothing_can_be_written_is_an_artefact_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot share the data"):
        Federation.of(DATA, PLAN, "iid", 2).share(tmp_path / "file" / "shared")


def test_a_node_without_training_rows_is_named() -> None:
    split = np.repeat([0, 2], [150, 50]).astype(np.uint8)
    data = RawData(DATA.inputs, DATA.targets, split, DATA.groups)
    with pytest.raises(DataError, match="no training rows at bonn"):
        Federation.of(data, PLAN, "natural:site", None)
