"""Four partners' statistics in a real federation: processes, TLS, masks; and what their nodes refuse."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_local.demo import STUDY, agree_with_owners
from concord_local.deployment import Deployment, Organisation, Partner
from concord_server.client_nouns import start_run, watch_run
from concord_server.evidence import export_run
from concord_shared.evidence.verify import verify_capsule
from concord_shared.plan import Plan, parse_plan

NAMES = ("node-1", "node-2", "node-3", "node-4")
ROWS = 200
PLAN = """
name = "wards"
kind = "statistics"
[data]
task = "classification"
input = "table"
target = "ill"
classes = ["no", "yes"]
[[data.columns]]
name = "age"
range = [0, 120]
[[data.columns]]
name = "dose"
range = [-5, 5]
[statistics]
of = ["moments", "extremes", "classes"]
quantiles = [0.5]
[rounds]
grace_s = 3
deadline_s = 60
quorum = "all"
aborts_max = 1
[privacy]
mode = "private"
"""


DP = "privacy={mode='private', dp={unit='record', epsilon=3.0, delta=1e-5, clip=1.0}}"


def plan(*overrides: str) -> Plan:
    return parse_plan(PLAN, "wards", overrides).plan


def write_rows(folder: Path, rows: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["age,dose,ill", *(f"{age},{dose},{'yes' if ill else 'no'}" for age, dose, ill in rows)]
    (folder / "rows.csv").write_text("\n".join(lines))


class Wards:
    """A deployment in which each partner brought 200 rows."""

    def __init__(self, deployment: Deployment, root: Path) -> None:
        self.deployment, self.root = deployment, root
        rng = np.random.default_rng(3)
        self.research = deployment.add_organisation("research")
        self.owners = {name: deployment.add_organisation(f"{name}-org") for name in NAMES}
        self.rows = {}
        for name in NAMES:
            partner = deployment.enrol(name, self.owners[name])
            ages = rng.uniform(20, 90, ROWS)
            self.rows[name] = np.stack([ages, rng.normal(0, 1, ROWS), rng.integers(0, 2, ROWS)], 1)
            self.bring(partner, self.rows[name])
            deployment.start_node(partner)
        agree_with_owners(deployment, self.research, self.owners, NAMES)

    def bring(self, partner: Partner, rows: np.ndarray, *options: str) -> None:
        write_rows(self.root / "data" / partner.name, rows)
        spec = f"csv:{self.root / 'data' / partner.name / 'rows.csv'}"
        partner.run("data", "add", "own", spec, "--title", "rows", "--publish", *options)

    def run(self, asked: Plan, *names: str) -> dict[str, Any]:
        """Approved by those whom it names, all by default; the run's last report."""
        chosen = names or NAMES
        nodes = tuple(f"{name}/own" for name in chosen)
        run = start_run(self.research.api, self.research.key, STUDY, asked, nodes=nodes)["id"]
        self.deployment.each(
            lambda partner: self.approved(partner, asked), [self.deployment.partners[name] for name in chosen]
        )
        report: dict[str, Any] = {}
        for _, report in watch_run(self.research.api, run):  # noqa: B007
            pass
        return self.research.api.get(f"/api/v1/runs/{report['id']}")

    def approved(self, partner: Partner, asked: Plan) -> None:
        known = [each for each in partner.run("approvals", "list")["requests"] if each["plan_digest"] == asked.digest]
        if not known or known[0]["state"] != "approved":
            partner.approve(asked)


@pytest.fixture(scope="module")
def wards() -> Iterator[Wards]:
    root = Path(tempfile.mkdtemp(prefix="s-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        yield Wards(stack.enter_context(Deployment(root)), root)


@pytest.mark.slow
def test_statistics_in_a_real_federation_and_what_nodes_refuse_afterwards(wards: Wards) -> None:
    found = wards.run(plan())
    assert found["state"] == "succeeded", found["reason"]
    check_figures(wards, wards.research, found["id"])
    check_nothing_of_one_node(wards)
    partner = wards.deployment.partners["node-1"]
    [answer] = partner.run("statistics", "list")
    assert (answer["run"], tuple(answer["cohort"])) == (found["id"], NAMES)

    check_capsule(wards, found["id"])
    noisy = wards.run(plan("name=wards-noisy", DP))
    assert noisy["state"] == "succeeded", noisy["reason"]
    [spent] = [each for each in partner.run("ledger", "show")["runs"] if each["run"] == noisy["id"]]
    assert spent["charged"] == spent["rounds"] == 2
    assert [each["run"] for each in partner.run("statistics", "list")] == [found["id"]]

    fewer_nodes = wards.run(plan(), "node-1", "node-2", "node-3")
    assert fewer_nodes["state"] == "failed"
    assert "differ in 1" in fewer_nodes["reason"]
    other_range = wards.run(plan("statistics.resolution=0.01"))
    assert other_range["state"] == "failed"
    assert "another resolution" in other_range["reason"]
    assert wards.run(plan())["state"] == "succeeded", "the same question over the same rows and nodes"

    wards.bring(partner, wards.rows["node-1"][1:], "--replace")
    one_less = wards.run(plan("name=wards-again"))
    assert one_less["state"] == "failed"
    assert "fewer than 5, so the difference would tell of single rows" in one_less["reason"]
    assert partner.run("statistics", "forget", "--yes")["forgotten"] == 2


def check_figures(wards: Wards, research: Organisation, run: str) -> None:
    told = research.api.get(f"/api/v1/runs/{run}/statistics")["found"]
    pooled = np.concatenate([wards.rows[name] for name in NAMES])
    assert told["rows"] == len(pooled)
    for index, name in enumerate(("age", "dose")):
        about = told["columns"][name]
        assert about["mean"] == pytest.approx(pooled[:, index].mean(), rel=1e-6)
        assert about["variance"] == pytest.approx(pooled[:, index].var(), rel=1e-6)
    assert told["columns"]["ill"]["counts"] == [int((pooled[:, 2] == code).sum()) for code in (0, 1)]


def check_capsule(wards: Wards, run: str) -> None:
    """The evidence of a run without a model is whole too."""
    export_run(wards.research.api, run, wards.root / "wards.capsule")
    found = verify_capsule(wards.root / "wards.capsule", wards.deployment.root_fingerprint)
    assert (found["state"], found["steps"], found["model_digest"]) == ("succeeded", 2, None)


def check_nothing_of_one_node(wards: Wards) -> None:
    """No mean, sum or count of a node's own is in any file of the coordinator."""
    kept = b"".join(path.read_bytes() for path in wards.deployment.coordinator_home.rglob("*") if path.is_file())
    for name in NAMES:
        rows = wards.rows[name]
        for value in (rows[:, 0].mean(), rows[:, 1].mean(), rows[:, 0].sum(), rows[:, 0].var()):
            assert repr(float(value))[:12].encode() not in kept
    assert json.dumps("wards").encode() in kept, "what is searched is what the coordinator keeps"
