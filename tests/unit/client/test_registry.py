"""The registry: a version is the content's, nothing of the content is told, and a change is noticed."""

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from concord_client import registry
from concord_client.store import NodeStore
from concord_shared.errors import DataError, UsageError
from unit.client.fake_coordinator import NOW, TABLE_PLAN, partner_in, write_table


@pytest.fixture
def store(tmp_path: Path) -> Iterator[NodeStore]:
    with NodeStore(tmp_path / "node.db") as opened:
        yield opened


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "patients.csv")


def test_table_is_described_by_rows_and_names_of_columns(store: NodeStore, table: Path) -> None:
    dataset = registry.add_dataset(store, "patients", f"csv:{table}", NOW)
    assert (dataset.rows, dataset.input, dataset.columns) == (20, "table", ("age", "weight", "ill"))
    assert dataset.title == "patients"
    assert store.dataset("patients") == dataset


def test_parquet_is_described_like_csv(store: NodeStore, table: Path, tmp_path: Path) -> None:
    import polars as pl

    pl.read_csv(table).write_parquet(tmp_path / "patients.parquet")
    dataset = registry.add_dataset(store, "patients", f"parquet:{tmp_path / 'patients.parquet'}", NOW)
    assert (dataset.rows, dataset.columns) == (20, ("age", "weight", "ill"))


def test_arrays_are_described_without_being_read(store: NodeStore, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((7, 1, 8, 8), np.uint8), y=np.zeros(7, np.int64))
    dataset = registry.add_dataset(store, "images", f"npz:{tmp_path / 'a.npz'}", NOW)
    assert (dataset.rows, dataset.input) == (7, "image")
    np.savez_compressed(tmp_path / "b.npz", x=np.zeros((5, 3)), y=np.zeros(5), x_test=np.zeros((2, 3)), y_test=[0, 0])
    dataset = registry.add_dataset(store, "rows", f"npz:{tmp_path / 'b.npz'}", NOW)
    assert (dataset.rows, dataset.input) == (7, "table")


def test_idx_and_image_folders_are_counted(store: NodeStore, tmp_path: Path) -> None:
    idx, folder = tmp_path / "idx", tmp_path / "folder"
    idx.mkdir()
    header = bytes([0, 0, 8, 1]) + (3).to_bytes(4, "big") + bytes(3)
    (idx / "train-labels-idx1-ubyte").write_bytes(header)
    (idx / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header))
    assert registry.add_dataset(store, "idx", f"idx:{idx}", NOW).rows == 6
    for name in ("a/1.png", "a/2.jpg", "b/3.png", "b/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert registry.add_dataset(store, "folder", f"images:{folder}", NOW).rows == 3


def test_digits_have_a_version_too(store: NodeStore) -> None:
    dataset = registry.add_dataset(store, "digits", "digits", NOW)
    assert (dataset.rows, dataset.input) == (1797, "image")
    registry.verify(store, dataset)


def test_plan_checks_the_data_and_names_the_columns(store: NodeStore, table: Path, tmp_path: Path) -> None:
    plan = tmp_path / "tiny.toml"
    plan.write_text(TABLE_PLAN, "utf-8")
    dataset = registry.add_dataset(store, "patients", f"csv:{table}", NOW, plan=str(plan))
    assert (dataset.rows, dataset.columns) == (20, ("age", "weight", "ill"))
    plan.write_text(TABLE_PLAN.replace("weight", "height"), "utf-8")
    with pytest.raises(DataError, match="height"):
        registry.add_dataset(store, "others", f"csv:{table}", NOW, plan=str(plan))
    assert store.dataset("others") is None


def test_version_is_of_the_content_wherever_it_lies(store: NodeStore, table: Path, tmp_path: Path) -> None:
    first = registry.add_dataset(store, "first", f"csv:{table}", NOW)
    moved = tmp_path / "elsewhere" / "other.csv"
    moved.parent.mkdir()
    moved.write_bytes(table.read_bytes())
    assert registry.add_dataset(store, "second", f"csv:{moved}", NOW).version == first.version
    moved.write_text(moved.read_text("utf-8").replace("20,50", "21,50"), "utf-8")
    assert registry.add_dataset(store, "third", f"csv:{moved}", NOW).version != first.version


def test_version_of_a_directory_is_of_its_names_too(store: NodeStore, tmp_path: Path) -> None:
    for directory, name in (("one", "a/1.png"), ("two", "b/1.png")):
        (tmp_path / directory / name).parent.mkdir(parents=True)
        (tmp_path / directory / name).write_bytes(b"x")
    one = registry.add_dataset(store, "one", f"images:{tmp_path / 'one'}", NOW)
    two = registry.add_dataset(store, "two", f"images:{tmp_path / 'two'}", NOW)
    assert one.version != two.version


def test_changed_files_are_noticed(store: NodeStore, table: Path) -> None:
    dataset = registry.add_dataset(store, "patients", f"csv:{table}", NOW)
    registry.verify(store, dataset)
    table.write_text(table.read_text("utf-8") + "99,99,yes\n", "utf-8")
    with pytest.raises(DataError, match="--replace"):
        registry.verify(store, dataset)


def test_missing_files_are_noticed(store: NodeStore, table: Path) -> None:
    dataset = registry.add_dataset(store, "patients", f"csv:{table}", NOW)
    table.unlink()
    with pytest.raises(DataError, match="changed since registration"):
        registry.verify(store, dataset)


def test_touched_file_with_the_same_content_is_read_once_more(
    store: NodeStore, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = registry.add_dataset(store, "patients", f"csv:{table}", NOW)
    os.utime(table, (1, 1))
    registry.verify(store, dataset)
    monkeypatch.setattr(registry, "file_digest", lambda _: pytest.fail("size and time are as noted: nothing to read"))
    again = store.dataset("patients")
    assert again is not None
    registry.verify(store, again)


def test_name_is_taken_once(store: NodeStore, table: Path) -> None:
    registry.add_dataset(store, "patients", f"csv:{table}", NOW, title="Patients", licence="CC0-1.0")
    with pytest.raises(UsageError, match="--replace"):
        registry.add_dataset(store, "patients", f"csv:{table}", NOW)
    replaced = registry.add_dataset(store, "patients", f"csv:{table}", NOW, replaces=True)
    assert (replaced.title, replaced.licence) == ("Patients", "CC0-1.0")


@pytest.mark.parametrize("name", ["", "Patients", "../x", "a b", "-a", "a" * 64])
def test_name_of_other_letters_is_refused(store: NodeStore, table: Path, name: str) -> None:
    with pytest.raises(UsageError, match="small letters"):
        registry.add_dataset(store, name, f"csv:{table}", NOW)


@pytest.mark.parametrize("spec", ["nothing:here", "csv:/nowhere.csv", "/tmp"])
def test_spec_that_leads_nowhere_is_refused(store: NodeStore, spec: str) -> None:
    with pytest.raises(UsageError):
        registry.add_dataset(store, "x", spec, NOW)


def test_unreadable_table_is_named_without_a_value(store: NodeStore, tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"secret")
    with pytest.raises(DataError) as caught:
        registry.add_dataset(store, "bad", f"parquet:{tmp_path / 'bad.parquet'}", NOW)
    assert "secret" not in str(caught.value)


def test_card_tells_no_path_and_no_value(tmp_path: Path) -> None:
    partner = partner_in(tmp_path)
    card = registry.publish(partner.home, partner.store, "patients", NOW)
    text = card.model_dump_json()
    assert str(tmp_path) not in text
    assert set(card.model_dump()) == {
        "node", "organisation", "dataset", "dataset_version", "title", "description", "rows", "input", "columns",
        "licence", "issued_at",
    }  # fmt: skip
    dataset = partner.store.dataset("patients")
    assert dataset is not None
    assert dataset.published
    partner.store.close()
