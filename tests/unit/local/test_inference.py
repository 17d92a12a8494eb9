"""What finished runs are asked for that they do not have."""

from collections.abc import Callable
from pathlib import Path

import pytest

from concord_local import simulate
from concord_local.inference import compare_runs, evaluate_run, predict_run
from concord_shared.errors import UsageError

SMALL = ("rounds.count=1", "model.name=2nn")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run whose model is all shared, one whose nodes have their own, and one over seeds."""
    folder = tmp_path_factory.mktemp("inference")
    own = (*SMALL, "strategy.name=ditto")
    simulate("digits-cnn", nodes=3, workers=1, overrides=SMALL, out=folder / "shared")
    simulate("digits-cnn", nodes=3, workers=1, overrides=own, out=folder / "own")
    simulate("digits-cnn", nodes=3, workers=1, overrides=SMALL, seeds=1, out=folder / "seeds")
    return folder


ASKED: list[Callable[[Path, str], object]] = [
    lambda run, node: evaluate_run(run, "digits", node),
    lambda run, node: predict_run(run, "digits", None, node),
]


@pytest.mark.parametrize("ask", ASKED)
def test_a_node_without_an_own_part_is_refused(ask: Callable[[Path, str], object], runs: Path) -> None:
    with pytest.raises(UsageError, match=r"^--node node-1: nothing of this run's model stays .* leave --node out"):
        ask(runs / "shared", "node-1")


def test_a_node_with_an_own_part_answers_with_it(runs: Path) -> None:
    assert "this node's own" in evaluate_run(runs / "own", "digits", "node-1")["personal"]
    with pytest.raises(UsageError, match=r"--node node-9: the run has no node node-9; it has node-1, node-2, node-3"):
        evaluate_run(runs / "own", "digits", "node-9")


def test_of_a_run_over_seeds_one_is_named(runs: Path) -> None:
    for ask in (
        lambda run: evaluate_run(run, "digits"),
        lambda run: predict_run(run, "digits", None),
        lambda run: compare_runs([runs / "shared", run]),
    ):
        with pytest.raises(UsageError, match=rf"is a run over seeds.* name one of those: {runs / 'seeds' / 'seed-0'}"):
            ask(runs / "seeds")
    assert evaluate_run(runs / "seeds" / "seed-0", "digits")["rows"] == 1797
