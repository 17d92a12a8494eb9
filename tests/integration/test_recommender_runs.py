"""Recommenders in whole runs: what leaves a node is about items, whoever looks and however the run goes."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from numpy.typing import NDArray

from concord_client.data import NodeDataset, RawData, Split, read_data
from concord_client.inference import TrainedModel, evaluate, predict
from concord_client.training_desk import read_dataset
from concord_client.trial import try_plan
from concord_local import simulate
from concord_local.baselines import by_popularity
from concord_local.federation import Federation
from concord_local.inference import predict_run
from concord_local.partitions import deal
from concord_local.slices import write_slice
from concord_local.transports import InProcessTransport
from concord_server.checkpoints import RunStore
from concord_shared.models import layout_of, new_vector
from concord_shared.models.recommender import MatrixFactorisation, NeuralCollaborativeFiltering
from concord_shared.models.registry import build_model
from concord_shared.plan import Plan
from concord_shared.preprocessing import unfitted
from federations import Relay, driver, transport
from helpers import RANKING, RATINGS, plan_of

GUESTS, NODES = 30, 3
PLACES = [f"p{number}" for number in range(12)]
COMMON = [f"data.items={PLACES}", "rounds.count=2", "training.optimiser=adam", "training.learning_rate=0.05"]
NCF = "model={name='neural-cf', factors=3, hidden=[4], steps=5}"
KINDS = {"mf": (RATINGS, ()), "mf-ranking": (RANKING, ()), "ncf": (RATINGS, (NCF,)), "ncf-ranking": (RANKING, (NCF,))}
PRIVATE = "privacy.mode=private"


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Guests of two towns, who go to the places of their own."""
    chance = np.random.default_rng(7)
    lines = ["guest,place,stars"]
    for guest in range(GUESTS):
        for place in chance.permutation(6)[:5] + 6 * (guest % 2):
            lines.append(f"kanarie{guest},p{place},{chance.integers(0, 5)}")
    (tmp_path / "ratings.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return f"csv:{tmp_path / 'ratings.csv'}"


def plan_for(kind: str, *overrides: str) -> Plan:
    text, changes = KINDS[kind]
    return plan_of(text, *changes, *COMMON, *overrides)


def plan_file(folder: Path, kind: str) -> str:
    """A plan that `simulate` takes, with its overrides."""
    (folder / "plan.toml").write_text(KINDS[kind][0], "utf-8")
    return str(folder / "plan.toml")


def run(folder: Path, source: str, kind: str, *overrides: str, **options: Any) -> dict[str, Any]:
    return simulate(
        plan_file(folder, kind),
        data=source,
        nodes=NODES,
        partition="grouped:guest",
        overrides=[*KINDS[kind][1], *COMMON, *overrides],
        workers=1,
        **options,
    ).summary


class Witness(Relay):
    """Keeps all that passes between the nodes and the coordinator."""

    def __init__(self, inner: InProcessTransport) -> None:
        super().__init__(inner)
        self.messages: list[Message] = []

    def send(self, messages: Iterable[Message]) -> None:
        listed = list(messages)
        self.messages += listed
        self.inner.send(listed)

    def receive(self, timeout_s: float) -> list[Message]:
        replies = self.inner.receive(timeout_s)
        self.messages += replies
        return replies

    def bytes(self) -> bytes:
        parts = []
        for message in self.messages:
            for record in message.content.array_records.values():
                parts += [record[name].data for name in record]
            for name, settings in message.content.config_records.items():
                parts.append(f"{name} {dict(settings)}".encode())
        return b"\0".join(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_no_user_is_in_a_message_a_checkpoint_or_the_model(
    kind: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[NDArray[np.float32]] = []
    for model in (MatrixFactorisation, NeuralCollaborativeFiltering):
        original = model.fit_users

        def watched(self: Any, rows: Any, targets: Any, original: Any = original) -> None:
            original(self, rows, targets)
            fitted.append(self.users.numpy().copy())

        monkeypatch.setattr(model, "fit_users", watched)
    plan = plan_for(kind)
    nodes = Federation.of(read_data(source, plan), plan, "grouped:guest", NODES)
    witness = Witness(transport("in-process", plan, nodes, tmp_path / "run"))  # type: ignore[arg-type]
    driver(plan, nodes, witness, tmp_path / "run").run()
    witness.close()
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    said = witness.bytes() + b"\0".join(file.read_bytes() for file in files)
    users = {row.tobytes() for table in fitted for row in table if np.count_nonzero(row) == len(row)}
    assert len(users) > 2 * GUESTS
    assert not [user for user in users if user in said]
    assert b"kanarie" not in said
    layout, start = new_vector(plan)
    assert layout.split(start)["item_vectors"].tobytes() in said  # what is sent is found by this
    for message in witness.messages:
        if "blocks" in message.content.array_records:
            sizes = {name: array.shape for name, array in message.content.array_records["blocks"].items()}
            assert sizes.get("delta", (layout.size,)) == (layout.size,)
            assert set(sizes) <= {"delta", "metrics", "lanes"}


@pytest.mark.parametrize("kind", ["mf", "ncf-ranking"])
def test_masked_equals_plain(kind: str, source: str, tmp_path: Path) -> None:
    plain = run(tmp_path, source, kind, out=tmp_path / "p")
    masked = run(tmp_path, source, kind, PRIVATE, out=tmp_path / "m")
    for figure in ("model_digest", "metrics", "owners"):
        assert masked[figure] == plain[figure], figure
    assert masked["per_node"] is None


def test_a_resumed_run_ends_with_the_same_model(source: str, tmp_path: Path) -> None:
    """Though at the nodes nothing of a user is kept: neither a state nor a name."""
    whole = run(tmp_path, source, "ncf-ranking", PRIVATE, out=tmp_path / "whole")
    files = [file for file in (tmp_path / "whole").rglob("*") if file.is_file()]
    assert not [file for file in files if file.name.endswith((".current.safetensors", ".pending.safetensors"))]
    assert not [file for file in files if b"kanarie" in file.read_bytes()]

    class Stop(Exception):
        pass

    def stop(record: Any) -> None:
        if record["kind"] == "train" and record["round"] == 1:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path, source, "ncf-ranking", PRIVATE, out=tmp_path / "part", observer=stop)
    assert simulate(resume=tmp_path / "part").summary["model_digest"] == whole["model_digest"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_partner_with_its_own_users_alone_trains_the_same(kind: str, source: str, tmp_path: Path) -> None:
    """A simulation numbers the users of all nodes together, a partner those in its file: bit for bit the same model."""
    from concord_client.trainer import Workbench

    plan = plan_for(kind)
    data = read_data(source, plan)
    dealt = deal(data, plan.data, "grouped:guest", NODES, plan.seed)
    simulated = Federation.of(data, plan, "grouped:guest", NODES).dataset("node-2")
    own = read_dataset(plan, "node-2", write_slice(data, dealt["node-2"], plan, tmp_path))
    bench = Workbench(plan, torch.device("cpu"))

    def trained(dataset: NodeDataset) -> tuple[bytes, list[int]]:
        train, test = (
            bench.rows(unfitted(plan).transform(inputs), targets)
            for inputs, targets in (dataset.take(Split.TRAIN), dataset.take(Split.TEST))
        )
        bench.load(new_vector(plan)[1])
        bench.train(train, 0.05, 3)
        return bench.read().tobytes(), bench.evaluate(test, known=train).vector.tolist()

    assert trained(own) == trained(simulated)


def test_each_user_is_told_the_best_of_what_is_new(source: str, tmp_path: Path) -> None:
    run(tmp_path, source, "mf-ranking", "rounds.count=15", "training.local_epochs=5", out=tmp_path / "run")
    result = predict_run(tmp_path / "run", source, None)
    taken = {tuple(line.split(",")[:2]) for line in Path(source[4:]).read_text("utf-8").splitlines()[1:]}
    told = list(zip(result["user"], result["item"], strict=True))
    assert result["rows"] == len(told) == GUESTS * 7  # of 12 places each guest was at 5
    assert not taken & set(told)
    assert {user for user, _ in told} == {f"kanarie{guest}" for guest in range(GUESTS)}
    towns = [int(item[1:]) // 6 == int(user[7:]) % 2 for user, item in told[::7]]
    assert np.mean(towns) > 0.9  # the place of their own town where they were not yet comes first
    for start in range(0, len(told), 7):
        assert result["score"][start : start + 7] == sorted(result["score"][start : start + 7], reverse=True)


def test_figures_of_ratings_predict_a_part_from_the_rest(source: str) -> None:
    plan = plan_for("mf")
    data = read_data(source, plan)
    figures = evaluate(TrainedModel(plan, new_vector(plan)[1], unfitted(plan)), data, "cpu")
    assert figures["rows"] == round(0.2 * len(data))
    assert 0.5 < figures["metrics"]["rmse"] < 3


def test_an_empty_answer_where_users_have_had_everything() -> None:
    plan = plan_of(RATINGS)
    data = RawData(np.array([[0.0, 0], [0, 1], [0, 2]]), np.ones(3), None, {"guest": np.array(["ann"] * 3, object)})
    found = predict(TrainedModel(plan, new_vector(plan)[1], unfitted(plan)), data, "cpu")
    assert found == {"rows": 0, "user": [], "item": [], "score": []}


@pytest.mark.parametrize("kind", ["mf", "ncf-ranking"])
def test_a_trial_at_the_node_has_figures(kind: str, source: str) -> None:
    result = try_plan(plan_for(kind), source, "node-1", "cpu", rounds=1)
    assert result["metrics"][result["headline"]] > 0


def test_popularity_is_what_a_slow_count_says(source: str) -> None:
    plan = plan_for("mf-ranking")
    nodes = Federation.of(read_data(source, plan), plan, "grouped:guest", NODES)
    counts = dict.fromkeys(range(12), 0)
    for name in nodes.names:
        for _, item in nodes.dataset(name).take(Split.TRAIN)[0]:
            counts[int(item)] += 1
    places = []
    for name in nodes.names:
        train = nodes.dataset(name).take(Split.TRAIN)[0]
        for user, item in nodes.dataset(name).take(Split.TEST)[0]:
            seen = {int(i) for u, i in train if u == user}
            rest = [counts[other] for other in counts if other not in seen and other != item]
            own = counts[int(item)]
            places.append(1 + sum(count > own for count in rest) + sum(count == own for count in rest) / 2)
    figures = by_popularity(plan, nodes).figures()
    assert figures["hit_rate_10"] == pytest.approx(np.mean([place <= 10 for place in places]))
    gains = [1 / np.log2(1 + place) if place <= 10 else 0 for place in places]
    assert figures["ndcg_10"] == pytest.approx(np.mean(gains), abs=1e-5)


def test_the_comparison_says_what_popularity_comes_to(source: str, tmp_path: Path) -> None:
    summary = run(tmp_path, source, "mf-ranking", out=tmp_path / "run", compare=True)
    total = summary["comparison"]["all"]
    assert summary["comparison"]["headline"] == "ndcg_10"
    assert 0 < total["popularity"] < 1
    assert total["federated"] == summary["metrics"]["ndcg_10"]
    assert json.loads((tmp_path / "run" / "comparison.json").read_text("utf-8"))["all"] == total
    assert "NDCG@10" in (tmp_path / "run" / "report.html").read_text("utf-8")
    assert RunStore(tmp_path / "run").records()[-1]["metrics"]["hit_rate_10"] == summary["metrics"]["hit_rate_10"]


def test_the_model_of_a_run_has_the_size_of_its_items(source: str, tmp_path: Path) -> None:
    """Thirty guests or six: what is sent is as large."""
    assert layout_of(plan_for("mf"), build_model(plan_for("mf"))).size == 1 + 12 * (1 + 2)
    summary = run(tmp_path, source, "mf", out=tmp_path / "run")
    lines = Path(source[4:]).read_text("utf-8").splitlines()
    Path(source[4:]).write_text("\n".join(lines[:31]) + "\n", "utf-8")
    fewer = run(tmp_path, source, "mf", out=tmp_path / "fewer")
    assert abs(summary["bytes_up"] - fewer["bytes_up"]) < 0.02 * summary["bytes_up"]
