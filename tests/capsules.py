"""Runs with real Updates, signed by their nodes, and the capsules of them."""

from pathlib import Path
from typing import Any

import numpy as np
from worlds import OWNERS, World

from concord_server import client_nouns as nouns
from concord_server.checkpoints import Checkpoint
from concord_server.models.tables import ModelVersion
from concord_server.runs import service
from concord_server.runs.store import DatabaseStepStore
from concord_shared.blocks import LANES
from concord_shared.files import file_digest
from concord_shared.messages import Offer, answer, offer_message
from concord_shared.model_files import write_model
from concord_shared.models import is_personal, new_vector
from concord_shared.plan import Plan
from concord_shared.preprocessing import unfitted
from concord_shared.signed_rounds import Sent, name_charge, sign_reply, verify_reply
from concord_shared.tensors import model_digest

__all__ = ["capsule_of", "finished_run", "sent_of_round"]


def sent_of_round(
    world: World, run: str, plan: Plan, kind: str, number: int, model: str, charged: bool = True
) -> dict[str, Sent]:
    """What each ward signs for a round that asks with this model; charged: and what its budget paid for noise."""
    found = {}
    for index, node in enumerate(OWNERS):
        offer = Offer(
            run=run,
            kind=kind,  # type: ignore[arg-type]
            round_number=number,
            attempt=1,
            node=node,
            plan_digest=plan.digest,
            model_digest=model,
            layout_digest="0" * 64,
            nodes_max=3,
            rows_max=1024,
        )
        blocks = {LANES.name: np.full(LANES.size, number, LANES.dtype)}
        reply = answer(offer_message(offer, None, index + 2, 1.0), offer, blocks, {})
        if charged and plan.noise == "dp-sgd" and kind == "train":
            name_charge(reply, f"{number:064x}")
        key = world.sites[node].keys.identity
        sign_reply(reply, key)
        sent = verify_reply(reply, key.public_key())
        assert sent is not None
        found[node] = sent
    return found


def quarantining(node: str) -> dict[str, Any]:
    """What a round's record says more where it puts a node into quarantine."""
    figures = {"norm": 1.0, "distance": 1.0, "cosine": 0.5, "trimmed": 0.1, "score": 1.0}
    rows = {each: figures | {"flag": "far" if each == node else ""} for each in OWNERS}
    told = {"rule": "nnm-trimmed-mean", "attackers": 1, "nodes": rows}
    return {"anomalies": told, "quarantined": {node: {"rule": "flagged", "rounds": []}}}


def finished_run(
    world: World, plan: Plan, run: str = "run", released: bool = True, lifting: str = "", charged: bool = True
) -> str:
    """A run of two rounds and an evaluation over three wards, as a worker stores it; its model's digest.

    lifting: a node that the first round puts into quarantine, and a person asks again.
    """
    world.queued(plan, run)
    assert world.lease("w") == run
    home, signer = world.coordinator.home, world.coordinator.app.state.concord.signer
    with world.database.reading() as session:
        view = service.load_run(session, run)
    store = DatabaseStepStore(world.database, home.path, view, "w", signer)
    layout, theta = new_vector(plan)
    digest = model_digest(layout, theta)
    survivors = sorted(OWNERS)
    for number in (1, 2):
        before, theta = digest, theta + np.float32(number)
        digest = model_digest(layout, theta)
        told = {"kind": "train", "round": number, "of": 2, "survivors": survivors, "model_digest": digest, "notes": {}}
        if lifting and number == 1:
            told |= quarantining(lifting)
        store.append(told, sent_of_round(world, run, plan, "train", number, before, charged))
        store.save(Checkpoint(plan.digest, theta, digest, {}, run, 1, number, ("train", number)))
        if lifting and number == 1:
            lifted = world.people["lab"].post(f"/api/v1/runs/{run}/quarantine/{lifting}/lift", json={"reason": "seen"})
            assert lifted.status_code == 200, lifted.text
    told = {
        "kind": "evaluate",
        "round": 2,
        "of": 2,
        "survivors": survivors,
        "metrics": {"accuracy": 0.5},
        "per_node": {},
    }
    store.append(told, sent_of_round(world, run, plan, "evaluate", 2, digest))
    store.save(Checkpoint(plan.digest, theta, digest, {}, run, 1, 2, ("evaluate", 2)))
    path = home.models / digest / run / "model.safetensors"
    path.parent.mkdir(mode=0o700, parents=True)
    write_model(path, plan, layout, theta, unfitted(plan).document())
    summary = {
        "run": run,
        "plan": plan.name,
        "plan_digest": plan.digest,
        "model_digest": digest,
        "deterministic": True,
        "nodes": survivors,
        "rounds": 2,
        "personal": is_personal(plan),
        "metrics": {"accuracy": 0.5},
        "per_node": {},
    }
    made = ModelVersion(
        digest=digest,
        run=run,
        plan_digest=plan.digest,
        round=2,
        path=str(path.relative_to(home.path)),
        sha256=file_digest(path),
        size=path.stat().st_size,
        metrics={"accuracy": 0.5},
    )
    with world.database.session() as session:
        service.finish(session, run, "w", "succeeded", "", summary, made)
    if released:
        nouns.release_model(world.api("lab"), world.keys["lab"], digest, run)
    return digest


def capsule_of(world: World, run: str, to: Path) -> Path:
    answer = world.people["lab"].get(f"/api/v1/runs/{run}/capsule")
    assert answer.status_code == 200, answer.text
    to.write_bytes(answer.content)
    return to
