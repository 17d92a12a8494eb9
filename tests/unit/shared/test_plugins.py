"""Models of other wheels: listed without being imported, built only where their code is what the plan names."""

import sys
from pathlib import Path

import pytest
from wheels import MODEL, install

from concord_shared.errors import PlanError, UsageError
from concord_shared.models import build_model, layout_of, new_vector
from concord_shared.models.plugins import fault_of, installed_plugins
from concord_shared.plan.models import PluginModel
from concord_shared.plan.schema import Plan
from concord_shared.plan.sizes import parameters
from helpers import IMAGES, plan_of

SIZE = 64 * 8 + 8 + 8 * 3 + 3


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the model's code."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_models", raising=False)
    yield install(tmp_path)
    sys.modules.pop("their_models", None)


def plan_with(digest: str, **changes: object) -> Plan:
    model = {"name": "plugin", "package": "their-models", "model": "small-net", "sha256": digest, "parameters": SIZE}
    return plan_of(IMAGES).with_changes(model=model | changes)


def current(**changes: object) -> Plan:
    (found,) = (each for each in installed_plugins() if each.package == "their-models")
    return plan_with(found.sha256, **changes)


def model_of(plan: Plan) -> PluginModel:
    assert isinstance(plan.model, PluginModel)
    return plan.model


def test_a_wheel_is_listed_and_nothing_of_it_imported(wheel: Path) -> None:
    wheel.write_text("raise SystemExit('imported')")
    (found,) = (each for each in installed_plugins() if each.package == "their-models")
    assert (found.version, found.models, found.fault) == ("1.0", ("small-net",), "")
    assert "their_models" not in sys.modules


def test_the_model_is_built_with_its_settings(wheel: Path) -> None:
    assert layout_of(current(), build_model(current())).size == SIZE
    narrow = current(settings={"width": 4})
    assert layout_of(narrow, build_model(narrow)).size < SIZE
    layout, theta = new_vector(current())
    assert (layout.size, theta.shape) == (SIZE, (SIZE,))
    assert parameters(current()) == SIZE


def test_other_code_than_the_plan_names_is_not_imported(wheel: Path) -> None:
    plan = current()
    wheel.write_text("raise SystemExit('imported')")
    with pytest.raises(UsageError, match=r"other code .* than the plan names"):
        build_model(plan)
    assert "their_models" not in sys.modules


@pytest.mark.parametrize("name", ["their_models__more.py", "their_models__data.json", "their_models__legacy.pyc"])
def test_each_file_of_the_wheel_is_under_the_hash(tmp_path: Path, wheel: Path, name: str) -> None:
    before = current()
    install(tmp_path, **{name: "1"})
    with_one = current()
    install(tmp_path, **{name: "2"})
    assert len({model_of(plan).sha256 for plan in (before, with_one, current())}) == 3


def test_what_an_installer_notes_is_not(tmp_path: Path, wheel: Path) -> None:
    plan = current()
    about = tmp_path / "their_models-1.0.dist-info"
    (about / "INSTALLER").write_text("another\n")
    (about / "METADATA").write_text("Metadata-Version: 2.4\nName: their-models\nVersion: 1.0\n")
    assert fault_of(model_of(plan)) == ""
    (about / "entry_points.txt").write_text("[concord.models]\nsmall-net = their_models:other\n")
    assert "is other code" in fault_of(model_of(plan))


def test_compiled_files_that_a_wheel_brings_are_not_run(wheel: Path) -> None:
    import importlib.util
    import py_compile

    evil = wheel.parent / "evil.py"
    evil.write_text("raise SystemExit('compiled')")
    place = importlib.util.cache_from_source(str(wheel))
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(evil), place, invalidation_mode=mode)
    evil.unlink()
    assert layout_of(current(), build_model(current())).size == SIZE


def test_a_module_of_the_same_name_before_it_is_not_imported(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = current()
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "their_models.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "before"))
    with pytest.raises(UsageError, match="would be imported from elsewhere"):
        build_model(plan)


def test_a_link_to_other_files_has_no_hash(tmp_path: Path, wheel: Path) -> None:
    install(tmp_path, **{"__editable__.their_models.pth": "/elsewhere"})
    (found,) = (each for each in installed_plugins() if each.package == "their-models")
    assert found.sha256 == ""
    assert "a link to other files" in found.fault
    assert "a link to other files" in fault_of(model_of(plan_with("0" * 64)))


def test_what_is_not_installed_is_said(wheel: Path) -> None:
    assert fault_of(model_of(current(package="another"))) == "the wheel another is not installed here"
    assert "has no model other; it has small-net" in fault_of(model_of(current(model="other")))
    wheel.unlink()
    assert "is missing; install it anew" in fault_of(model_of(plan_with("0" * 64)))


def test_code_that_fails_is_said(wheel: Path) -> None:
    wheel.write_text("import nothing_of_that_name")
    with pytest.raises(UsageError, match="cannot be loaded: ModuleNotFoundError"):
        build_model(current())


def test_more_parameters_than_the_plan_says_are_refused(wheel: Path) -> None:
    with pytest.raises(UsageError, match=f"built {SIZE} parameters, expected at most {SIZE - 1}"):
        build_model(current(parameters=SIZE - 1))


@pytest.mark.parametrize(
    "changes", [{"sha256": "x"}, {"package": "../x"}, {"parameters": 0}, {"settings": {"x": "y" * 201}}, {"code": "x"}]
)
def test_a_plan_names_it_in_full_and_no_more(changes: dict[str, object]) -> None:
    with pytest.raises((PlanError, ValueError)):
        plan_with("0" * 64, **changes)


def test_a_plugin_of_another_name_may_share_the_code(tmp_path: Path, wheel: Path) -> None:
    install(tmp_path, package="their-others", code=MODEL)
    packages = [each.package for each in installed_plugins()]
    assert packages == sorted(packages)
    assert {"their-models", "their-others"} <= set(packages)
