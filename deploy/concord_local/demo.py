"""`concord demo`: the whole walk of a real federation, on one machine, in a minute and a half.

A coordinator and partners' nodes run as separate processes with separate homes, over TLS on loopback. Each partner has
its own slice of the data and nothing else. What `concord simulate` does in one process is done here by all of them, and
comes to the same model.

The table at the end (alone, federated, pooled) needs everybody's rows at one place: this driver has dealt them, so it
knows them. No coordinator or partner of a real federation does; it is said so beside the table.
"""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from concord_client.data import read_data
from concord_client.home import NodeHome
from concord_client.personal import read_kept
from concord_local.baselines import compare_with_baselines
from concord_local.deployment import POLL_S, Deployment, Organisation, Partner, descendants
from concord_local.environment import describe_environment
from concord_local.federation import Federation
from concord_local.memory import pss_mb
from concord_local.partitions import deal, is_natural
from concord_local.simulation import Setting, setting_for
from concord_local.slices import write_slice
from concord_local.summary import summarise
from concord_server.client_nouns import (
    agree,
    create_study,
    download_model,
    offer_agreement,
    release_model,
    request_agreement,
    start_run,
    watch_run,
)
from concord_server.driver import RunResult
from concord_shared.errors import RunFailedError, UsageError
from concord_shared.files import write_atomically
from concord_shared.models import layout_of
from concord_shared.models.registry import build_model
from concord_shared.plan import Plan, load_plan
from concord_shared.plan.models import PluginModel, PretrainedModel
from concord_shared.tensors import read_safetensors

__all__ = ["STUDY", "agree_with_owners", "demo"]

Observer = Callable[[Mapping[str, Any]], None]
NODES = 3
STUDY = "demo-study"
RESEARCHER = "research"
WAIT_S = 60.0
TERMS = {"minimum_cohort": 2, "rounds_max": 1000, "use": "a demonstration on one machine"}


def demo(
    plan: str = "digits-cnn",
    *,
    data: str | None = None,
    nodes: int | None = None,
    overrides: Sequence[str] = (),
    keep: bool = False,
    observer: Observer = lambda record: None,
) -> dict[str, Any]:
    """Runs the demo; returns the object that `concord simulate --compare --json` prints, and beside it `environment`,
    `run` (its id), `steps` (the seconds of each) and `partners` (what each predicted with the released model, offline).

    `run_dir` is None where nothing was kept; `seconds.startup` ends with the first offer; `peak_pss_mb` is of all
    processes together, looked at after each step and each round of training.

    Args:
        plan, data, nodes, overrides: as of `simulate`; nodes: by default 3, or those that the data have.
        keep: leave the processes' homes (not the processes) where they are; `run_dir` says where.

    Raises:
        ConcordError: anything a person can act on.
    """
    started_s = time.monotonic()
    loaded = load_plan(plan, overrides)
    loaded.plan.check_trains("concord demo")
    partition = loaded.simulate.partition
    if nodes is None and not is_natural(partition):
        nodes = NODES
    if nodes is not None and nodes < 2:
        raise UsageError(f"--nodes {nodes}: expected at least 2, so that there is something to federate")
    setting = setting_for(loaded, data, nodes, None, workers=1)
    say = _Steps(observer)
    root = Path(tempfile.mkdtemp(prefix="concord-demo-"))
    with ExitStack() as cleanup:
        if not keep:
            cleanup.callback(shutil.rmtree, root, ignore_errors=True)
        summary = _walk(loaded.plan, setting, root, say)
    if keep:
        say("keep", f"{root} stays. {_how_to_go_on(root)}")
    total_s, startup_s = time.monotonic() - started_s, (say.first_offer_s or started_s) - started_s
    return summary | {
        "run_dir": str(root) if keep else None,
        "seconds": summary["seconds"] | {"total": round(total_s, 3), "startup": round(startup_s, 3)},
        "peak_pss_mb": say.peak_mb,
        "steps": say.seconds,
    }


def _walk(plan: Plan, setting: Setting, root: Path, say: "_Steps") -> dict[str, Any]:
    raw = read_data(setting.data, plan)
    dealt = deal(raw, plan.data, setting.partition, setting.nodes, plan.seed)
    federation = Federation.of(raw, plan, setting.partition, setting.nodes)
    allowed = _allowed(plan)
    with Deployment(root, settings={"plugins": allowed.get("plugins", {})}) as deployment:
        say("coordinator", f"up at {deployment.url}, its root key {deployment.root_fingerprint[:16]}…")
        research = deployment.add_organisation(RESEARCHER)
        owners = {name: deployment.add_organisation(f"{name}-org") for name in federation.names}
        partners = deployment.each(lambda name: deployment.enrol(name, owners[name]), list(federation.names))  # type: ignore[arg-type]
        say("nodes", f"{len(partners)} enrolled: keys made at each, fingerprints compared, active")

        def bring_data(partner: Partner) -> str:
            folder = root / "data" / partner.name
            folder.mkdir(parents=True)
            spec = write_slice(raw, dealt[partner.name], plan, folder)
            partner.run("data", "add", "own", spec, "--title", f"rows of {partner.name}", "--publish")
            _allow(partner, allowed)
            deployment.start_node(partner)
            return spec

        specs = dict(zip(federation.names, deployment.each(bring_data, partners), strict=True))
        say("data", "each partner registered its own rows and published a card; no row has left its home")
        agree_with_owners(deployment, research, owners, federation.names)
        say("agreements", f"{len(owners)} signed by both organisations, over the study {STUDY}")
        run = start_run(research.api, research.key, STUDY, plan)["id"]
        deployment.each(lambda partner: partner.approve(plan), partners)
        say("approvals", f"a person at each of {len(partners)} partners read the plan and approved it")
        report = _watch(research, run, say)
        digest = report["summary"]["model_digest"]
        release_model(research.api, research.key, digest, run)
        pulled = deployment.each(lambda partner: _use(partner, plan, digest, specs[partner.name]), partners)
        predicted = "" if plan.data.task == "own" else " and predicted with it, offline"
        say("release", f"each partner pulled the model, verified it{predicted}")
        result = _result(research, root / "model", plan, report)
        with ThreadPoolExecutor(1) as beside:  # they take leave for seconds in which nothing is computed
            stopping = beside.submit(deployment.stop)
            homes = {partner.name: NodeHome.open(partner.home) for partner in partners}
            comparison = compare_with_baselines(
                plan,
                federation,
                result,
                lambda name: read_kept(homes[name], report["id"]),
                setting.device,
                say.show,
            )
            stopping.result()
    say("compare", "alone and pooled, for the table; only this demo's driver could know them; every process was ended")
    own = {name: result.per_node.get(name, {}) for name in federation.names}
    return summarise(plan, federation, setting.document(), root, result, own) | {
        "seconds": {"training": round(result.training_s, 3)},
        "comparison": comparison,
        "environment": describe_environment(plan, setting.device),
        "run": report["id"],
        "partners": dict(zip(federation.names, pulled, strict=True)),
    }


def _allowed(plan: Plan) -> dict[str, dict[str, str]]:
    """What of others' the plan needs: a wheel's code, or pretrained weights, by hash."""
    match plan.model:
        case PluginModel(package=package, sha256=sha256):
            return {"plugins": {package: sha256}}
        case PretrainedModel(package=package, sha256=sha256):
            return {"pretrained": {package: sha256}}
    return {}


def _allow(partner: Partner, allowed: dict[str, dict[str, str]]) -> None:
    """What a partner who trusts it writes into the policy."""
    if not allowed:
        return
    file = NodeHome.open(partner.home).policy_file
    text = file.read_text("utf-8")
    for key, named in allowed.items():
        line = f"{key} = " + "{" + ", ".join(f'"{name}" = "{sha256}"' for name, sha256 in named.items()) + "}"
        text = re.sub(rf"^{key} = {{}}.*$", line, text, flags=re.MULTILINE)
    write_atomically(file, text)


def _how_to_go_on(root: Path) -> str:
    home = min((root / "nodes").iterdir())
    return (
        f"Nothing of it runs; `concord server up {root / 'coordinator'}` and `CONCORD_NODE_HOME={home} concord-node up`"
        f", or another node's home, begin again; Ctrl-C ends each; `rm -r {root}` removes everything"
    )


class _Steps:
    """Tells each step as it is done, and how long it took; and what a simulation measures of itself."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.seconds: dict[str, float] = {}
        self.first_offer_s: float | None = None
        self.peak_mb: float | None = None
        self._last = time.monotonic()

    def __call__(self, step: str, text: str) -> None:
        now = time.monotonic()
        self.seconds[step] = round(now - self._last, 2)
        self._last = now
        self._observer({"kind": "step", "step": step, "text": f"{step}: {text} ({self.seconds[step]:.1f} s)"})
        self._weigh()

    def show(self, record: Mapping[str, Any]) -> None:
        """A record of the run, as it comes."""
        self._observer(record)
        if record["kind"] == "train":
            self.first_offer_s = self.first_offer_s or time.monotonic() - record["seconds"]
            self._weigh()

    def _weigh(self) -> None:
        now = pss_mb(descendants(os.getpid()))
        if now is not None:
            self.peak_mb = max(now, self.peak_mb or 0.0)


def agree_with_owners(
    deployment: Deployment, research: Organisation, owners: Mapping[str, Organisation], names: Sequence[str]
) -> None:
    """The study, and for each owner: requested, offered on the owner's terms, agreed."""
    members = [owner.name for owner in owners.values()]
    purpose = "to show what a federation is, with nobody's rows leaving its home"
    create_study(research.api, research.key, STUDY, title="Demonstration", purpose=purpose, members=members)
    for name in names:
        owner = owners[name]
        asked = request_agreement(research.api, research.key, STUDY, [f"{name}/own"], terms=TERMS)
        offered = offer_agreement(owner.api, owner.key, asked["agreement"], terms={"rounds_max": 500})
        agree(research.api, research.key, asked["agreement"], offered["digest"])


def _watch(research: Organisation, run: str, say: _Steps) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for event, record in watch_run(research.api, run):
        if event == "round":
            say.show(record)
        report = record
    if report.get("state") != "succeeded":
        raise RunFailedError(f"the run {report.get('state')}: {report.get('reason')}")
    say("run", f"{report['summary']['rounds']} rounds")
    return report


def _use(partner: Partner, plan: Plan, digest: str, spec: str) -> Any:
    """A partner's own end of it: the model in its hands, and what it says of each of its own rows; where only the
    model's own wheel knows what that means, the model alone.
    """
    until = time.monotonic() + WAIT_S
    while digest not in [each["model_digest"] for each in partner.run("models", "list")["models"]]:
        if time.monotonic() > until:
            raise RunFailedError(f"{partner.name} did not hear of the release within {WAIT_S:.0f} s")
        time.sleep(POLL_S)
    pulled = partner.run("models", "pull", digest)
    if plan.data.task == "own":
        return pulled
    return partner.run("models", "predict", digest, "--data", spec, "--out", str(partner.home / "predictions.csv"))


def _result(research: Organisation, folder: Path, plan: Plan, report: Mapping[str, Any]) -> RunResult:
    """The released model as a researcher gets it, for the comparison."""
    summary = report["summary"]
    download_model(research.api, summary["model_digest"], folder, report["id"])
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    layout = layout_of(plan, build_model(plan))
    return RunResult(
        theta=layout.join(tensors),
        model_digest=summary["model_digest"],
        state={},
        preprocessing=json.loads(metadata["preprocessing"]),
        metrics=summary["metrics"],
        per_node=summary["per_node"] or {},
        bytes_down=summary["bytes_down"],
        bytes_up=summary["bytes_up"],
        training_s=summary["training_s"],
    )
