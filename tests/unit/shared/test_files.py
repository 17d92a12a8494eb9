import errno
from pathlib import Path

import pytest

from concord_shared.errors import ArtefactError
from concord_shared.files import explain, write_atomically


def test_replaces_the_whole_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_atomically(file, "a long first text")
    write_atomically(file, b"\xff\x00")
    assert file.read_bytes() == b"\xff\x00"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_keeps_the_old_file_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.write_text("old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArtefactError, match=r"the disk is full\. Free some space"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="missing"):
        write_atomically(tmp_path / "missing" / "a", "x")


def test_a_file_in_the_place_of_the_directory_is_an_artefact_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError):
        write_atomically(tmp_path / "file" / "a", "x")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "Free some space"), (errno.EACCES, "the right"), (errno.EROFS, "another place")],
)
def test_explains_what_to_do_to_everybody(number: int, words: str) -> None:
    said = explain(OSError(number, "text of the system"))
    assert words in said
    assert "--" not in said, "options are those of one command"
