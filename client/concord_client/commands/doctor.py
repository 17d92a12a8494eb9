"""`concord-node doctor`: what keeps this node from working, or soon will."""

import sys
from typing import TYPE_CHECKING, Any

import typer

from concord_client.commands.common import Home, at_home, write
from concord_shared.commands import Json, show
from concord_shared.text import printable

if TYPE_CHECKING:
    from concord_client.doctor import Finding

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command("doctor", epilog="**Example**\n\n`concord-node doctor`")(doctor)


def doctor(home: Home = None, as_json: Json = False) -> None:
    """Check address, proxy, certificates, clock, disk, device, data and what waits; say what to do.

    Exit code 1 where something fails.
    """
    from concord_client.doctor import examine

    findings = []
    with at_home(home) as (opened, store):
        for finding in examine(opened, store):
            findings.append(finding)
            if not as_json:
                _print(finding)
    worst = max((finding.state for finding in findings), key=("ok", "warn", "fail").index)
    if as_json:
        value: dict[str, Any] = {"worst": worst, "findings": [vars(finding) for finding in findings]}
        show(value, True, lambda _: None)
    if worst == "fail":
        raise typer.Exit(1)


def _print(finding: "Finding") -> None:
    """One by one: some checks take seconds."""
    write(printable(f"{finding.state:<5} {finding.name:<12} {finding.said}"))
    if finding.advice:
        write(printable(f"{'':<18} → {finding.advice}"))
    sys.stdout.flush()
