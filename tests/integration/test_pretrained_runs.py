"""Federations that begin from a directory of weights: adapters travel, under masks too, and the base stays."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pretrained_models import encoder_directory

from concord_local import simulate
from concord_local.demo import demo
from concord_local.inference import evaluate_run
from concord_shared.errors import UsageError
from concord_shared.plan import load_plan
from concord_shared.pretrained.store import add, fault_of
from datasets import needs
from helpers import TOPICS, plan_of

SIZE = 2 * 2 * 4 * (16 + 16) + 16 * 3 + 3
"""Adapters of two layers, and the head."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A plan, and beside it the rows of three wards; its weights are in this machine's store for so long."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONCORD_PRETRAINED", str(folder / "store"))
        sha256 = add(encoder_directory(folder / "tiny-bert")).sha256
        lora = {"rank": 4, "targets": ["query", "value"]}
        model = {"package": "tiny-bert", "sha256": sha256, "parameters": SIZE, "lora": lora}
        plan = plan_of(TOPICS).with_changes(
            model={"name": "pretrained-encoder"} | model,
            preprocessing={"tokens": {"length": 8, "pretrained": sha256}},
            training={"optimiser": "adamw", "learning_rate": 0.01, "local_epochs": 4},
            rounds={"count": 6},
        )
        document = {key: value for key, value in plan.document().items() if key not in ("schema", "statistics")}
        (folder / "plan.toml").write_text(tomli_w.dumps(_without_none(document)), "utf-8")
        rows = [("a a b", "a"), ("b a b", "a"), ("h g g", "b"), ("g h h", "b"), ("d e", "c"), ("e d d", "c")] * 15
        lines = [json.dumps({"words": text, "label": label}) for text, label in rows]
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        yield folder


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return value


def run(tiny: Path, out: Path, *overrides: str) -> dict[str, Any]:
    data = f"jsonl:{tiny / 'rows.jsonl'}"
    return simulate(str(tiny / "plan.toml"), data=data, nodes=3, overrides=overrides, workers=1, out=out).summary


def test_adapters_are_what_travels_and_masks_change_nothing(tiny: Path, tmp_path: Path) -> None:
    plain = run(tiny, tmp_path / "plain")
    private = run(tiny, tmp_path / "private", "privacy.mode=private")
    assert private["model_digest"] == plain["model_digest"]
    assert plain["bytes_down"] / (3 * 6) < 4 * SIZE + 5000
    assert plain["metrics"]["accuracy"] > 0.8
    told = evaluate_run(tmp_path / "plain", f"jsonl:{tiny / 'rows.jsonl'}")
    assert told["metrics"]["accuracy"] > 0.8


def test_a_model_cannot_be_used_without_its_base(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tiny, tmp_path / "run", "rounds.count=1")
    monkeypatch.setenv("CONCORD_PRETRAINED", str(tmp_path / "elsewhere"))
    with pytest.raises(UsageError, match=r"tiny-bert .* is not on this machine"):
        run(tiny, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(UsageError, match=r"tiny-bert .* is not on this machine"):
        evaluate_run(tmp_path / "run", f"jsonl:{tiny / 'rows.jsonl'}")


@pytest.mark.slow
def test_a_deployed_federation_comes_to_the_same_model(tiny: Path, tmp_path: Path) -> None:
    data = f"jsonl:{tiny / 'rows.jsonl'}"
    found = demo(str(tiny / "plan.toml"), data=data, nodes=3, overrides=["privacy.mode=private"])
    assert found["model_digest"] == run(tiny, tmp_path / "run")["model_digest"]


@pytest.mark.slow
@needs("sentiment")
def test_sentiment_with_minilm_is_near_pooled(tmp_path: Path) -> None:
    """Three seeds, each with its own pooled figure: half an hour."""
    model: Any = load_plan("sentiment-minilm").plan.model
    if fault := fault_of(model):
        pytest.skip(f"{fault}; weights of sentence-transformers/all-MiniLM-L6-v2")
    shares = []
    for seed in range(3):
        simulate("sentiment-minilm", overrides=[f"seed={seed}"], workers=2, compare=True, out=tmp_path / str(seed))
        comparison = json.loads((tmp_path / str(seed) / "comparison.json").read_text("utf-8"))["all"]
        shares.append((comparison["federated"], comparison["pooled"], comparison["alone_mean"]))
        print(seed, shares[-1])
    federated, pooled, _ = (sum(each) / 3 for each in zip(*shares, strict=True))
    assert federated >= 0.85
    assert federated >= pooled - 0.02
