"""What the two commands have in common."""

import sys

import pytest
import typer

from concord_shared.commands import new_app, readable, run_app
from concord_shared.errors import DataError, UsageError


def test_fingerprint_is_read_in_groups() -> None:
    assert readable("0123456789ab") == "0123 4567 89ab"


@pytest.mark.parametrize(
    ("ends", "code"),
    [(None, 0), (typer.Exit(1), 1), (typer.Exit(), 0), (DataError("no"), 1), (UsageError("no"), 2), (typer.Abort(), 1)],
)
def test_a_command_ends_the_process_with_its_code(
    monkeypatch: pytest.MonkeyPatch, ends: Exception | None, code: int
) -> None:
    app = new_app("concord", "A test.")

    @app.command()
    def work() -> None:
        if ends is not None:
            raise ends

    monkeypatch.setattr(sys, "argv", ["concord"])
    with pytest.raises(SystemExit) as ended:
        run_app(app)
    assert (ended.value.code or 0) == code
