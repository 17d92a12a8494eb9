"""What may import what, what ships to partners, and what no source may contain."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "concord_shared": ROOT / "shared" / "concord_shared",
    "concord_client": ROOT / "client" / "concord_client",
    "concord_server": ROOT / "server" / "concord_server",
    "concord_local": ROOT / "deploy" / "concord_local",
}
FORBIDDEN = {
    "concord_shared": {"concord_client", "concord_server", "concord_local"},
    "concord_client": {"concord_server", "concord_local"},
    "concord_server": {"concord_client", "concord_local"},
    "concord_local": set[str](),
}
SOURCES = [(package, path) for package, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))]


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize(("package", "path"), SOURCES, ids=lambda value: getattr(value, "name", value))
def test_imports_point_one_way(package: str, path: Path) -> None:
    assert not {name.partition(".")[0] for name in _imports(path)} & FORBIDDEN[package]


@pytest.mark.parametrize(("package", "path"), SOURCES, ids=lambda value: getattr(value, "name", value))
def test_nothing_unpickles_or_evaluates(package: str, path: Path) -> None:
    found = re.findall(
        r"\b(?:import pickle|pickle\.|torch\.load\(|yaml\.load\(|allow_pickle=True|(?<!\.)\beval\(|(?<![.\w])exec\()",
        path.read_text("utf-8"),
    )
    assert not found


PURE = ("machine", "schedule", "collector", "robust/rules", "robust/anomalies")


@pytest.mark.parametrize("module", PURE)
def test_the_engines_core_is_pure(module: str) -> None:
    """No I/O, clock, Flower, torch or database behind machine, schedule, collector, rules and anomalies."""
    imported = _imports(PACKAGES["concord_server"] / f"{module}.py")
    assert not {name.partition(".")[0] for name in imported} & {"time", "flwr", "torch", "os", "pathlib", "sqlmodel"}


def test_the_client_imports_with_the_servers_names_blocked() -> None:
    code = """
import importlib, pkgutil, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("concord_server", "concord_local"):
            raise ImportError(f"{name} is not part of a node")
sys.meta_path.insert(0, Blocked())
import concord_client
names = [m.name for m in pkgutil.walk_packages(concord_client.__path__, "concord_client.") if "__main__" not in m.name]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_wheel_of_the_node_holds_client_and_shared_and_nothing_else() -> None:
    wheel = os.environ.get("CONCORD_NODE_WHEEL")
    if not wheel:
        pytest.skip("skipped: needs a built wheel in $CONCORD_NODE_WHEEL, as .ci/run makes it")
    allowed = {
        f"{package}/{path.relative_to(PACKAGES[package])}"
        for package in ("concord_client", "concord_shared")
        for path in PACKAGES[package].rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == allowed


def test_node_runs_where_the_server_is_not_installed(tmp_path: Path) -> None:
    python = os.environ.get("CONCORD_NODE_PYTHON")
    if not python:
        pytest.skip("skipped: needs an environment with concord-node only in $CONCORD_NODE_PYTHON, as .ci/run makes it")
    code = (
        "import concord_client, importlib.util as u; print(u.find_spec('concord_server'), u.find_spec('concord_local'))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "None None"
    done = subprocess.run(
        [python, "-m", "concord_client", "check", "digits-cnn", "--data", "digits", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert '"rows": 1797' in done.stdout, done.stderr
