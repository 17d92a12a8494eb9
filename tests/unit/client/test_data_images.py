import gzip
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from concord_client.data import RawData, Split, read_data
from concord_shared.errors import DataError
from concord_shared.plan import load_plan
from helpers import IMAGES, REGRESSION, TABLE, plan_of

PLAN = plan_of(IMAGES)
SECRET = "4711.5"


def refused(spec: str, words: str, plan: Any = PLAN) -> str:
    with pytest.raises(DataError, match=words) as caught:
        read_data(spec, plan)
    assert SECRET not in str(caught.value)
    return str(caught.value)


def test_digits_are_the_real_ones_stretched_to_bytes() -> None:
    data = read_data("digits", load_plan("digits-cnn").plan)
    assert data.inputs.shape == (1797, 1, 8, 8)
    assert (data.inputs.dtype, data.inputs.min(), data.inputs.max()) == (np.uint8, 0, 255)
    assert data.targets[:10].tolist() == list(range(10))
    assert data.inputs[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 5, 13, 9, 1 of 16


class TestIdx:
    STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        for part, rows in (("train", 5), ("t10k", 2)):
            images = np.arange(rows * 64, dtype=np.uint8).reshape(rows, 8, 8)
            self.write(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
            self.write(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(rows, dtype=np.uint8) % 3)
        return tmp_path

    def write(self, file: Path, array: np.ndarray, magic: int | None = None, extra: bytes = b"") -> None:
        header = struct.pack(f">{1 + array.ndim}I", magic or 0x0800 + array.ndim, *array.shape)
        content = header + array.tobytes() + extra
        file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)

    def test_reads_four_files_with_their_own_split(self, directory: Path) -> None:
        data = read_data(f"idx:{directory}", PLAN)
        assert data.inputs.shape == (7, 1, 8, 8)
        assert data.inputs[1, 0, 0, :3].tolist() == [64, 65, 66]
        assert data.targets.tolist() == [0, 1, 2, 0, 1, 0, 1]
        assert data.split is not None
        assert data.split.tolist() == [Split.TRAIN] * 5 + [Split.TEST] * 2

    def test_reads_files_that_are_not_compressed(self, directory: Path) -> None:
        for stem in self.STEMS:
            (directory / stem).write_bytes(gzip.decompress((directory / f"{stem}.gz").read_bytes()))
            (directory / f"{stem}.gz").unlink()
        assert len(read_data(f"idx:{directory}", PLAN)) == 7

    @pytest.mark.parametrize("stem", STEMS)
    def test_a_missing_file_is_named(self, directory: Path, stem: str) -> None:
        (directory / f"{stem}.gz").unlink()
        refused(f"idx:{directory}", f"expected the file {stem} or {stem}.gz")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda b: b[: len(b) // 2],
            lambda b: b"",
            lambda b: b"no gzip at all",
            lambda b: b[:20] + b"\xff" * 9 + b[29:],
        ],
        ids=["truncated", "empty", "not gzip", "overwritten"],
    )
    def test_a_corrupt_gz_is_named(self, directory: Path, damage: Callable[[bytes], bytes]) -> None:
        file = directory / "t10k-images-idx3-ubyte.gz"
        file.write_bytes(damage(file.read_bytes()))
        text = refused(f"idx:{directory}", "t10k-images-idx3-ubyte.gz: ")
        assert "damaged" in text or "got nothing" in text

    def test_a_wrong_magic_is_named(self, directory: Path) -> None:
        self.write(directory / "train-images-idx3-ubyte.gz", np.zeros((5, 8, 8), np.uint8), magic=0x0D03)
        refused(f"idx:{directory}", r"train-images.*expected an IDX file \(magic 00000803\), got 00000d03")

    def test_labels_in_the_place_of_images_are_named(self, directory: Path) -> None:
        self.write(directory / "train-images-idx3-ubyte.gz", np.zeros(5, np.uint8))
        refused(f"idx:{directory}", "got 00000801")

    @pytest.mark.parametrize("keep", [4, 6, 16, 100])
    def test_a_truncated_idx_is_named(self, directory: Path, keep: int) -> None:
        file = directory / "train-images-idx3-ubyte.gz"
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:keep]))
        refused(f"idx:{directory}", "the header says shape")

    def test_bytes_after_the_end_are_named(self, directory: Path) -> None:
        self.write(directory / "train-labels-idx1-ubyte.gz", np.zeros(5, np.uint8), extra=b"x")
        refused(f"idx:{directory}", r"the header says shape \[5\], but 6 bytes follow")

    def test_a_header_of_a_billion_images_takes_no_memory(self, directory: Path) -> None:
        file = directory / "train-images-idx3-ubyte.gz"
        file.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)))
        refused(f"idx:{directory}", "but 0 bytes follow")

    def test_more_labels_than_images_are_named(self, directory: Path) -> None:
        self.write(directory / "train-labels-idx1-ubyte.gz", np.zeros(6, np.uint8))
        refused(f"idx:{directory}", "train has 5 images but 6 labels")

    def test_a_class_outside_the_contract_is_counted(self, directory: Path) -> None:
        self.write(directory / "train-labels-idx1-ubyte.gz", np.array([0, 1, 2, 3, 9], np.uint8))
        refused(f"idx:{directory}", "target label: 2 rows have a class outside the contract's 3 classes")

    def test_parts_of_different_sizes_are_named(self, directory: Path) -> None:
        self.write(directory / "t10k-images-idx3-ubyte.gz", np.zeros((2, 7, 7), np.uint8))
        refused(f"idx:{directory}", "7")

    def test_reads_the_real_mnist(self, dataset_path: Callable[[str], Path]) -> None:
        data = read_data(f"idx:{dataset_path('mnist')}", load_plan("mnist-cnn").plan)
        assert data.inputs.shape == (70_000, 1, 28, 28)
        assert data.targets[:5].tolist() == [5, 0, 4, 1, 9]
        assert np.bincount(data.targets[60_000:]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


class TestNpz:
    def read(self, tmp_path: Path, plan: Any = PLAN, **arrays: Any) -> RawData:
        np.savez(tmp_path / "data.npz", **arrays)
        return read_data(f"npz:{tmp_path / 'data.npz'}", plan)

    def refused(self, tmp_path: Path, words: str, plan: Any = PLAN, **arrays: Any) -> None:
        np.savez(tmp_path / "data.npz", **arrays)
        refused(f"npz:{tmp_path / 'data.npz'}", words, plan)

    IMAGE = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)

    def test_reads_images_labels_split_and_groups(self, tmp_path: Path) -> None:
        data = self.read(
            tmp_path,
            x=self.IMAGE,
            y=np.array(["b", "a", "c", "a"]),
            x_test=self.IMAGE[:1],
            y_test=np.array(["c"]),
            site=np.arange(5),
        )
        assert data.inputs.shape == (5, 1, 8, 8)
        assert data.targets.tolist() == [1, 0, 2, 0, 2]
        assert data.split is not None
        assert data.split.tolist() == [0, 0, 0, 0, 2]
        assert data.groups["site"].tolist() == [0, 1, 2, 3, 4]

    def test_channels_last_becomes_channels_first(self, tmp_path: Path) -> None:
        plan = plan_of(IMAGES, "data.shape=[3, 4, 5]")
        images = np.arange(2 * 60, dtype=np.uint8).reshape(2, 4, 5, 3)
        data = self.read(tmp_path, plan, x=images, y=np.array([0, 1]))
        assert np.array_equal(data.inputs, images.transpose(0, 3, 1, 2))

    def test_reads_tables(self, tmp_path: Path) -> None:
        data = self.read(tmp_path, plan_of(REGRESSION), x=np.eye(3), y=np.array([1.5, 2, 3]))
        assert data.inputs.tolist() == np.eye(3).tolist()
        assert data.targets.tolist() == [1.5, 2, 3]

    def test_missing_arrays_are_named(self, tmp_path: Path) -> None:
        self.refused(tmp_path, r"expected the arrays x and y .*found \['x'\]", x=self.IMAGE)
        self.refused(tmp_path, "x_test with y_test", x=self.IMAGE, y=np.zeros(4, int), x_test=self.IMAGE)

    def test_different_numbers_of_rows_are_named(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "x has 4 rows but y 3", x=self.IMAGE, y=np.zeros(3, int))

    def test_a_label_that_is_no_class_is_counted(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "1 rows have a class outside", x=self.IMAGE, y=np.array(["a", "b", SECRET, "c"]))

    def test_a_pickle_is_refused(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "an .npz archive of plain arrays", x=self.IMAGE, y=np.array([{"a": 1}] * 4, object))

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # numpy leaves the file open
    @pytest.mark.parametrize("content", [b"text", b"PK\x03\x04 broken"])
    def test_a_file_that_is_no_archive_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.npz").write_bytes(content)
        refused(f"npz:{tmp_path / 'x.npz'}", "expected an .npz archive")

    @pytest.mark.parametrize("kind", ["empty", "npy"])
    def test_an_empty_file_or_a_single_array_is_refused(self, tmp_path: Path, kind: str) -> None:
        buffer = BytesIO()
        np.save(buffer, np.ones(3))
        (tmp_path / "x.npz").write_bytes(buffer.getvalue() if kind == "npy" else b"")
        refused(f"npz:{tmp_path / 'x.npz'}", "expected an .npz archive")

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # numpy leaves the file open
    def test_a_truncated_archive_is_refused(self, tmp_path: Path) -> None:
        np.savez_compressed(tmp_path / "x.npz", x=self.IMAGE, y=np.zeros(4, int))
        content = (tmp_path / "x.npz").read_bytes()
        for keep in range(1, len(content), 29):
            (tmp_path / "x.npz").write_bytes(content[:keep])
            refused(f"npz:{tmp_path / 'x.npz'}", "expected an .npz archive")

    def test_fractions_of_a_class_are_refused(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "class", x=self.IMAGE, y=np.array([0.0, 1.7, 0.5, 2.0]))

    def test_one_hot_labels_are_refused(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "y", x=self.IMAGE, y=np.eye(3, dtype=int)[[0, 1, 2, 0]])

    @pytest.mark.parametrize("array", ["x", "y"])
    def test_text_in_the_place_of_numbers_is_refused_without_telling_it(self, tmp_path: Path, array: str) -> None:
        arrays = {"x": np.eye(3), "y": np.ones(3)} | {array: np.full((3, 3) if array == "x" else 3, f"n{SECRET}")}
        self.refused(tmp_path, array, plan_of(REGRESSION), **arrays)

    @pytest.mark.parametrize("columns", [2, 4])
    def test_a_table_with_other_columns_is_refused(self, tmp_path: Path, columns: int) -> None:
        self.refused(tmp_path, "column", plan_of(REGRESSION), x=np.zeros((3, columns)), y=np.ones(3))

    @pytest.mark.parametrize("code", [-1.0, 3.0, 0.5])
    def test_a_code_outside_the_categories_is_refused(self, tmp_path: Path, code: float) -> None:
        self.refused(tmp_path, "column city", plan_of(TABLE), x=np.array([[30, code, 0.0]]), y=np.array([0]))

    def test_test_images_of_another_size_are_refused(self, tmp_path: Path) -> None:
        labels = np.zeros(4, int)
        self.refused(
            tmp_path, "training and test rows differ", x=self.IMAGE, y=labels, x_test=self.IMAGE[:, 1:], y_test=labels
        )


class TestFolder:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        for code, name in enumerate("abc"):
            (tmp_path / name).mkdir()
            for index in range(2):
                Image.fromarray(np.full((8, 8), 50 * code + index, np.uint8)).save(tmp_path / name / f"{index}.png")
        return tmp_path

    def test_reads_one_directory_a_class(self, directory: Path) -> None:
        (directory / "a" / "notes.txt").write_text("not an image")
        (directory / ".cache").mkdir()
        data = read_data(f"images:{directory}", PLAN)
        assert data.targets.tolist() == [0, 0, 1, 1, 2, 2]
        assert data.inputs[:, 0, 3, 4].tolist() == [0, 1, 50, 51, 100, 101]
        assert data.split is None

    def test_reads_train_and_test(self, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        root = tmp_path_factory.mktemp("both")
        for part in ("train", "test"):
            (root / part).symlink_to(directory, target_is_directory=True)
        data = read_data(f"images:{root}", PLAN)
        assert data.split is not None
        assert data.split.tolist() == [0] * 6 + [2] * 6

    def test_colour_and_grey(self, directory: Path) -> None:
        plan = plan_of(IMAGES, "data.shape=[3, 8, 8]")
        Image.fromarray(np.full((8, 8, 3), [1, 2, 3], np.uint8)).save(directory / "a" / "0.png")
        data = read_data(f"images:{directory}", plan)
        assert data.inputs[0, :, 0, 0].tolist() == [1, 2, 3]
        assert data.inputs[2, :, 0, 0].tolist() == [50, 50, 50]

    def test_a_directory_that_is_no_class_is_named(self, directory: Path) -> None:
        (directory / "b").rename(directory / "d")
        refused(f"images:{directory}", "images: 2 lie in a directory whose name is none of the contract's classes")

    def test_an_image_of_another_size_is_named(self, directory: Path) -> None:
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(directory / "b" / "0.png")
        refused(
            f"images:{directory}",
            "images: 1 are not of 8×8 pixels; resize them first. The first is number 1 of class b",
        )

    def test_an_empty_directory_is_named(self, tmp_path: Path) -> None:
        refused(f"images:{tmp_path}", "expected one directory for each class with images in it, found none")

    def test_train_without_test_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "train" / "a").mkdir(parents=True)
        (tmp_path / "train" / "a" / "0.png").write_bytes(b"x")
        refused(f"images:{tmp_path}", "test: no such directory")

    def test_two_channels_are_refused(self, directory: Path) -> None:
        refused(f"images:{directory}", "contract asks for 2", plan_of(IMAGES, "data.shape=[2, 8, 8]"))

    @pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"BM\0\0"])
    def test_a_file_that_is_no_image_is_named(self, directory: Path, content: bytes) -> None:
        (directory / "a" / "0.png").write_bytes(content)
        refused(f"images:{directory}", "images: 1 are not readable: .*; the first is number 1 of class a")

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
    def test_a_damaged_image_is_named_or_read_and_never_anything_else(self, directory: Path, suffix: str) -> None:
        (directory / "a" / "0.png").unlink()
        file = directory / "a" / f"0.{suffix}"
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file)
        content, damaged = file.read_bytes(), 0
        for index in range(0, len(content), max(1, len(content) // 60)):
            for changed in (content[:index], content[:index] + b"\xff" + content[index + 1 :]):
                file.write_bytes(changed)
                damaged += self.is_refused(directory, file)
        assert damaged > 10

    def is_refused(self, directory: Path, file: Path) -> bool:
        """Whether the folder is refused, with this file named; any other error fails the test."""
        try:
            read_data(f"images:{directory}", PLAN)
        except DataError as error:
            return "number 1 of class a" in str(error) or pytest.fail(f"the image is not named: {error}")
        return False
