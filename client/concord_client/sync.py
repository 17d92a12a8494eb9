"""What arrives over the control channel: verified, or refused and noted. The only way into the store's `documents`.

The pinned root signed the membership key, that signs the roster; organisations sign the rest, with keys that this node
pinned when it first saw them. The coordinator signs nothing here, and is believed in nothing that others must have
said. A refusal never stops what comes after it. Nothing that arrives is executed, unpacked or imported, and all of it
together has a limit, so that nobody fills this machine's disk.
"""

import datetime
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import TypeAdapter, ValidationError

from concord_client.approvals import DAY_S, reserve_run, withdraw_for_agreement
from concord_client.cards import terms_of
from concord_client.home import NodeConfig, NodeHome
from concord_client.store import Kind as StoredKind
from concord_client.store import NodeStore
from concord_shared.cards import beyond_terms
from concord_shared.certificates import membership_key, read_certificate
from concord_shared.documents import Agreement, Id, Release, Roster, RunManifest, Study, Withdrawal
from concord_shared.errors import ArtefactError, ConcordError, DocumentRefusedError, PlanError, UsageError
from concord_shared.files import write_atomically
from concord_shared.plan.schema import parse_plan_document
from concord_shared.plan.section import Name
from concord_shared.plan.sizes import check_size
from concord_shared.preflight import LASTS_MAX_S, PreflightRequest
from concord_shared.protocol import Trust, Updates
from concord_shared.signing import (
    PAYLOAD_BYTES_MAX,
    Document,
    Envelope,
    PublicKey,
    fingerprint,
    open_envelope,
    public_text,
    read_public_text,
)
from concord_shared.text import printable

__all__ = ["Applied", "apply_updates", "check_own_row", "pin_keys", "retry_refused", "trust_organisation"]

REASON_MAX = 1000
PLAN_BYTES_MAX = 1 << 20
ENVELOPE_BYTES_MAX = PAYLOAD_BYTES_MAX + (64 << 10)
DOCUMENTS_MAX, DOCUMENTS_BYTES_MAX = 10_000, 256 << 20
"""Of one kind, in the node's database."""
KEYS_MAX = 10_000
CLOCK_SKEW_S = 300
REFUSALS_AUDITED_MAX = 100
"""A day, of questions that nobody may ask here: the audit log never forgets, so nobody fills it either."""
SEQUENCES_AHEAD_MAX, VERSIONS_AHEAD_MAX = 1 << 32, 1 << 20
"""From what is held to what comes next. Beyond, one number would hide everything that comes after it."""
PARAMETERS_MAX, METRICS_MAX = 1_000_000_000, 100_000_000
"""Of a plan: what no machine of a partner's is for, whoever approves it."""
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RETRY_AFTER = ("roster", "trust", "study", "agreement", "plan")
Kind = TypeVar("Kind", bound=Document)


@dataclass(frozen=True)
class Applied:
    """What of a batch was believed, and what was refused: (kind, subject), and (kind, subject, reason)."""

    accepted: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Desk:
    """What the checks need."""

    home: NodeHome
    store: NodeStore
    now: float

    @property
    def config(self) -> NodeConfig:
        return self.home.config

    def key_of(self, organisation: str) -> PublicKey:
        key = self.store.organisation_key(organisation)
        if key is None:
            raise DocumentRefusedError(f"no key of organisation {organisation} is known yet")
        return read_public_text(key)


def apply_updates(home: NodeHome, store: NodeStore, updates: Updates, now: float) -> Applied:
    """Verifies and stores each update, and moves the cursor past it, and past nothing else.

    Idempotent: an update that comes twice changes nothing the second time.

    Raises:
        ArtefactError: the home or its database cannot be used; the cursor stays before what was not stored.
    """
    desk, applied = _Desk(home, store, now), Applied()
    for update in updates.updates:
        if update.sequence > store.cursor + SEQUENCES_AHEAD_MAX:
            _note_leap(desk, update.sequence, applied)
            break
        if update.sequence > store.cursor:
            _apply(desk, update.kind, update.body, applied)
            store.cursor = update.sequence
    store.set_fact("state", updates.state)
    if any(kind in RETRY_AFTER for kind, _ in applied.accepted):
        _retry(desk, applied)
    return applied


def trust_organisation(home: NodeHome, store: NodeStore, organisation: str, given: str, now: float) -> Applied:
    """A person confirms the key that the roster has for an organisation, by its fingerprint; what was refused is
    tried again.

    Raises:
        UsageError: the roster has no key, or another one, for it.
    """
    roster = store.roster()
    listed = next((each.key for each in roster.organisations if each.name == organisation), None) if roster else None
    if listed is None:
        raise UsageError(f"the roster has no key for an organisation {organisation}")
    key = read_public_text(listed)
    if fingerprint(key) != "".join(given.split()).lower():
        raise UsageError(
            f"the roster has key {fingerprint(key)} for {organisation}, you gave another. Nothing was changed: ask "
            "that organisation's people for the fingerprint of theirs"
        )
    store.pin_organisation(organisation, public_text(key))
    return retry_refused(home, store, now)


def retry_refused(home: NodeHome, store: NodeStore, now: float) -> Applied:
    """Tries once more what was refused: a dataset was registered meanwhile, or a key confirmed."""
    applied = Applied()
    _retry(_Desk(home, store, now), applied)
    return applied


def check_own_row(roster: Roster, config: NodeConfig, identity: PublicKey, flower: PublicKey) -> None:
    """The roster is of this federation, and says of this node what is so.

    Raises:
        DocumentRefusedError: another federation, organisation or key.
    """
    if roster.federation != config.federation:
        raise DocumentRefusedError(f"the roster is of federation {roster.federation}, expected {config.federation}")
    rows = [row for row in roster.nodes if row.name == config.node]
    if len(rows) != 1:
        raise DocumentRefusedError(f"the roster has {len(rows)} rows for this node, expected one")
    said = (rows[0].organisation, rows[0].identity_key, rows[0].flower_key)
    if said != (config.organisation, public_text(identity), public_text(flower)):
        raise DocumentRefusedError("the roster gives this node another organisation or other keys than it has")


def pin_keys(store: NodeStore, roster: Roster) -> list[str]:
    """Pins the keys of organisations that are seen for the first time; returns those whose key is another now.

    Raises:
        DocumentRefusedError: a key that is none, or more organisations than a federation has.
    """
    changed = []
    known = store.organisations_known()
    new = sum(each.key is not None and store.organisation_key(each.name) is None for each in roster.organisations)
    if known + new > KEYS_MAX:
        raise DocumentRefusedError(
            f"the roster brings {new} organisations beside the {known} that were seen here, expected at most {KEYS_MAX}"
        )
    for organisation in roster.organisations:
        if organisation.key is None:
            continue
        _ed25519(organisation.key, f"of organisation {organisation.name}")
        pinned = store.organisation_key(organisation.name)
        if pinned is None:
            store.pin_organisation(organisation.name, organisation.key)
        elif pinned != organisation.key:
            changed.append(organisation.name)
    return changed


# One function for each kind: all checks first, then the store. Each returns its subject.


def _roster(desk: _Desk, body: Mapping[str, Any]) -> str:
    """The membership key signed it; it is not older than the one that is held; it says of us what is so."""
    envelope = _envelope(body)
    moment = datetime.datetime.fromtimestamp(desk.now, datetime.UTC)
    roster = open_envelope(envelope, Roster, [desk.home.membership_key(moment)])
    identity, flower = desk.home.identity_key().public_key(), desk.home.flower_key().public_key()
    check_own_row(roster, desk.config, identity, flower)
    for names in ([each.name for each in roster.nodes], [each.name for each in roster.organisations]):
        if len(set(names)) != len(names):
            raise DocumentRefusedError("the roster lists a name twice")
    held = desk.store.roster()
    if held is not None and roster.version <= held.version and roster.digest != held.digest:
        raise DocumentRefusedError(
            f"roster version {roster.version} is older than, or another than, version {held.version} that is held"
        )
    if held is not None and roster.version > held.version + VERSIONS_AHEAD_MAX:
        raise DocumentRefusedError(
            f"roster version {roster.version} is far ahead of version {held.version} that is held, and every later one "
            "would count as older. If the coordinator's people did number anew, ask for an invitation and enrol again"
        )
    _ed25519(roster.coordinator_key, "of the coordinator")
    changed = pin_keys(desk.store, roster)
    desk.store.put("roster", str(roster.version), envelope)
    desk.store.set_fact("roster", str(roster.version))
    for organisation in changed:
        _note_changed_key(desk, roster, organisation)
    return str(roster.version)


def _note_changed_key(desk: _Desk, roster: Roster, organisation: str) -> None:
    """The roster stands, for it may revoke someone; the new key is not used until a person says so."""
    listed = next(each.key for each in roster.organisations if each.name == organisation)
    assert listed is not None
    print_of = fingerprint(read_public_text(listed))
    reason = (
        f"the key of organisation {organisation} changed to {print_of}. It is not used: documents signed by it are "
        f"refused. When {organisation}'s own people confirm it: concord-node trust-organisation {organisation} "
        f"{print_of}"
    )
    desk.store.refuse(desk.now, "organisation-key", organisation, reason, {})


def _note_leap(desk: _Desk, sequence: int, applied: Applied) -> None:
    reason = (
        f"the coordinator numbers an update {sequence}, after {desk.store.cursor}: taken, it would hide all that come "
        "later. It and what came with it wait. If the coordinator's people did number anew, ask for an invitation and "
        "enrol again"
    )
    desk.store.refuse(desk.now, "updates", "sequence", reason, {})
    applied.refused.append(("updates", "sequence", reason))


def _trust(desk: _Desk, body: Mapping[str, Any]) -> str:
    """A renewed membership certificate under the pinned root, never an older one; and where the fleet is."""
    trust = Trust.model_validate_json(json.dumps(body))
    if trust.federation != desk.config.federation:
        raise DocumentRefusedError(f"for federation {trust.federation}, expected {desk.config.federation}")
    moment = datetime.datetime.fromtimestamp(desk.now, datetime.UTC)
    membership_key(desk.home.root_pem(), trust.membership_certificate, desk.config.root, moment)
    new, held = read_certificate(trust.membership_certificate), read_certificate(desk.home.membership_pem())
    if new.not_valid_before_utc < held.not_valid_before_utc:
        raise DocumentRefusedError("the membership certificate is older than the one that is held")
    config = NodeConfig.model_validate_json(
        json.dumps(desk.config.model_dump(mode="json") | {"superlink": trust.superlink})
    )
    write_atomically(desk.home.membership, trust.membership_certificate)
    if config != desk.config:
        desk.home.write_config(config)
    return trust.federation


def _study(desk: _Desk, body: Mapping[str, Any]) -> str:
    """Its organisation signed it; nobody takes over another's study, or brings back an older one."""
    envelope = _envelope(body)
    study = open_envelope(envelope, Study, [desk.key_of(_claimed(envelope, Study).organisation)])
    held = desk.store.study(study.study)
    if held is not None and held.organisation != study.organisation:
        raise DocumentRefusedError(f"study {study.study} belongs to {held.organisation}, not to {study.organisation}")
    if held is not None and held.digest != study.digest and study.issued_at <= held.issued_at:
        raise DocumentRefusedError(f"study {study.study} is held in a newer version")
    _put(desk, "study", study.study, envelope)
    return study.study


def _agreement(desk: _Desk, body: Mapping[str, Any]) -> str:
    """Both organisations signed the same bytes; ours is the owner; it is about this node and the study as it stands.

    One that is only requested or offered admits nothing yet, so it is not kept.
    """
    if set(body) != {"state", "envelope"}:
        raise DocumentRefusedError("expected the fields state and envelope")
    envelope = _envelope(body["envelope"])
    claimed = _claimed(envelope, Agreement)
    if body["state"] in ("requested", "offered"):
        return claimed.agreement
    if body["state"] != "agreed":
        raise DocumentRefusedError("expected the state requested, offered or agreed; a withdrawal is a document")
    agreement = open_envelope(envelope, Agreement, [desk.key_of(claimed.owner), desk.key_of(claimed.requester)])
    _check_agreement(desk, agreement)
    _put(desk, "agreement", agreement.agreement, envelope, "agreed")
    return agreement.agreement


def _check_agreement(desk: _Desk, agreement: Agreement) -> None:
    node, own = desk.config.node, desk.config.organisation
    if agreement.owner != own:
        raise DocumentRefusedError(f"the owner is {agreement.owner}; only {own} can open this node's datasets")
    if not any(dataset.startswith(f"{node}/") for dataset in agreement.datasets):
        raise DocumentRefusedError(f"it names no dataset of node {node}")
    study = desk.store.study(agreement.study)
    if study is None or study.digest != agreement.study_digest:
        raise DocumentRefusedError(f"it is about another version of study {agreement.study} than the one that is held")
    if agreement.requester not in (study.organisation, *study.members):
        raise DocumentRefusedError(f"{agreement.requester} is not a member of study {agreement.study}")
    _check_terms(desk, agreement)
    held = desk.store.agreement(agreement.agreement)
    if held is None:
        return
    if _state(desk, agreement.agreement) == "withdrawn":
        raise DocumentRefusedError(f"agreement {agreement.agreement} was withdrawn by its owner; make a new one")
    if held.digest != agreement.digest and agreement.issued_at <= held.issued_at:
        raise DocumentRefusedError(f"agreement {agreement.agreement} is held in a newer version")


def _check_terms(desk: _Desk, agreement: Agreement) -> None:
    """No agreement is wider than the terms of its datasets' cards, whoever signed it; each plan is checked again."""
    for name in (each.partition("/")[2] for each in agreement.datasets if each.startswith(f"{desk.config.node}/")):
        beyond = beyond_terms(terms_of(desk.store, name), agreement)
        if beyond:
            raise DocumentRefusedError(f"dataset {name}: {'; '.join(beyond)}")


def _withdrawal(desk: _Desk, body: Mapping[str, Any]) -> str:
    """The owner ends an agreement, for good. What was approved under it ends before the next batch of work."""
    envelope = _envelope(body)
    claimed = _claimed(envelope, Withdrawal)
    withdrawal = open_envelope(envelope, Withdrawal, [desk.key_of(claimed.organisation)])
    held = desk.store.get("agreement", withdrawal.agreement)
    if withdrawal.organisation != desk.config.organisation:
        raise DocumentRefusedError(f"{withdrawal.organisation} is not the owner of this node's datasets")
    if held is None:
        raise DocumentRefusedError(f"no agreement {withdrawal.agreement} is held")
    desk.store.put("agreement", withdrawal.agreement, held.body, "withdrawn")
    agreement = desk.store.agreement(withdrawal.agreement)
    assert agreement is not None
    withdraw_for_agreement(desk.home, desk.store, agreement, desk.now)
    return withdrawal.agreement


def _plan(desk: _Desk, body: Mapping[str, Any]) -> str:
    """A plan is data: parsed by our own schema, its digest computed here; a person's own code is refused."""
    if set(body) != {"study", "document", "requested_by"} or not isinstance(body["document"], dict):
        raise DocumentRefusedError("expected the fields study, document and requested_by")
    study, requested_by = _text(Id, body["study"]), _text(Name, body["requested_by"])
    if len(json.dumps(body["document"])) > PLAN_BYTES_MAX:
        raise DocumentRefusedError(f"a plan has at most {PLAN_BYTES_MAX} bytes")
    plan = parse_plan_document(body["document"])
    if plan.model.name == "own":
        raise DocumentRefusedError("the plan names a person's own code; a node runs only models that it has installed")
    check_size(plan, PARAMETERS_MAX, METRICS_MAX)
    held = desk.store.study(study)
    if held is None or requested_by not in (held.organisation, *held.members):
        raise DocumentRefusedError(f"{requested_by} is not a member of a study {study} that this node knows")
    request_id = f"{study}/{plan.digest}"
    if desk.store.get("request", request_id) is None:
        _put(desk, "plan", plan.digest, plan.document())
        request = {
            "study": study,
            "plan_digest": plan.digest,
            "requested_by": requested_by,
            "received_at": int(desk.now),
        }
        _put(desk, "request", request_id, request)
    return request_id


def _manifest(desk: _Desk, body: Mapping[str, Any]) -> str:
    """A member of the study signed it, for a plan of the study, with this node and its dataset as it is registered.

    One manifest for a run, for ever: another one under its name would be another run with the same messages.
    """
    envelope = _envelope(body)
    manifest = open_envelope(envelope, RunManifest, [desk.key_of(_claimed(envelope, RunManifest).organisation)])
    held = desk.store.manifest(manifest.run)
    if held is not None:
        if held.digest != manifest.digest:
            raise DocumentRefusedError(f"run {manifest.run} has another manifest already")
        return manifest.run
    study = desk.store.study(manifest.study)
    if study is None or manifest.organisation not in (study.organisation, *study.members):
        raise DocumentRefusedError(f"{manifest.organisation} is not a member of a study {manifest.study} known here")
    if desk.store.get("request", f"{manifest.study}/{manifest.plan_digest}") is None:
        raise DocumentRefusedError(f"plan {manifest.plan_digest[:12]} was not asked for in study {manifest.study}")
    if manifest.not_after <= desk.now:
        raise DocumentRefusedError("the manifest has expired")
    _check_participants(desk, manifest)
    _put(desk, "manifest", manifest.run, envelope)
    with (
        suppress(ArtefactError),
        desk.home.ledger() as ledger,
    ):  # what fails here is tried, and said, at its first round
        reserve_run(desk.store, ledger, manifest.run, desk.now)
    return manifest.run


def _check_participants(desk: _Desk, manifest: RunManifest) -> None:
    """This node once, as itself; the others are nodes of the roster, lest a cohort be made of nobody."""
    config, participants = desk.config, manifest.participants
    names = [participant.node for participant in participants]
    if len(set(names)) != len(names):
        raise DocumentRefusedError("the manifest lists a node twice")
    own = next((each for each in participants if each.node == config.node), None)
    if own is None or own.organisation != config.organisation:
        raise DocumentRefusedError(f"the manifest does not name {config.organisation}/{config.node}")
    dataset = desk.store.dataset(own.dataset)
    if dataset is None:
        raise DocumentRefusedError(f"the manifest names a dataset {own.dataset} that is not registered here")
    if dataset.version != own.dataset_version:
        raise DocumentRefusedError(
            f"the manifest is for version {own.dataset_version[:12]} of dataset {own.dataset}, registered is "
            f"{dataset.version[:12]}"
        )
    roster = desk.store.roster()
    known = {(row.organisation, row.name) for row in roster.nodes if row.state != "revoked"} if roster else set()
    strangers = [each.node for each in participants if (each.organisation, each.node) not in known]
    if strangers:
        raise DocumentRefusedError(
            f"the manifest names nodes that the roster does not have: {', '.join(strangers[:5])}"
        )


def _release(desk: _Desk, body: Mapping[str, Any]) -> str:
    """A member of the study signed it, and it is the one that started the run where this node knows it."""
    envelope = _envelope(body)
    release = open_envelope(envelope, Release, [desk.key_of(_claimed(envelope, Release).organisation)])
    study = desk.store.study(release.study)
    if study is None or release.organisation not in (study.organisation, *study.members):
        raise DocumentRefusedError(f"{release.organisation} is not a member of a study {release.study} known here")
    if desk.store.get("request", f"{release.study}/{release.plan_digest}") is None:
        raise DocumentRefusedError(f"plan {release.plan_digest[:12]} was not asked for in study {release.study}")
    manifest = desk.store.manifest(release.run)
    if manifest is not None and (manifest.organisation, manifest.plan_digest, manifest.study) != (
        release.organisation,
        release.plan_digest,
        release.study,
    ):
        raise DocumentRefusedError(f"it does not fit the manifest of run {release.run}")
    if manifest is not None:
        _check_outputs(desk, manifest)
    names = [file.name for file in release.files]
    if len(set(names)) != len(names) or not all(FILE_NAME.fullmatch(name) for name in names):
        raise DocumentRefusedError("it names a file that could lie outside of its directory, or one file twice")
    held = desk.store.release(release.model_digest)
    if held is not None and held.digest != release.digest and release.issued_at <= held.issued_at:
        raise DocumentRefusedError(f"the release of model {release.model_digest[:12]} is held in a newer version")
    _put(desk, "release", release.model_digest, envelope)
    return release.model_digest


def _preflight(desk: _Desk, body: Mapping[str, Any]) -> str:
    """A member of the study signed it just now, about a plan of the study and the one dataset of this node that it
    names, which an agreement in force opens. Nothing is looked at yet.
    """
    envelope = _envelope(body)
    key = desk.key_of(_claimed(envelope, PreflightRequest).organisation)
    asked = open_envelope(envelope, PreflightRequest, [key])
    desk.store.forget_preflights(desk.now)
    held = desk.store.get("preflight", asked.preflight)
    if held is not None:
        if PreflightRequest.from_canonical(_envelope(held.body).bytes).digest != asked.digest:
            raise DocumentRefusedError(f"preflight {asked.preflight} is another question already")
        return asked.preflight
    if asked.not_after <= desk.now:
        raise DocumentRefusedError("the request has expired; a new one can be made")
    if asked.issued_at > desk.now + CLOCK_SKEW_S or asked.not_after > asked.issued_at + LASTS_MAX_S:
        raise DocumentRefusedError(f"the request is of the future, or holds for longer than {LASTS_MAX_S} s")
    study = desk.store.study(asked.study)
    if study is None or asked.organisation not in (study.organisation, *study.members):
        raise DocumentRefusedError(f"{asked.organisation} is not a member of a study {asked.study} known here")
    if desk.store.get("request", f"{asked.study}/{asked.plan_digest}") is None:
        raise DocumentRefusedError(f"plan {asked.plan_digest[:12]} was not asked for in study {asked.study}")
    dataset = asked.dataset_of(desk.config.node)
    if dataset is None:
        raise DocumentRefusedError(f"it does not name one dataset of node {desk.config.node}")
    if desk.store.admitting(asked.study, f"{desk.config.node}/{dataset}", desk.now) is None:
        raise DocumentRefusedError(f"no agreement in force opens dataset {dataset} to study {asked.study}")
    _put(desk, "preflight", asked.preflight, envelope, "asked")
    return asked.preflight


def _check_outputs(desk: _Desk, manifest: RunManifest) -> None:
    """A release of a model that learned from this node's rows is one that their terms allow."""
    node = desk.config.node
    for name in (each.dataset for each in manifest.participants if each.node == node):
        ceiling = terms_of(desk.store, name)
        agreement = desk.store.admitting(manifest.study, f"{node}/{name}", desk.now)
        for outputs, whose in (
            (ceiling.outputs if ceiling else None, f"the terms of dataset {name}"),
            (agreement.terms.outputs if agreement else None, "the terms of the agreement"),
        ):
            if outputs is not None and "release" not in outputs:
                raise DocumentRefusedError(f"{whose} allow no release of a model of run {manifest.run}")


def _run(desk: _Desk, body: Mapping[str, Any]) -> str:
    """The coordinator's word on how a run goes: for people to read, nothing is decided by it."""
    run, state = _text(Id, body.get("run")), _text(Id, body.get("state"))
    reason = body.get("reason") or ""
    if not isinstance(reason, str):
        raise DocumentRefusedError("expected a reason in words")
    if desk.store.manifest(run) is None:
        raise DocumentRefusedError(f"no manifest of run {run} is held")
    desk.store.put("run", run, {"run": run, "state": state, "reason": printable(reason)[:REASON_MAX]}, state)
    return run


_HANDLERS: Mapping[str, Callable[[_Desk, Mapping[str, Any]], str]] = {
    "roster": _roster,
    "trust": _trust,
    "study": _study,
    "agreement": _agreement,
    "withdrawal": _withdrawal,
    "plan": _plan,
    "manifest": _manifest,
    "release": _release,
    "run": _run,
    "preflight": _preflight,
}


def _apply(desk: _Desk, kind: str, body: Mapping[str, Any], applied: Applied) -> None:
    subject = _subject(body)
    try:
        applied.accepted.append((kind, _HANDLERS[kind](desk, body)))
    except _DISBELIEVED as error:
        reason = printable(str(error))[:REASON_MAX]
        desk.store.refuse(desk.now, kind, subject, reason, body)
        applied.refused.append((kind, subject, reason))
        if kind == "preflight" and desk.store.happened("preflight:refuse", "", DAY_S) < REFUSALS_AUDITED_MAX:
            desk.store.record("coordinator", "preflight:refuse", subject, reason=reason)


_DISBELIEVED = (DocumentRefusedError, PlanError, ValueError, RecursionError)
"""Not ArtefactError: where the home itself fails, nothing is said about what arrived. (A ValidationError is a
ValueError.)"""


def _retry(desk: _Desk, applied: Applied) -> None:
    """Tries once more what was refused, oldest first: what it lacked may have come."""
    for refused in desk.store.refused():
        if refused.body is None or refused.kind not in _HANDLERS:
            continue
        try:
            applied.accepted.append((refused.kind, _HANDLERS[refused.kind](desk, refused.body)))
        except _DISBELIEVED:
            continue
        desk.store.accept_refused(refused.id)
        applied.refused[:] = [each for each in applied.refused if each[:2] != (refused.kind, refused.subject)]


def _put(desk: _Desk, kind: StoredKind, id: str, body: Envelope | Mapping[str, Any], state: str = "") -> None:
    """Into the store, if there is room beside the others of its kind."""
    count, size = desk.store.usage(kind, id)
    size += len(body.model_dump_json() if isinstance(body, Envelope) else json.dumps(body))
    if count >= DOCUMENTS_MAX or size > DOCUMENTS_BYTES_MAX:
        raise DocumentRefusedError(
            f"no room for one more {kind}: this node holds {count}, with this one {size} bytes, expected at most "
            f"{DOCUMENTS_MAX} and {DOCUMENTS_BYTES_MAX} bytes. Ask the coordinator's people what they send; a new home "
            "begins empty: concord-node leave, then enrol with a new invitation"
        )
    desk.store.put(kind, id, body, state)


def _ed25519(key: str, of: str) -> None:
    if not isinstance(read_public_text(key), Ed25519PublicKey):
        raise DocumentRefusedError(f"the roster's key {of} is not an Ed25519 key")


def _state(desk: _Desk, agreement: str) -> str:
    stored = desk.store.get("agreement", agreement)
    return "" if stored is None else stored.state


def _envelope(body: Any) -> Envelope:
    text = json.dumps(body)
    if len(text) > ENVELOPE_BYTES_MAX:
        raise DocumentRefusedError(f"a signed document has at most {ENVELOPE_BYTES_MAX} bytes, this one {len(text)}")
    try:
        return Envelope.model_validate_json(text)
    except ValidationError as error:
        raise DocumentRefusedError("not a signed document") from error


def _claimed(envelope: Envelope, kind: type[Kind]) -> Kind:
    """What the document says, unverified: to know whose signature it needs, and for nothing else."""
    return kind.from_canonical(envelope.bytes)


def _text(kind: Any, value: Any) -> str:
    try:
        return str(TypeAdapter(kind).validate_python(value, strict=True))
    except ValidationError as error:
        raise DocumentRefusedError(f"expected a name, got {printable(repr(value))[:80]}") from error


def _subject(body: Mapping[str, Any]) -> str:
    """What an unverified body says that it is about; for a person's eyes only."""
    try:
        inner = body.get("envelope", body)
        said = json.loads(Envelope.model_validate_json(json.dumps(inner)).bytes)
    except (ConcordError, ValueError, RecursionError, AttributeError):
        said = body
    names = ("run", "preflight", "agreement", "study", "model_digest", "version", "federation")
    found = next((str(said[name]) for name in names if isinstance(said, Mapping) and name in said), "unknown")
    return printable(found)[:100]
