"""The commands of `concord` that speak to a coordinator. Each imports what it needs when it runs."""

import importlib

import typer

__all__ = ["register_commands"]

MODULES = (
    "server",
    "login",
    "organisations",
    "people",
    "nodes",
    "keys",
    "datasets",
    "studies",
    "agreements",
    "plans",
    "runs",
    "models",
    "audit",
    "verify",
)


def register_commands(app: typer.Typer) -> None:
    """Every module has `register(app)`, which adds its commands or its group of them."""
    for name in MODULES:
        importlib.import_module(f"concord_server.commands.{name}").register(app)
