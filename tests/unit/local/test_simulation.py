"""What a simulation refuses, it refuses before it writes: the corrected command finds its directory free."""

from pathlib import Path
from typing import Any

import pytest

from concord_local import simulate
from concord_local.nodes import NodeHost
from concord_shared.errors import ConcordError, RunFailedError, UsageError

REFUSED = {
    "side by side with what cannot": (
        ("simulate.side_by_side=4", "strategy.name=fedprox"),
        {},
        "one computation with strategy fedprox",
    ),
    "no blocks": (("training.recompute_activations=true",), {"workers": 1}, "no blocks"),
    "no blocks in workers": (("training.recompute_activations=true",), {"workers": 2}, "no blocks"),
    "a delta finer than draws": (
        ("privacy={mode='plain', dp={unit='node', epsilon=1e-3, delta=1e-9, clip=1.0}}", "rounds.update_bound=1.0"),
        {"workers": 1},
        "too small for 20 rounds",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("seeds", [None, 2])
def test_a_refused_run_leaves_no_directory(case: str, seeds: int | None, tmp_path: Path) -> None:
    overrides, options, words = REFUSED[case]
    with pytest.raises(UsageError, match=words):
        simulate("digits-cnn", nodes=4, overrides=overrides, seeds=seeds, out=tmp_path / "run", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [UsageError("no memory left"), RunFailedError("did not start"), KeyboardInterrupt()])
def test_a_run_whose_nodes_do_not_start_leaves_no_directory(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(NodeHost, "__post_init__", fail)
    with pytest.raises(ConcordError, match=r"no memory|did not start|Nothing was written"):
        simulate("digits-cnn", nodes=4, workers=1, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    with pytest.raises(ConcordError, match=r"no memory|did not start|Nothing was written"):
        simulate("digits-cnn", nodes=4, workers=1, out=tmp_path / "run")
    assert not list((tmp_path / "run").iterdir()), "what was there before is left, as it was"
