"""Models of other wheels: found by entry point, bound by the hash of their installed code, allowed by each owner.

A wheel registers them in the group `concord.models`: each entry is a function from the plan to an `nn.Module`. Nothing
of a wheel is imported before its code has the hash that the plan names; a plan never carries code.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackagePath
from pathlib import Path
from typing import TYPE_CHECKING

from concord_shared.errors import UsageError
from concord_shared.files import file_digest
from concord_shared.plan.models import PluginModel

if TYPE_CHECKING:
    from concord_shared.models.registry import ModelBuilder

__all__ = ["GROUP", "Plugin", "fault_of", "installed_plugins", "plugin_builder"]

GROUP = "concord.models"
ENTRY_POINTS = "entry_points.txt"
"""Of a wheel's `.dist-info` the one file that says what is run; the others are notes of who built and installed it."""


@dataclass(frozen=True)
class Plugin:
    """A wheel that is installed here. sha256: of its code; "" where `fault` says why it has none."""

    package: str
    version: str
    models: tuple[str, ...]
    sha256: str
    fault: str = ""


def installed_plugins() -> list[Plugin]:
    """The wheels that register models, by name. Imports none of them."""
    packages = {entry.dist.name for entry in importlib.metadata.entry_points(group=GROUP) if entry.dist is not None}
    return [_described(importlib.metadata.distribution(name)) for name in sorted(packages)]


def fault_of(model: PluginModel) -> str:
    """Why this model cannot be built here: not installed, or other code than the plan names; "" where it can."""
    try:
        found = _described(importlib.metadata.distribution(model.package))
    except importlib.metadata.PackageNotFoundError:
        return f"the wheel {model.package} is not installed here"
    if found.fault:
        return f"the wheel {model.package}: {found.fault}"
    if found.sha256 != model.sha256:
        return (
            f"the wheel {model.package} {found.version} that is installed here is other code ({found.sha256[:12]}) "
            f"than the plan names ({model.sha256[:12]})"
        )
    if model.model not in found.models:
        return f"the wheel {model.package} has no model {model.model}; it has {', '.join(found.models)}"
    return ""


def plugin_builder(model: PluginModel) -> "ModelBuilder":
    """The wheel's function, imported now: its code is what the plan names.

    Raises:
        UsageError: it is not, or cannot be imported.
    """
    if fault := fault_of(model):
        raise UsageError(f"model plugin: {fault}")
    distribution = importlib.metadata.distribution(model.package)
    entry = next(each for each in distribution.entry_points if (each.group, each.name) == (GROUP, model.model))
    _check_place(distribution, entry.module)
    try:
        with _no_bytecode():
            build: ModelBuilder = entry.load()
    except Exception as error:  # whatever the wheel's own code does
        raise UsageError(f"model plugin: {model.package} cannot be loaded: {type(error).__name__}: {error}") from error
    return build


def _described(distribution: Distribution) -> Plugin:
    models = tuple(sorted(entry.name for entry in distribution.entry_points if entry.group == GROUP))
    sha256, fault = "", ""
    try:
        sha256 = _digest(distribution)
    except UsageError as error:
        fault = str(error)
    return Plugin(distribution.name, distribution.version, models, sha256, fault)


def _digest(distribution: Distribution) -> str:
    """SHA-256 over names and contents of all that the wheel installed, but for what was noted of it and compiled: the
    same wherever the same sources were built.

    Raises:
        UsageError: its files are not all of its code, or are not there.
    """
    digest = hashlib.sha256()
    for file in _files(distribution):
        place = Path(str(file.locate()))
        try:
            content = file_digest(place)
        except OSError as error:
            raise UsageError(f"{file} is missing; install it anew") from error
        name = file.as_posix().encode()
        digest.update(len(name).to_bytes(8, "little") + name + bytes.fromhex(content))
    return digest.hexdigest()


def _files(distribution: Distribution) -> list[PackagePath]:
    """Of the wheel, in the order of their names."""
    files = distribution.files or []
    if not files or any(file.suffix == ".pth" for file in files):
        raise UsageError("it is installed as a link to other files, which no hash holds; build and install its wheel")
    own = [
        file
        for file in files
        if "__pycache__" not in file.parts
        and (file.name == ENTRY_POINTS or not file.parent.name.endswith(".dist-info"))
    ]
    return sorted(own, key=lambda file: file.as_posix())


def _check_place(distribution: Distribution, module: str) -> None:
    """What would be imported is the wheel's own file, and nothing of that name before it on the path."""
    top = module.partition(".")[0]
    own = {Path(str(file.locate())).resolve() for file in _files(distribution)}
    spec = importlib.util.find_spec(top)
    origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
    if origin not in own:
        raise UsageError(f"model plugin: {top} would be imported from elsewhere, not from {distribution.name}")


@contextlib.contextmanager
def _no_bytecode() -> Iterator[None]:
    """Compiled files beside the sources are not read: a wheel may bring some, and no hash is of them."""
    before, written = sys.pycache_prefix, sys.dont_write_bytecode
    with tempfile.TemporaryDirectory(prefix="concord-plugin-") as folder:
        sys.pycache_prefix, sys.dont_write_bytecode = folder, True
        try:
            yield
        finally:
            sys.pycache_prefix, sys.dont_write_bytecode = before, written
