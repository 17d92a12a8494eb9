"""What may import what, what ships to partners, and what no source may contain."""

import ast
import os
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


CODE_FROM_DATA = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "jsonpickle", "marshal", "shelve"}
CODE_FROM_DATA |= {"yaml", "torch.package", "torch.hub", "torch.jit"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "np.fromregex", "pd.read_pickle"}
BY_NAME = {
    "concord_client/commands/__init__.py",
    "concord_server/commands/__init__.py",
    "concord_server/api/app.py",
    "concord_server/database.py",
    "concord_server/superlink/environment.py",
}
"""These import modules by a name that stands in the source."""


def code_from_data(source: str, file: str = "") -> list[str]:
    """What in a source could turn bytes into code: pickles and their kin, evaluation, imports by name, shells."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {node.module or ""} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
            found += [name for name in names for bad in CODE_FROM_DATA if name == bad or name.startswith(f"{bad}.")]
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
        found += [called] * (called in CALLS)
        found += [called] * (called in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False")
        found += ["allow_pickle"] * (keywords.get("allow_pickle", "False") != "False")
        found += ["shell"] * (keywords.get("shell", "False") != "False" or called == "os.system")
        found += [called] * (called.endswith("import_module") and file not in BY_NAME)
    return found


@pytest.mark.parametrize(("package", "path"), SOURCES, ids=lambda value: getattr(value, "name", value))
def test_nothing_unpickles_or_evaluates(package: str, path: Path) -> None:
    file = f"{package}/{path.relative_to(PACKAGES[package]).as_posix()}"
    assert not code_from_data(path.read_text("utf-8"), file)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import torch.package",
        "import yaml",
        "torch.load(path, weights_only=True)",
        "eval(text)",
        "exec(compile(text, name, 'exec'))",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=wanted)",
        "importlib.import_module(message['component'])",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
    ],
)
def test_it_would_be_found(source: str) -> None:
    assert code_from_data(source)


def test_what_is_safe_is_not_found() -> None:
    assert not code_from_data("model.eval()\nre.compile('a')\nnp.load(path, allow_pickle=False)\nsession.exec(query)")


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
