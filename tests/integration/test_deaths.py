"""`kill -9` of everybody at every stage of a round, over TLS: the run ends, with the model of a simulation in which
nobody was killed. `tests/deaths/sitecustomize.py` says what the stages are.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from concord_client.home import NodeHome
from concord_local.deployment import Deployment
from deployments import NODES, Keeper, begin, deployed, follow, plan_of, simulated

DEATHS = Path(__file__).resolve().parents[1] / "deaths"
STAGES = (
    "offering",
    "offered",
    "node received",
    "node trains",
    "node trained",
    "node answered",
    "node replied",
    "superlink answered node",
    "superlink asked by worker",
    "reply complete",
    "summed",
    "all answered",
    "applied",
    "stored",
)
"""Of every round, in their order."""
MASKED_STAGES = (
    "keys made",
    "shares sealed",
    "stage begun",
    "update made",
    "update masked",
    "survivors agreed",
    "opening",
    "opened",
    "unmasking",
)
LAST_STAGES = ("ended", "model kept")
EVERYBODY = ("control", "superlink", "worker", "node-1", ",".join(NODES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("deaths")
    (made / "deeds.json").write_text("[]")
    return made


@pytest.fixture(scope="module")
def deployment(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    environment = {"PYTHONPATH": str(DEATHS), "CONCORD_TEST_DEATHS": str(folder)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with deployed(tmp_path_factory.mktemp("deployed")) as running, Keeper(running, folder, environment):
            yield running


def walk(deployment: Deployment, folder: Path, deeds: list[tuple[str, str]], tmp_path: Path) -> None:
    """A run in which each deed is done as soon as its stage is reached, one after the other."""
    count = f"rounds.count={2 + len(deeds) // 2}"
    expected = simulated(tmp_path, count)
    run = begin(deployment, plan_of(count))
    (folder / "done.jsonl").unlink(missing_ok=True)
    (folder / "deeds.json").write_text(json.dumps(deeds))
    seen: list[str] = []

    def at_round(record: dict[str, Any]) -> None:
        seen.append(f"{record['kind']} {record['round']}")

    started = time.monotonic()
    report = follow(deployment, run, at_round)
    seconds = time.monotonic() - started
    assert report["state"] == "succeeded", report
    left = json.loads((folder / "deeds.json").read_text())
    assert not left, f"not reached: {left}"
    assert report["summary"]["model_digest"] == expected["model_digest"]
    assert report["summary"]["metrics"] == expected["metrics"]
    assert len(seen) == len(set(seen)) == 2 * int(count.partition("=")[2]), "no step was lost, none came twice"
    assert seconds < 60 + 20 * len(deeds), "nobody waits for a deadline"


@pytest.mark.slow
def test_each_stage_with_another_victim(deployment: Deployment, folder: Path, tmp_path: Path) -> None:
    """Every stage and every victim, but not every pair of them: that is the test below."""
    stages = [*STAGES, *LAST_STAGES]
    deeds = [(stage, EVERYBODY[index % len(EVERYBODY)]) for index, stage in enumerate(stages)]
    walk(deployment, folder, deeds, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("whom", EVERYBODY)
@pytest.mark.parametrize("order", [STAGES, STAGES[::-1]], ids=["forth", "back"])
def test_each_stage(deployment: Deployment, folder: Path, tmp_path: Path, whom: str, order: tuple[str, ...]) -> None:
    walk(deployment, folder, [(stage, whom) for stage in (*order, *LAST_STAGES)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["worker", "superlink", "node-1", ",".join(NODES)])
def test_each_stage_under_masks(deployment: Deployment, folder: Path, whom: str) -> None:
    """Each round is applied with the exact sum of named survivors, or lost by name; no node opens a step twice."""
    rounds = 2 + len(MASKED_STAGES)
    plan = plan_of(
        f"rounds.count={rounds}",
        "rounds.quorum=2",
        "rounds.grace_s=1.0",
        "rounds.deadline_s=60.0",
        f"rounds.aborts_max={rounds}",
        "privacy={mode='private', minimum_cohort=2, collusion=0}",
        f"seed={len(whom)}",
    )
    for partner in deployment.partners.values():
        policy = NodeHome(partner.home).policy_file
        policy.write_text(policy.read_text().replace("minimum_cohort = 3 ", "minimum_cohort = 2 "))
    run = begin(deployment, plan)
    (folder / "deeds.json").write_text(json.dumps([(stage, whom) for stage in MASKED_STAGES]))
    records: list[dict[str, Any]] = []
    report = follow(deployment, run, records.append)
    assert report["state"] == "succeeded", report
    assert not json.loads((folder / "deeds.json").read_text()), "every stage was reached"
    steps = [(record["kind"], record["round"]) for record in records]
    assert len(steps) == len(set(steps)), "none came twice"
    for record in records:
        assert record.get("aborted") or len(record["survivors"]) >= 2, record
        assert record["seconds"] < 5 * 61
    for partner in deployment.partners.values():
        opened: dict[tuple[str, ...], set[tuple[str, str]]] = {}
        for entry in partner.run("egress", "--limit", "0")["egress"]:
            subject = entry["subject"].split("/")  # run/kind/round/attempt/node/stage
            if subject[0] == run and subject[-1] == "open" and entry["kind"] == "reply":
                opened.setdefault(tuple(subject[1:3]), set()).add((subject[3], entry["sha256"]))
        assert opened
        assert all(len(answers) == 1 for answers in opened.values()), "opened in one attempt, with one answer"


@pytest.mark.skipif(os.name != "posix", reason="kills processes")
def test_a_stage_that_nobody_reaches_is_noticed(folder: Path) -> None:
    """The walk fails where a stage's function was renamed: all are found in the product."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("deaths", DEATHS / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    named = {stage[1:] for entries in module.STAGES.values() for _, _, stage in entries}
    assert named == {*STAGES, *MASKED_STAGES, *LAST_STAGES}
