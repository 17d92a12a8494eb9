"""Verifies a run capsule, offline, from the fingerprint of a federation's root key and nothing else."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from concord_shared.canonical import canonical_digest
from concord_shared.documents import Approval, Participant, Release, Roster, RunManifest
from concord_shared.errors import DocumentRefusedError, PlanError
from concord_shared.evidence.capsule import MODEL, Capsule, CapsuleIndex, open_capsule
from concord_shared.evidence.chain import KeyChain
from concord_shared.evidence.heads import TreeHead, coordinator_log
from concord_shared.evidence.log import Entry, entry_hash
from concord_shared.evidence.merkle import verify_inclusion
from concord_shared.evidence.receipts import Receipt
from concord_shared.plan.schema import Plan, parse_plan_document
from concord_shared.signed_rounds import Sent, check_statement
from concord_shared.signing import Envelope, PublicKey, open_envelope, read_public_text

__all__ = ["verify_capsule"]

Kind = TypeVar("Kind", bound=BaseModel)
Json = Any


def verify_capsule(path: Path, root: str) -> dict[str, Any]:
    """What a capsule shows, if all of this holds. root: the fingerprint of the federation's root key.

    1. it is a capsule, and every file in it is what the index says
    2. from the root to the roster, and to the coordinator that signed the index
    3. the manifest is signed by its organisation, which the roster names, and is of this plan
    4. approvals are signed by the nodes that the manifest names, for this plan, study and data
    5. every Update has the coordinator's receipt and the node's own signature, over the same run, round and plan
    6. every step that was applied has an Update of each of its survivors, and of nobody else; no round of training is
       left out, and each began with the model that the one before it made
    7. the run's entries are in the coordinator's audit log, and tell of this manifest, these steps and Updates
    8. the model is the plan's, finite, and the one of the last round
    9. the release, where there is one, is signed, and of this model
    10. of a private run: no figure of a single node

    Raises:
        DocumentRefusedError: with the file and the check that failed. ArtefactError: it cannot be read.
    """
    with open_capsule(path) as capsule:
        with _of("keys.json"):
            roster = _record(capsule, "keys.json", KeyChain).verified(root)
            coordinator = read_public_text(roster.coordinator_key)
        with _of("index.json"):
            index = open_envelope(capsule.envelope, CapsuleIndex, [coordinator])
            if index.federation != roster.federation:
                raise DocumentRefusedError(f"of federation {index.federation}, the roster is of {roster.federation}")
        for file in index.files:
            if file.name != MODEL:
                capsule.read(file.name)
        with _of("manifest.json"):
            manifest = _manifest(capsule, index, roster)
        with _of("plan.json"):
            plan = _plan(capsule, manifest)
        with _of("approvals.json"):
            approvals = _approvals(capsule, manifest, plan, roster)
        with _of("updates.json"):
            updates, asked = _updates(capsule, plan, manifest, roster, coordinator)
        with _of("approvals.json"):
            if strangers := sorted({node for step in updates.values() for node in step} - approvals):
                raise DocumentRefusedError(f"Updates of {', '.join(strangers)}, without its own approval")
        with _of("rounds.json"):
            rounds, lifted = _rounds(capsule, plan, updates)
            trained = plan.rounds.count if index.state == "succeeded" and plan.kind == "train" else 0
            _check_lineage(rounds, asked, manifest.start_model, trained)
        with _of("audit.json"):
            entries = _audit(capsule, index, manifest, coordinator)
            _check_told(entries, index, manifest, approvals, rounds, updates)
            if [each.detail["node"] for each in entries if each.action == "quarantine:lift"] != lifted:
                raise DocumentRefusedError("the log tells of other nodes that were taken out of quarantine")
        with _of("metrics.json"):
            summary = _metrics(capsule, index, plan)
        digest = _last_model(rounds)
        with _of(MODEL):
            _model(capsule, plan, digest, summary)
        with _of("release.json"):
            released = _release(capsule, manifest, roster, digest)
        guarantee = _json(capsule, "guarantee.json") if capsule.has("guarantee.json") else None
    return {
        "run": index.run,
        "federation": index.federation,
        "study": manifest.study,
        "plan": plan.name,
        "plan_digest": plan.digest,
        "privacy_mode": plan.privacy.mode,
        "state": index.state,
        "organisation": manifest.organisation,
        "nodes": [each.node for each in manifest.participants],
        "approvals": len(approvals),
        "steps": len(rounds),
        "updates": sum(map(len, updates.values())),
        "audit_entries": len(entries),
        "model_digest": digest if capsule.has(MODEL) else None,
        "released": released,
        "metrics": {key: value for key, value in summary.get("metrics", {}).items() if isinstance(value, (int, float))},
        "guarantee": guarantee,
        "signed_at": index.issued_at,
    }


def _manifest(capsule: Capsule, index: CapsuleIndex, roster: Roster) -> RunManifest:
    envelope = _record(capsule, "manifest.json", Envelope)
    claimed = RunManifest.from_canonical(envelope.bytes)
    keys = [each.key for each in roster.organisations if each.name == claimed.organisation]
    if len(keys) != 1 or keys[0] is None:
        raise DocumentRefusedError(f"the roster has no key of {claimed.organisation}")
    manifest = open_envelope(envelope, RunManifest, [read_public_text(keys[0])])
    if (manifest.run, manifest.roster_version) != (index.run, roster.version):
        raise DocumentRefusedError("it is of another run, or names another roster, than the capsule")
    return manifest


def _plan(capsule: Capsule, manifest: RunManifest) -> Plan:
    plan = parse_plan_document(_json(capsule, "plan.json"))
    if plan.digest != manifest.plan_digest:
        raise DocumentRefusedError(f"it is plan {plan.digest[:16]}…, the manifest names {manifest.plan_digest[:16]}…")
    return plan


def _approvals(capsule: Capsule, manifest: RunManifest, plan: Plan, roster: Roster) -> set[str]:
    """The nodes that approved; of a private run only by the digest of their word."""
    found = _json(capsule, "approvals.json")
    if plan.privacy.mode == "private":
        if not all(isinstance(each, dict) and set(each) == {"node", "digest"} for each in found):
            raise DocumentRefusedError("a private run tells approvals by their digest only: they name rows")
        return _once([str(each["node"]) for each in found])
    nodes = []
    for each in found:
        envelope = Envelope.model_validate_json(json.dumps(each))
        claimed = Approval.from_canonical(envelope.bytes)
        approval = open_envelope(envelope, Approval, [_node_key(roster, claimed.node)])
        named = _participant(manifest, approval.node)
        said = (approval.study, approval.plan_digest, approval.decision, approval.organisation)
        if said != (manifest.study, manifest.plan_digest, "approved", named.organisation):
            raise DocumentRefusedError(f"the word of {approval.node} is not a yes to this plan and study")
        if (approval.dataset, approval.dataset_version) != (named.dataset, named.dataset_version):
            raise DocumentRefusedError(f"the word of {approval.node} is about other data than the manifest")
        nodes.append(approval.node)
    return _once(nodes)


def _once(nodes: list[str]) -> set[str]:
    if len(set(nodes)) != len(nodes):
        raise DocumentRefusedError("a node is there twice")
    return set(nodes)


def _updates(
    capsule: Capsule, plan: Plan, manifest: RunManifest, roster: Roster, coordinator: PublicKey
) -> tuple[dict[tuple[str, int], dict[str, str]], dict[tuple[str, int], str]]:
    """By step (kind, round), for each node the digest of what it signed; and the model that all of them were asked
    about, as they signed.
    """
    found: dict[tuple[str, int], dict[str, str]] = {}
    asked: dict[tuple[str, int], tuple[int, str]] = {}
    for each in _json(capsule, "updates.json"):
        receipt = open_envelope(Envelope.model_validate_json(json.dumps(each["receipt"])), Receipt, [coordinator])
        sent = Sent(each["statement"].encode("utf-8"), bytes.fromhex(each["signature"]))
        with _of(f"the Update {receipt.step} of {receipt.node}"):
            named = _participant(manifest, receipt.node)
            said = (receipt.run, receipt.plan_digest, receipt.manifest_digest, receipt.organisation, receipt.dataset)
            if said != (manifest.run, manifest.plan_digest, manifest.digest, named.organisation, named.dataset):
                raise DocumentRefusedError("the receipt is of another run, plan, manifest or dataset")
            signed = (named.dataset_version, sent.digest, sent.charge)
            if (receipt.dataset_version, receipt.sent, receipt.charge) != signed:
                raise DocumentRefusedError("the receipt is for other data, or for something else than the node signed")
            if receipt.kind == "train" and plan.noise in ("dp-sgd", "distributed") and sent.charge is None:
                raise DocumentRefusedError("the plan has differential privacy, but its node charged no budget for this")
            binding = check_statement(sent, _node_key(roster, receipt.node)).get("binding")
            wanted = {
                "run": receipt.run,
                "kind": receipt.kind,
                "round_number": receipt.round_number,
                "attempt": receipt.attempt,
                "node": receipt.node,
                "plan_digest": receipt.plan_digest,
            }
            if not isinstance(binding, dict) or any(binding.get(name) != value for name, value in wanted.items()):
                raise DocumentRefusedError("the node signed for another run, round or plan")
            about = (receipt.attempt, str(binding["model_digest"]))
            if asked.setdefault((receipt.kind, receipt.round_number), about) != about:
                raise DocumentRefusedError("others of the step were asked in another attempt, or about another model")
        of_step = found.setdefault((receipt.kind, receipt.round_number), {})
        if receipt.node in of_step:
            raise DocumentRefusedError(f"{receipt.node} is counted twice in {receipt.step}")
        of_step[receipt.node] = receipt.sent
    return found, {step: model for step, (_, model) in asked.items()}


def _rounds(
    capsule: Capsule, plan: Plan, updates: Mapping[tuple[str, int], Mapping[str, str]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of steps; and the nodes that people took out of quarantine between them."""
    records = _json(capsule, "rounds.json")
    lifted = [str(node) for record in records if record["kind"] == "lift" for node in record["lifted"]]
    rounds = [record for record in records if record["kind"] != "lift"]
    for record in rounds:
        step = f"{record['kind']} round {record['round']}"
        if "aborted" in record:
            continue
        signed = set(updates.get((record["kind"], record["round"]), {}))
        if signed != set(record["survivors"]):
            raise DocumentRefusedError(f"{step} names {sorted(record['survivors'])}, Updates are of {sorted(signed)}")
        if plan.privacy.mode == "private" and (record.get("per_node") or record.get("notes")):
            raise DocumentRefusedError(f"{step} of a private run tells a figure of a single node")
    return rounds, lifted


def _check_lineage(
    rounds: list[dict[str, Any]], asked: Mapping[tuple[str, int], str], start: str | None, count: int
) -> None:
    """No round of training is left out: each follows the one before, and its nodes signed for the model which that one
    made. start: the first one's; None where it is the plan's own. count: how many rounds there must be; 0: not known.
    """
    model, last, again = start, 0, False
    for record in rounds:
        kind, number, aborted = record["kind"], record["round"], "aborted" in record
        if kind == "train":
            if number != last + 1 and not (again and number == last):
                raise DocumentRefusedError(f"train round {number} stands in the place of round {last + 1}")
            last, again = number, aborted
        if aborted:
            continue
        about = asked.get((kind, number))
        if about is not None and model not in (None, about):
            raise DocumentRefusedError(f"{kind} round {number}: its nodes were asked about another model")
        model = record["model_digest"] if kind == "train" else about or model
    if count and last != count:
        raise DocumentRefusedError(f"the run succeeded after {count} rounds, here are {last}")


def _audit(
    capsule: Capsule,
    index: CapsuleIndex,
    manifest: RunManifest,
    coordinator: PublicKey,
) -> list[Entry]:
    """The run's entries, each proven to be in the coordinator's log."""
    found = _json(capsule, "audit.json")
    head = open_envelope(Envelope.model_validate_json(json.dumps(found["head"])), TreeHead, [coordinator])
    if head.log != coordinator_log(index.federation):
        raise DocumentRefusedError(f"a head of the log {head.log}")
    entries = []
    for each in found["entries"]:
        body = each["body"].encode("utf-8")
        entry = Entry.from_canonical(body)
        leaf = entry_hash(bytes.fromhex(each["before"]), body)
        proof = [bytes.fromhex(part) for part in each["proof"]]
        verify_inclusion(leaf, entry.sequence - 1, head.size, proof, bytes.fromhex(head.root))
        if entry.subject != index.run:
            raise DocumentRefusedError(f"entry {entry.sequence} is not about this run")
        entries.append(entry)
    if [each.sequence for each in entries] != sorted({each.sequence for each in entries}):
        raise DocumentRefusedError("entries are out of order, or there twice")
    return entries


def _check_told(
    entries: list[Entry],
    index: CapsuleIndex,
    manifest: RunManifest,
    approvals: set[str],
    rounds: list[dict[str, Any]],
    updates: Mapping[tuple[str, int], Mapping[str, str]],
) -> None:
    """The log tells of this manifest, who approved, these steps in this order with these Updates, and this end."""
    told = {each.action: each.detail for each in entries}
    if told.get("run:start", {}).get("digest") != manifest.digest:
        raise DocumentRefusedError("the log does not tell that this manifest was started")
    if set(told.get("run:queue", {}).get("nodes", ())) != approvals:
        raise DocumentRefusedError("the log tells of other approvals")
    if told.get("run:end", {}).get("state") != index.state:
        raise DocumentRefusedError(f"the log does not tell that the run ended as {index.state}")
    steps = [each.detail for each in entries if each.action == "run:step"]
    if len(steps) != len(rounds):
        raise DocumentRefusedError(f"the log tells of {len(steps)} steps, the capsule of {len(rounds)}")
    for step, record in zip(steps, rounds, strict=True):
        name = f"{record['kind']} round {record['round']}"
        if (step["kind"], step["round"], step["aborted"]) != (record["kind"], record["round"], record.get("aborted")):
            raise DocumentRefusedError(f"the log tells another step than {name}")
        if step["model"] not in (None, record.get("model_digest")):
            raise DocumentRefusedError(f"the log tells another model after {name}")
        sent = updates.get((record["kind"], record["round"]), {}) if "aborted" not in record else {}
        if step.get("taken") != (canonical_digest(dict(sent)) if sent else None):
            raise DocumentRefusedError(f"the log tells other Updates of {name}")


def _metrics(capsule: Capsule, index: CapsuleIndex, plan: Plan) -> dict[str, Any]:
    found = _json(capsule, "metrics.json")
    if plan.privacy.mode == "private" and (found.get("per_node") or found.get("worst_node")):
        raise DocumentRefusedError("a private run tells a figure of a single node")
    if found and found.get("run") != index.run:
        raise DocumentRefusedError("figures of another run")
    return dict(found)


def _last_model(rounds: list[dict[str, Any]]) -> str | None:
    made = [each["model_digest"] for each in rounds if each["kind"] == "train" and "aborted" not in each]
    return str(made[-1]) if made else None


def _model(capsule: Capsule, plan: Plan, digest: str | None, summary: Mapping[str, Any]) -> None:
    if digest is not None and summary and summary.get("model_digest") != digest:
        raise DocumentRefusedError("the figures are of another model than the last round's")
    if not capsule.has(MODEL):
        return
    from concord_shared.model_files import read_model
    from concord_shared.models.registry import build_model, layout_of

    if digest is None:
        raise DocumentRefusedError("a model of a run that made none")
    with capsule.open(MODEL) as (file, size):
        read_model(file, size, plan, layout_of(plan, build_model(plan)), digest)


def _release(capsule: Capsule, manifest: RunManifest, roster: Roster, digest: str | None) -> bool:
    if not capsule.has("release.json"):
        return False
    [key] = [each.key for each in roster.organisations if each.name == manifest.organisation]
    assert key is not None, "the manifest was opened with it"
    release = open_envelope(_record(capsule, "release.json", Envelope), Release, [read_public_text(key)])
    if (release.run, release.plan_digest, release.model_digest) != (manifest.run, manifest.plan_digest, digest):
        raise DocumentRefusedError("a release of another model")
    if capsule.has(MODEL):
        [held] = [each for each in capsule.index.files if each.name == MODEL]
        if held not in release.files:
            raise DocumentRefusedError("the released file is another one")
    return True


def _participant(manifest: RunManifest, node: str) -> Participant:
    found = [each for each in manifest.participants if each.node == node]
    if len(found) != 1:
        raise DocumentRefusedError(f"the manifest does not name {node} once")
    return found[0]


def _node_key(roster: Roster, node: str) -> PublicKey:
    found = [each.identity_key for each in roster.nodes if each.name == node]
    if len(found) != 1:
        raise DocumentRefusedError(f"the roster does not name {node} once")
    return read_public_text(found[0])


def _record(capsule: Capsule, name: str, kind: type[Kind]) -> Kind:
    return kind.model_validate_json(capsule.read(name))


def _json(capsule: Capsule, name: str) -> Json:
    return json.loads(capsule.read(name))


@contextmanager
def _of(part: str) -> Iterator[None]:
    """Names the part in whatever is refused of it, also where it is not what can be read at all."""
    try:
        yield
    except DocumentRefusedError as error:
        raise DocumentRefusedError(f"{part}: {error}") from error
    except PlanError as error:
        raise DocumentRefusedError(f"{part}: not a plan: {str(error)[:200]}") from error
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DocumentRefusedError(f"{part}: not as a capsule writes it ({type(error).__name__})") from error
