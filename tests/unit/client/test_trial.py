"""`concord-node try`: this node alone, as a federation of one would compute, and nothing leaves."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from concord_client.cli import app
from concord_client.trial import try_plan
from concord_local.federation import Federation
from concord_server.checkpoints import RunStore
from concord_server.driver import Driver
from concord_shared.errors import DataError, UsageError
from concord_shared.models import new_vector
from concord_shared.strategies import strategy_for
from federations import digits, small_plan, transport

from .rounds_kit import Site, make_site, write_plan, write_slice


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = make_site(tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was made")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedadam"])
def test_it_is_a_federation_of_one(tmp_path: Path, strategy: str) -> None:
    """The same model, bit for bit, as a simulation of one node of that name."""
    plan = small_plan(f"strategy.name={strategy}")
    data = write_slice(plan, tmp_path)
    tried = try_plan(plan, f"npz:{data}", "node-1", "cpu")
    from concord_client.data import read_data

    rows = read_data(f"npz:{data}", plan)
    alone = Federation.of(rows, plan, "iid", 1)
    assert alone.names == ("node-1",)
    carried = transport("in-process", plan, alone, tmp_path / "states")
    layout, start = new_vector(plan)
    (tmp_path / "run").mkdir()
    driver = Driver(plan, strategy_for(plan), layout, start, alone.entries(plan), carried, RunStore(tmp_path / "run"))
    result = driver.run()
    assert tried["model_digest"] == result.model_digest
    assert tried["metrics"] == result.metrics


def test_the_command_sends_nothing_and_says_what_it_found(site: Site, offline: None) -> None:
    arguments = ["try", site.plan.digest[:12], "--dataset", "digits", "--home", str(site.home.path)]
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert [each["round"] for each in value["rounds"]] == [1, 2, 3]
    assert value["rows"] == {"train": 479, "test": 120}
    assert value["metrics"]["accuracy"] > 0.5
    assert value["estimate"]["seconds"] > 0
    assert not site.store.egress()
    text = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "Nothing was sent." in text.stdout


def test_without_an_enrolment(tmp_path: Path, offline: None) -> None:
    plan = small_plan()
    data = write_slice(plan, tmp_path)
    arguments = ["try", write_plan(plan, tmp_path), "--data", f"npz:{data}", "--rounds", "1"]
    result = CliRunner().invoke(app, [*arguments, "--home", str(tmp_path / "none")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "Only 1 of 3 rounds were tried" in result.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("given", [[], ["--data", "digits", "--dataset", "digits"]])
def test_data_are_named_once(tmp_path: Path, given: list[str]) -> None:
    with pytest.raises(UsageError, match="name the data"):
        CliRunner().invoke(app, ["try", "digits-cnn", *given], catch_exceptions=False)


def test_data_that_do_not_fit(tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "x.npz", x=np.zeros((9, 1, 9, 9), np.uint8), y=np.zeros(9, np.int64))
    with pytest.raises(DataError, match="does not fit"):
        try_plan(small_plan(), f"npz:{tmp_path / 'x.npz'}", "node-1", "cpu")


def test_least_squares_solves_in_its_one_round(tmp_path: Path, rng: Any) -> None:
    from helpers import REGRESSION, plan_of

    plan = plan_of(REGRESSION, "strategy.name=least-squares", "rounds.count=1", "rounds.weight_cap=10000")
    inputs = rng.normal(size=(200, 3)).clip(-8, 8)
    targets = inputs @ [1.0, -2.0, 0.5] + 3
    lines = ["x0,x1,x2,y", *(",".join(map(str, [*row, target])) for row, target in zip(inputs, targets, strict=True))]
    (tmp_path / "x.csv").write_text("\n".join(lines) + "\n")
    tried = try_plan(plan, f"csv:{tmp_path / 'x.csv'}", "node-1", "cpu")
    assert tried["metrics"]["rmse"] == pytest.approx(0, abs=1e-4)
    assert len(digits()) == 1797
