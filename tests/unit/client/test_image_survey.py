"""What an owner is shown of a set of images: sizes, classes, what cannot be read, and a contract that they fit."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from concord_client.data import read_data
from concord_client.registry import survey_images
from concord_shared.errors import DataError, SourceError
from helpers import plan_of
from unit.client.fake_coordinator import Partner, partner_in, use_commands_at
from unit.client.node_cli import run, run_json


@pytest.fixture
def partner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Partner]:
    made = partner_in(tmp_path)
    use_commands_at(made, monkeypatch)
    yield made
    made.store.close()


def draw(file: Path, mode: str = "L", size: tuple[int, int] = (8, 8)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(file)


def contract_of(survey: object) -> dict:
    return tomllib.loads(survey.contract)["data"]  # type: ignore[attr-defined]


def test_a_folder_shows_sizes_classes_and_a_contract(tmp_path: Path) -> None:
    for part, name, count in (("train", "cat", 3), ("train", "dog", 2), ("test", "cat", 1)):
        for number in range(count):
            draw(tmp_path / part / name / f"{number}.png", "RGB", (6, 4))
    survey = survey_images(f"images:{tmp_path}")
    assert survey is not None
    assert (survey.images, survey.shapes, survey.classes) == (6, {"3×4×6": 6}, {"cat": 4, "dog": 2})
    assert contract_of(survey) == {
        "task": "classification", "input": "image", "shape": [3, 4, 6], "dtype": "uint8", "classes": ["cat", "dog"],
    }  # fmt: skip


def test_the_contract_that_is_shown_reads_the_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(tmp_path / name / "1.png")
    survey = survey_images(f"images:{tmp_path}")
    assert survey is not None
    plan = plan_of('name = "images"\nmodel.name = "logistic-regression"\n' + survey.contract)
    assert read_data(f"images:{tmp_path}", plan).inputs.shape == (2, 1, 8, 8)


def test_several_sizes_and_damaged_files_are_counted_and_give_no_contract(tmp_path: Path) -> None:
    for number, size in enumerate([(8, 8), (8, 8), (9, 8)]):
        draw(tmp_path / "a" / f"{number}.png", size=size)
    draw(tmp_path / "b" / "1.png")
    (tmp_path / "b" / "2.png").write_bytes(b"no image")
    survey = survey_images(f"images:{tmp_path}")
    assert survey is not None
    assert survey.shapes == {"1×8×8": 3, "1×8×9": 1}
    assert survey.unreadable == 1
    assert survey.contract == ""


def test_numbered_classes_keep_their_places(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((4, 8, 8, 3), np.uint8), y=np.array([0, 2, 2, 3]))
    survey = survey_images(f"npz:{tmp_path / 'x.npz'}")
    assert survey is not None
    assert survey.classes == {"0": 1, "2": 2, "3": 1}
    assert contract_of(survey)["classes"] == ["0", "1", "2", "3"]
    assert contract_of(survey)["shape"] == [3, 8, 8]


@pytest.mark.parametrize(("dtype", "targets"), [("float64", [0, 1]), ("uint8", [-1, 1]), ("uint8", [0, 100_000])])
def test_what_no_contract_can_say_gives_none(tmp_path: Path, dtype: str, targets: list[int]) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 1, 8, 8), dtype), y=np.array(targets))
    survey = survey_images(f"npz:{tmp_path / 'x.npz'}")
    assert survey is not None
    assert survey.contract == ""


def test_tables_and_targets_that_are_no_classes_are_no_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 3)), y=np.array([0, 1]))
    np.savez(tmp_path / "y.npz", x=np.zeros((2, 8, 8)), y=np.array([0.5, 1.5]))
    (tmp_path / "t.csv").write_text("x,y\n1,2\n")
    assert survey_images(f"npz:{tmp_path / 'x.npz'}") is None
    assert survey_images(f"npz:{tmp_path / 'y.npz'}") is None
    assert survey_images(f"csv:{tmp_path / 't.csv'}") is None


def test_nothing_is_looked_at_outside_of_what_the_owner_exposed(tmp_path: Path) -> None:
    draw(tmp_path / "data" / "a" / "1.png")
    with pytest.raises(SourceError, match="outside of what the owner exposed"):
        survey_images(f"images:{tmp_path / 'data'}", (str(tmp_path / "elsewhere"),))


def test_a_folder_without_images_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("none")
    with pytest.raises(DataError, match="one directory for each class"):
        survey_images(f"images:{tmp_path}")


def test_an_owner_sees_it_as_the_images_are_registered(partner: Partner, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        draw(tmp_path / "pets" / name / "1.png")
    shown = run("data", "add", "pets", f"images:{tmp_path / 'pets'}")
    assert "sizes: 1×8×8: 2" in shown
    assert "classes: cat: 1, dog: 1" in shown
    assert 'input = "image"' in shown
    added = run_json("data", "add", "pets", f"images:{tmp_path / 'pets'}", "--replace")
    assert added["images"]["classes"] == {"cat": 1, "dog": 1}
    database = partner.home.path.rglob("*")
    assert not any(b"dog" in file.read_bytes() for file in database if file.is_file())
