"""A person's own model that does not fit is refused in one sentence, before anything is written or started."""

from pathlib import Path

import pytest

from concord_local import simulate
from concord_shared.errors import UsageError

HEAD = "import torch\nfrom torch import nn\n"
FITS = "nn.Flatten(), nn.Linear(64, 10)"
MODELS = {
    "too few answers": (
        "nn.Sequential(nn.Flatten(), nn.Linear(64, 3))",
        r"answers to 2 rows have shape \[2, 3\], expected a tensor of shape \[2, 10\].*10 classes",
    ),
    "answers of another rank": (
        "nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Unflatten(1, (10, 1)))",
        r"have shape \[2, 10, 1\]",
    ),
    "no tensor": (f"type('Pair', (nn.Sequential,), dict(forward=lambda self, x: (x, x)))({FITS})", "are of type tuple"),
    "another input shape": (
        "nn.Sequential(nn.Flatten(), nn.Linear(784, 10))",
        r"one step over rows of shape \[1, 8, 8\] fails: RuntimeError",
    ),
    "answers without a gradient": (
        f"type('Cut', (nn.Sequential,), dict(forward=lambda self, x: torch.zeros(len(x), 10)))({FITS})",
        "one step .* fails: RuntimeError",
    ),
    "no parameters": ("nn.Flatten()", "no parameter that training could move"),
    "frozen": ("nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)", "no parameter that training"),
    "lazy": ("nn.Sequential(nn.Flatten(), nn.LazyLinear(10))", "lazy layers, without sizes yet"),
    "no module": ("object()", "expected a torch.nn.Module, got object"),
}


def source(folder: Path, model: str, before: str = "") -> str:
    file = folder / "net.py"
    file.write_text(f"{HEAD}{before}\ndef build():\n    return {model}\n", "utf-8")
    return f"{file}:build"


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("seeds", [None, 2])
def test_a_model_that_does_not_fit_is_refused_and_leaves_nothing(
    case: str, seeds: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("concord_local.simulation.federate", lambda *_: pytest.fail("nodes were started"))
    model, words = MODELS[case]
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=rf"^--model .*net\.py:build: .*{words}"):
        simulate("digits-cnn", nodes=3, workers=2, seeds=seeds, model=source(tmp_path, model), out=out)
    assert not out.exists()


def test_a_regression_answers_one_number_a_row(tmp_path: Path) -> None:
    rows = "".join(f"{20 + each},{each}\n" for each in range(40))
    (tmp_path / "rows.csv").write_text("age,score\n" + rows, "utf-8")
    (tmp_path / "plan.toml").write_text(
        'name = "scores"\n[data]\ntask = "regression"\ninput = "table"\ntarget = "score"\n'
        'target_range = [0, 40]\ncolumns = [{name = "age"}]\n[model]\nname = "mlp"\n[rounds]\ncount = 1\n',
        "utf-8",
    )
    options = {"data": f"csv:{tmp_path / 'rows.csv'}", "nodes": 2, "workers": 1}
    plan, out = str(tmp_path / "plan.toml"), tmp_path / "run"
    with pytest.raises(UsageError, match=r"have shape \[2\], expected a tensor of shape \[2, 1\].*the plan's target"):
        simulate(plan, model=source(tmp_path, "nn.Sequential(nn.Linear(1, 1), nn.Flatten(0))"), out=out, **options)
    simulate(plan, model=source(tmp_path, "nn.Linear(1, 1)"), out=out, **options)
    assert (out / "report.html").exists()


def test_a_module_with_another_base_beside_it_is_a_module(tmp_path: Path) -> None:
    mixed = "class Named: ...\nclass Net(nn.Sequential, Named): ..."
    small = ("rounds.count=1",)
    model = source(tmp_path, f"Net({FITS})", mixed)
    simulate("digits-cnn", nodes=3, workers=1, overrides=small, model=model, out=tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists()
