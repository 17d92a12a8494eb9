"""The node's commands as a person calls them."""

import json
from typing import Any

import typer
from typer.testing import CliRunner

from concord_client.cli import app


def run(*words: str, stdin: str | None = "", code: int = 0) -> str:
    """What it prints. Raises: the error that a person would be told; typer.Exit: another exit code than `code`."""
    result = CliRunner().invoke(app, list(words), input=stdin, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    if isinstance(result.return_value, int) and result.return_value != code:
        raise typer.Exit(result.return_value)
    return result.output


def run_json(*words: str) -> Any:
    return json.loads(run(*words, "--json"))
