"""The commands of `concord-node`, one module each; `register` adds them to the command line.

A module imports what it needs inside its functions, so that `--help` stays quick.
"""

import importlib

import typer

from concord_shared.pretrained import commands as pretrained

__all__ = ["MODULES", "register"]

MODULES = (
    "enrol",
    "data",
    "policy",
    "approvals",
    "ledger",
    "statistics",
    "status",
    "up",
    "trial",
    "models",
    "doctor",
    "egress",
    "preflights",
    "audit",
    "receipts",
    "verify",
    "leave",
)


def register(app: typer.Typer) -> None:
    pretrained.register(app)
    for name in MODULES:
        importlib.import_module(f"concord_client.commands.{name}").register(app)
