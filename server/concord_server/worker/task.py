"""One run of the coordinator: from its row to its model."""

import errno
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_server.audit.service import record as audit
from concord_server.database import Database, utc_now
from concord_server.driver import Driver, RunResult
from concord_server.models.tables import ModelVersion
from concord_server.nodes.tables import Node
from concord_server.runs import logs, service
from concord_server.runs.states import Outcome, Waiting
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
from concord_shared.files import explain, file_digest, write_atomically
from concord_shared.fitting import programme_of
from concord_shared.guarantee import guarantee_of
from concord_shared.masking.attempt import Signers
from concord_shared.metrics import metrics_block
from concord_shared.model_files import write_model
from concord_shared.models import is_personal, new_vector
from concord_shared.plan.schema import Plan
from concord_shared.signing import PrivateKey, read_public_text
from concord_shared.strategies import strategy_for
from concord_shared.strategies.base import Strategy
from concord_shared.tensors import Float32Vector, Layout, model_digest, read_safetensors
from concord_shared.transport import NodeEntry

__all__ = ["Link", "carry_out"]

log = logging.getLogger(__name__)

REPLY_OVERHEAD_BYTES = 1 << 20
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
MENDABLE = FULL | {errno.EIO, errno.EROFS, errno.ESTALE}
"""What a disk fails with until somebody mends it. A run waits for that; whatever else is wrong with a file ends it."""


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
    with logs.recording(home.runs, lease.run):
        try:
            _drive(home, database, link, lease, owner)
        except (LeaseLost, ConflictError) as error:  # another worker has it: nothing of it is this one's to write
            log.warning("a run was lost to another worker", extra={"run": lease.run, "reason": str(error)})
        except (Drained, UnavailableError) as error:
            log.warning("a run was let go", extra={"run": lease.run, "reason": str(error)})
            _release(database, lease, owner)
        except RunStoppedError as error:
            _finish(database, lease, owner, "stopped", str(error))
        except Exception as error:  # the outermost loop of a run: it waits or ends with a reason, the others go on
            _fail(database, lease, owner, error)


def _fail(database: Database, lease: Lease, owner: str, error: Exception) -> None:
    """Ends the run, unless it is a disk that fails: the run goes on once that is mended."""
    failure = error if isinstance(error, OSError) else error.__cause__
    if isinstance(failure, OSError) and failure.errno in MENDABLE:
        log.error("a run waits: the coordinator's disk fails", extra={"run": lease.run, "reason": str(error)})
        full = failure.errno in FULL
        what = "space on the coordinator's disk" if full else f"the coordinator's disk ({failure.strerror})"
        _release(database, lease, owner, [Waiting("", what, int(utc_now().timestamp()))])
    elif isinstance(error, ConcordError):
        _finish(database, lease, owner, "failed", str(error))
    else:
        log.error("a run failed unexpectedly", extra={"run": lease.run}, exc_info=error)
        reason = f"unexpected {type(error).__name__}; the coordinator's log of this time says more"
        _finish(database, lease, owner, "failed", reason)


def _drive(home: Home, database: Database, link: Link, lease: Lease, owner: str) -> None:
    with database.reading() as session:
        view = service.load_run(session, lease.run)
        parties = _parties(session, view)
        signers = _signers(session, view)
    if view.stop_requested:  # while nobody worked on it
        raise RunStoppedError(view.reason)
    plan = view.plan
    names = [party.entry.name for party in parties]
    log.info(
        "a run goes on" if view.records else "a run begins", extra={"run": view.id, "owner": owner, "nodes": names}
    )
    layout, start = new_vector(plan)
    if view.manifest.start_model is not None and view.checkpoint is None:
        start = _read_start(home, view, layout)
    strategy = strategy_for(plan)
    store = DatabaseStepStore(database, home.path, view, owner, link.signer)

    def refused(node: str, reason: str) -> None:
        log.warning("a reply was refused", extra={"run": view.id, "node": node, "reason": reason})
        with database.session() as session:
            audit(session, f"node:{node}", "reply:send-refused", view.id, reason=reason)

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
            with _reading_checkpoint(home, view):
                driver = Driver(plan, strategy, layout, start, entries, transport, store, run=view.id, signers=signers)
            result = driver.run()
    except RunFailedError:
        store.save_last_words()
        raise
    spent = {name: round(seconds, 3) for name, seconds in transport.spent_s.items()}
    log.info("a run succeeded", extra={"run": view.id, "training_s": round(result.training_s, 3), "spent_s": spent})
    summary = _summary(view, plan, result, names, spent)
    model = _keep_model(home, view, plan, layout, result, summary) if plan.kind == "train" else None
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


def _read_start(home: Home, view: service.RunView, layout: Layout) -> Float32Vector:
    """The tensors that the manifest names: of a checkpoint (one vector) or of a finished model (by name).

    Raises:
        ArtefactError: they are missing or damaged.
    """
    wanted = view.manifest.start_model
    what, then = f"model {wanted}, to start from,", "restore it from a backup and start the run again"
    if view.start_model is None:
        raise ArtefactError(f"{what} is no longer kept; start from another one")
    with _reading(home, view.start_model.path, what, then):
        tensors, _ = read_safetensors(home.path / view.start_model.path)
        theta: NDArray[Any] = tensors["theta"] if "theta" in tensors else np.empty(0)
        if {name: tensor.shape for name, tensor in tensors.items()} == dict(layout.entries):
            theta = layout.join(tensors)
        if theta.shape != (layout.size,) or model_digest(layout, theta.astype(np.float32, copy=False)) != wanted:
            raise ArtefactError("its tensors are not those of that digest")
    return theta.astype(np.float32, copy=False)


@contextmanager
def _reading_checkpoint(home: Home, view: service.RunView) -> Iterator[None]:
    """Raises: ArtefactError: the run has a checkpoint, and it is missing or damaged."""
    if view.checkpoint is None:
        yield
        return
    then = f"start it again, or from an earlier model: concord model list --run {view.id}"
    with _reading(home, f"runs/{view.id}/{view.checkpoint['tensors']}", "the checkpoint of this run", then):
        yield


@contextmanager
def _reading(home: Home, path: str, what: str, then: str) -> Iterator[None]:
    """Around the reading of a file below the coordinator's directory: says in words for those who watch the run what
    is wrong with it, and what to do then.

    Raises:
        ArtefactError: by an OSError where the disk fails.
    """
    try:
        (home.path / path).open("rb").close()  # safetensors calls every failure a missing file
        yield
    except FileNotFoundError as error:
        raise ArtefactError(f"{what} is missing at the coordinator ({path}); {then}") from error
    except OSError as error:
        raise ArtefactError(f"{what} cannot be read at the coordinator ({path}): {explain(error)}") from error
    except ArtefactError as error:
        log.error("a file is damaged", extra={"file": path, "reason": str(error)})
        raise ArtefactError(f"{what} is damaged at the coordinator ({path}); {then}") from error.__cause__


def _reply_bytes_max(plan: Plan, layout: Layout, strategy: Strategy) -> int:
    """No honest reply of this run is larger."""
    blocks = [*strategy.blocks(plan, layout), metrics_block(plan.data), metrics_block(plan.data)]
    if plan.needs_statistics:
        programme = programme_of(plan)
        blocks += [programme.block(stage) for stage in range(1, programme.stages + 1)]
    return sum(block.size * block.ring_bits // 8 for block in blocks) * 11 // 10 + REPLY_OVERHEAD_BYTES


def _summary(
    view: service.RunView, plan: Plan, result: RunResult, nodes: Sequence[str], spent: Mapping[str, float]
) -> dict[str, Any]:
    return {
        "run": view.id,
        "plan": plan.name,
        "plan_digest": plan.digest,
        "model_digest": result.model_digest,
        "deterministic": plan.is_repeatable,
        "guarantee": guarantee.document() if (guarantee := guarantee_of(plan)) else None,
        "nodes": list(nodes),
        "rounds": plan.rounds.count,
        "personal": is_personal(plan),
        "metrics": dict(result.metrics),
        "per_node": dict(result.per_node),
        **({"statistics": dict(result.preprocessing)} if plan.kind == "statistics" else {}),
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "training_s": round(result.training_s, 3),
        "spent_s": dict(spent),
    }


def _keep_model(
    home: Home, view: service.RunView, plan: Plan, layout: Layout, result: RunResult, summary: dict[str, Any]
) -> ModelVersion:
    """models/<digest>/<run>/: the model, its plan, what it came to. Raises: ArtefactError: the disk refuses."""
    folder = home.models / result.model_digest / view.id
    path = folder / "model.safetensors"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_model(path, plan, layout, result.theta, result.preprocessing)
        write_atomically(folder / "plan.json", json.dumps(plan.document(), indent=1))
        write_atomically(folder / "summary.json", json.dumps(summary, indent=1))
        sha256, size = file_digest(path), path.stat().st_size
    except OSError as error:
        raise ArtefactError(f"cannot keep the model in {folder}: {explain(error)}") from error
    return ModelVersion(
        digest=result.model_digest,
        run=view.id,
        plan_digest=plan.digest,
        round=plan.rounds.count,
        path=str(path.relative_to(home.path)),
        sha256=sha256,
        size=size,
        final=True,
        metrics={key: value for key, value in result.metrics.items() if key != "confusion"},
    )


def _finish(database: Database, lease: Lease, owner: str, state: Outcome, reason: str) -> None:
    log.warning("a run ended without its model", extra={"run": lease.run, "state": state, "reason": reason})

    def end() -> None:
        with database.session() as session:
            service.finish(session, lease.run, owner, state, reason, {})

    _recorded(end, lease)


def _release(database: Database, lease: Lease, owner: str, awaited: Sequence[Waiting] = ()) -> None:
    lease.troubled = True

    def give_back() -> None:
        with database.session() as session:
            service.release_lease(session, lease.run, owner, utc_now(), awaited)

    _recorded(give_back, lease)


def _recorded(write: Callable[[], None], lease: Lease) -> None:
    """What cannot be written now is found out later: the lease runs out, and a worker takes the run up again."""
    try:
        write()
    except ConcordError as error:
        log.warning("the end of a run was not recorded", extra={"run": lease.run, "reason": str(error)})
