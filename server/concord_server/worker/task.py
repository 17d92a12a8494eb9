"""One run of the coordinator: from its row to its model."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_server.audit.service import record as audit
from concord_server.database import Database, utc_now
from concord_server.driver import Driver, RunResult
from concord_server.models.tables import ModelVersion
from concord_server.nodes.tables import Node
from concord_server.runs import service
from concord_server.runs.states import Outcome
from concord_server.runs.store import DatabaseStepStore
from concord_server.settings import Home
from concord_server.superlink.transport import FlowerTransport, Party
from concord_server.worker.leases import Drained, Lease, LeaseLost
from concord_shared.errors import (
    ArtefactError,
    ConcordError,
    ConflictError,
    RunFailedError,
    RunStoppedError,
    UnavailableError,
)
from concord_shared.files import file_digest, write_atomically
from concord_shared.masking.attempt import Signers
from concord_shared.metrics import metrics_block
from concord_shared.model_files import write_model
from concord_shared.models import new_vector
from concord_shared.plan.schema import Plan
from concord_shared.preprocessing import statistics_block
from concord_shared.signing import PrivateKey, read_public_text
from concord_shared.strategies import strategy_for
from concord_shared.strategies.base import Strategy
from concord_shared.tensors import Float32Vector, Layout, read_safetensors
from concord_shared.transport import NodeEntry

__all__ = ["Link", "carry_out"]

log = logging.getLogger(__name__)

REPLY_OVERHEAD_BYTES = 1 << 20


@dataclass(frozen=True)
class Link:
    """How to reach the SuperLink: address (host:port), TLS with the worker's certificate, the key for offers."""

    address: str
    tls: Any
    signer: PrivateKey


def carry_out(home: Home, link: Link, lease: Lease, owner: str) -> None:
    """Drives the leased run until it ended, was stopped, or is another's. Never raises: a run always ends with a
    reason, or is left for the next worker.
    """
    database = home.database()
    try:
        _drive(home, database, link, lease, owner)
    except (LeaseLost, ConflictError) as error:  # another worker has it: nothing of it is this one's to write
        log.warning("a run was lost to another worker", extra={"run": lease.run, "reason": str(error)})
    except (Drained, UnavailableError) as error:
        log.warning("a run was let go", extra={"run": lease.run, "reason": str(error)})
        _release(database, lease, owner)
    except RunStoppedError as error:
        _finish(database, lease, owner, "stopped", str(error))
    except ArtefactError as error:
        if isinstance(error.__cause__, OSError):  # a full or failing disk may be mended; the run goes on then
            log.error("a run waits: the coordinator's disk fails", extra={"run": lease.run, "reason": str(error)})
            _release(database, lease, owner)
        else:
            _finish(database, lease, owner, "failed", str(error))
    except ConcordError as error:
        _finish(database, lease, owner, "failed", str(error))
    except Exception as error:  # the outermost loop of a run: it ends with a reason, the others go on
        log.exception("a run failed unexpectedly", extra={"run": lease.run})
        reason = f"unexpected {type(error).__name__}; the coordinator's log of this time says more"
        _finish(database, lease, owner, "failed", reason)


def _drive(home: Home, database: Database, link: Link, lease: Lease, owner: str) -> None:
    with database.reading() as session:
        view = service.load_run(session, lease.run)
        parties = _parties(session, view)
        signers = _signers(session, view)
    plan = view.plan
    layout, start = new_vector(plan)
    if view.start_model is not None:
        start = _read_start(home.path / view.start_model.path, layout)
    strategy = strategy_for(plan)
    store = DatabaseStepStore(database, home.path, view, owner)

    def refused(node: str, reason: str) -> None:
        with database.session() as session:
            audit(session, node, "reply:refuse", view.id, reason=reason)

    transport = FlowerTransport(
        link.address,
        link.tls,
        link.signer,
        parties,
        _reply_bytes_max(plan, layout, strategy),
        lease.check,
        refused,
    )
    lease.awaited = transport.awaited
    try:
        with closing(transport):
            entries = [party.entry for party in parties]
            driver = Driver(plan, strategy, layout, start, entries, transport, store, run=view.id, signers=signers)
            result = driver.run()
    except RunFailedError:
        store.save_last_words()
        raise
    spent = {name: round(seconds, 3) for name, seconds in transport.spent_s.items()}
    log.info("a run succeeded", extra={"run": view.id, "training_s": round(result.training_s, 3), "spent_s": spent})
    summary = _summary(view, plan, result, [party.entry.name for party in parties], spent)
    model = _keep_model(home, view, plan, layout, result, summary)
    with database.session() as session:
        service.finish(session, view.id, owner, "succeeded", "", summary, model)


def _parties(session: Any, view: service.RunView) -> list[Party]:
    """The nodes that approved, in name order, numbered from 2 as everywhere; with the keys that sign their replies."""
    approvals = sorted(view.approvals, key=lambda approval: approval.node)
    return [
        Party(
            NodeEntry(approval.node, index + 2, approval.rows, approval.evaluation_rows),
            read_public_text(session.get_one(Node, approval.node).identity_key),
        )
        for index, approval in enumerate(approvals)
    ]


def _signers(session: Any, view: service.RunView) -> Signers | None:
    """Under masks: the keys of everybody whom the manifest names."""
    if view.plan.privacy.mode != "private":
        return None
    named = [each.node for each in view.manifest.participants]
    keys = {name: read_public_text(session.get_one(Node, name).identity_key) for name in named}
    return Signers(keys, view.manifest.digest)


def _read_start(path: Path, layout: Layout) -> Float32Vector:
    """The tensors of an earlier model: of a checkpoint (one vector) or of a finished model (by name)."""
    tensors, _ = read_safetensors(path)
    if "theta" in tensors:
        theta: NDArray[Any] = tensors["theta"]
    else:
        theta = layout.join({name: tensor.astype(np.float32) for name, tensor in tensors.items()})
    if theta.shape != (layout.size,):
        raise ArtefactError(f"the model to start from has {theta.size} coordinates, the plan's has {layout.size}")
    return theta.astype(np.float32, copy=False)


def _reply_bytes_max(plan: Plan, layout: Layout, strategy: Strategy) -> int:
    """No honest reply of this run is larger."""
    blocks = [*strategy.blocks(plan, layout), metrics_block(plan.data), metrics_block(plan.data)]
    if plan.needs_statistics:
        blocks += [statistics_block(stage, plan.data) for stage in (1, 2)]
    return sum(block.size * block.ring_bits // 8 for block in blocks) * 11 // 10 + REPLY_OVERHEAD_BYTES


def _summary(
    view: service.RunView, plan: Plan, result: RunResult, nodes: Sequence[str], spent: Mapping[str, float]
) -> dict[str, Any]:
    return {
        "run": view.id,
        "plan": plan.name,
        "plan_digest": plan.digest,
        "model_digest": result.model_digest,
        "deterministic": plan.training.deterministic,
        "nodes": list(nodes),
        "rounds": plan.rounds.count,
        "metrics": dict(result.metrics),
        "per_node": dict(result.per_node),
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "training_s": round(result.training_s, 3),
        "spent_s": dict(spent),
    }


def _keep_model(
    home: Home, view: service.RunView, plan: Plan, layout: Layout, result: RunResult, summary: dict[str, Any]
) -> ModelVersion:
    """models/<digest>/: the model, its plan, what it came to."""
    folder = home.models / result.model_digest
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / "model.safetensors"
    write_model(path, plan, layout, result.theta, result.preprocessing)
    write_atomically(folder / "plan.json", json.dumps(plan.document(), indent=1))
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1))
    return ModelVersion(
        digest=result.model_digest,
        run=view.id,
        plan_digest=plan.digest,
        round=plan.rounds.count,
        path=f"models/{result.model_digest}/model.safetensors",
        sha256=file_digest(path),
        size=path.stat().st_size,
        final=True,
        metrics={key: value for key, value in result.metrics.items() if key != "confusion"},
    )


def _finish(database: Database, lease: Lease, owner: str, state: Outcome, reason: str) -> None:
    def end() -> None:
        with database.session() as session:
            service.finish(session, lease.run, owner, state, reason, {})

    _recorded(end, lease)


def _release(database: Database, lease: Lease, owner: str) -> None:
    lease.troubled = True

    def give_back() -> None:
        with database.session() as session:
            service.release_lease(session, lease.run, owner, utc_now())

    _recorded(give_back, lease)


def _recorded(write: Callable[[], None], lease: Lease) -> None:
    """What cannot be written now is found out later: the lease runs out, and a worker takes the run up again."""
    try:
        write()
    except ConcordError as error:
        log.warning("the end of a run was not recorded", extra={"run": lease.run, "reason": str(error)})
