"""What people do with studies, agreements, plans, runs and models: the documents are made and signed here, with a key
that never leaves this machine, and sent over the API. What is signed is what its own bytes say, checked here; never
what the coordinator says of it.
"""

import json
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from concord_server.client import Coordinator
from concord_shared.documents import Agreement, ModelFile, Participant, Release, RunManifest, Study, Terms, Withdrawal
from concord_shared.errors import (
    ArtefactError,
    ConflictError,
    DocumentRefusedError,
    NotFoundError,
    TooManyError,
    UnavailableError,
    UnreachableError,
    UsageError,
)
from concord_shared.files import explain, file_digest
from concord_shared.plan.schema import Plan
from concord_shared.preflight import PreflightRequest
from concord_shared.seeds import derive_seed
from concord_shared.signing import (
    Document,
    Envelope,
    PrivateKey,
    PublicKey,
    fingerprint,
    open_envelope,
    read_public_text,
    seal,
)

__all__ = [
    "Review",
    "Standing",
    "agree",
    "ask_preflight",
    "await_preflight",
    "create_study",
    "download_model",
    "offer_agreement",
    "release_model",
    "request_agreement",
    "standing_agreement",
    "start_run",
    "submit_plan",
    "told",
    "watch_run",
    "withdraw_agreement",
]

DAY_S = 86_400
BEFORE_S = 60
"""A manifest holds from a little before now, for clocks that are a little behind."""
PACKAGES = ("concord", "flwr", "numpy", "torch")
RETRY_S, RETRIES = 2.0, 150
POLL_S = 0.5
MODEL_FILE = "model.safetensors"
Record = dict[str, Any]


def own_organisation(api: Coordinator, given: str | None) -> str:
    """On whose behalf: as given, or that of the person who is signed in."""
    organisation = given or api.get("/api/v1/me")["organisation"]
    if organisation is None:
        raise UsageError("you belong to no organisation; say on whose behalf with --organisation")
    return str(organisation)


# Studies and agreements


@dataclass(frozen=True)
class Standing:
    """An agreement as it stands at the coordinator.

    study: the one that it is about; None where that is another version by now. signers: the organisations whose
    signature it has, with the fingerprint of the key.
    """

    state: str
    document: Agreement
    study: Study | None
    signers: Mapping[str, str]


Review = Callable[[Standing, Agreement], None]
"""Looks at what stands and at what is about to be signed; raises where it is not to be."""


def create_study(
    api: Coordinator,
    key: PrivateKey,
    study: str,
    *,
    title: str,
    purpose: str,
    members: Sequence[str] = (),
    organisation: str | None = None,
) -> Record:
    document = _made(
        Study,
        study=study,
        title=title,
        purpose=purpose,
        organisation=own_organisation(api, organisation),
        members=tuple(members),
        issued_at=_now(),
    )
    return api.post("/api/v1/studies", _sealed(document, key))


def request_agreement(
    api: Coordinator,
    key: PrivateKey,
    study: str,
    datasets: Sequence[str],
    *,
    terms: Mapping[str, Any],
    days: int = 365,
    agreement: str | None = None,
    organisation: str | None = None,
) -> Record:
    """Asks the owner of `node/dataset`s to open them to a study. terms: fields of `Terms` but for not_after."""
    found = [api.get(f"/api/v1/datasets/{name}") for name in datasets]
    owners = sorted({each["organisation"] for each in found})
    if len(owners) != 1:
        raise UsageError(f"an agreement is with one owner, these are of {', '.join(owners) or 'none'}; make one each")
    document = _made(
        Agreement,
        agreement=agreement or f"{study[:40]}-{owners[0][:12]}-{secrets.token_hex(3)}",
        study=study,
        study_digest=_study(api, study).digest,
        requester=own_organisation(api, organisation),
        owner=owners[0],
        datasets=tuple(datasets),
        terms=_made(Terms, **terms, not_after=_now() + days * DAY_S),
        issued_at=_now(),
    )
    return api.post("/api/v1/agreements", _sealed(document, key))


def offer_agreement(
    api: Coordinator,
    key: PrivateKey,
    agreement: str,
    *,
    terms: Mapping[str, Any] | None = None,
    days: int | None = None,
    datasets: Sequence[str] = (),
    digest: str | None = None,
    review: Review | None = None,
) -> Record:
    """The owner's word. Without changes it is signed as it was requested, and so agreed at once.

    digest: of what stands, as a person has seen it.

    Raises:
        ConflictError: another one stands. DocumentRefusedError: it lacks the requester's signature, or is not about the
            study as it is.
    """
    found = standing_agreement(api, agreement)
    own_before = found.signers.get(found.document.owner) == fingerprint(key.public_key())
    _check_standing(found, found.document.owner if own_before else found.document.requester, digest)
    standing = found.document
    changes = dict(terms or {}) | ({"not_after": _now() + days * DAY_S} if days is not None else {})
    if changes or datasets:
        fields: Record = {"terms": _made(Terms, **standing.terms.model_dump() | changes), "issued_at": _now()}
        fields |= {"datasets": tuple(datasets)} if datasets else {}
        standing = standing.model_copy(update=fields)
    if review is not None:
        review(found, standing)
    return api.post(f"/api/v1/agreements/{agreement}/offer", _sealed(standing, key))


def agree(
    api: Coordinator, key: PrivateKey, agreement: str, digest: str | None = None, review: Review | None = None
) -> Record:
    """The requester's word on what is offered. digest: of the offer that a person has seen.

    Raises:
        ConflictError: another one stands. DocumentRefusedError: it lacks the owner's signature, or is not about the
            study as it is.
    """
    found = standing_agreement(api, agreement)
    _check_standing(found, found.document.owner, digest)
    if review is not None:
        review(found, found.document)
    return api.post(f"/api/v1/agreements/{agreement}/agree", _sealed(found.document, key))


def withdraw_agreement(api: Coordinator, key: PrivateKey, agreement: str, reason: str = "") -> Record:
    """The owner's last word: runs that live by this agreement stop."""
    owner = _opened(api.get(f"/api/v1/agreements/{agreement}"), agreement)[1].owner
    document = _made(Withdrawal, agreement=agreement, organisation=owner, reason=reason, issued_at=_now())
    return api.post(f"/api/v1/agreements/{agreement}/withdraw", _sealed(document, key))


def standing_agreement(api: Coordinator, agreement: str) -> Standing:
    """Raises: DocumentRefusedError: what the coordinator shows is not that agreement."""
    found = api.get(f"/api/v1/agreements/{agreement}")
    envelope, document = _opened(found, agreement)
    keys = {name: _key_of(api, name) for name in (document.requester, document.owner)}
    signers = {
        name: fingerprint(key)
        for name, key in keys.items()
        if key is not None and _has_signed(envelope, Agreement, key)
    }
    try:
        study = _study(api, document.study)
    except NotFoundError:
        study = None
    return Standing(
        str(found["state"]), document, study if study and study.digest == document.study_digest else None, signers
    )


def told(found: Record) -> Record:
    """An agreement as the API shows it, with everything that its document says taken from there."""
    document = _opened(found, found["agreement"])[1]
    said = document.model_dump(mode="json", exclude={"issued_at", "study_digest"})
    return found | said | {"digest": document.digest}


def _check_standing(found: Standing, signer: str, digest: str | None) -> None:
    agreement = found.document.agreement
    if digest is not None and found.document.digest != digest:
        raise ConflictError("what stands has changed since it was shown, and nothing was signed; look at it again: "
                            f"concord agreement show {agreement}")  # fmt: skip
    if signer not in found.signers:
        raise DocumentRefusedError(
            f"the agreement {agreement} that the coordinator shows lacks the signature of {signer}, and nothing was "
            f"signed: ask {signer}'s own people what they signed, and with which key"
        )
    if found.study is None:
        raise DocumentRefusedError(
            f"the agreement {agreement} is not about the study {found.document.study} as it is now, and nothing was "
            "signed: ask for a new one"
        )


def _study(api: Coordinator, study: str) -> Study:
    """As its organisation signed it."""
    envelope = _envelope(api.get(f"/api/v1/studies/{study}")["document"])
    document = Study.from_canonical(envelope.bytes)
    key = _key_of(api, document.organisation)
    if document.study != study or key is None or not _has_signed(envelope, Study, key):
        raise DocumentRefusedError(
            f"what the coordinator shows as the study {study} is another one, or lacks the signature of "
            f"{document.organisation}; ask that organisation's own people"
        )
    return document


def _key_of(api: Coordinator, organisation: str) -> PublicKey | None:
    key = api.get(f"/api/v1/organisations/{organisation}")["key"]
    return None if key is None else read_public_text(key)


def _has_signed(envelope: Envelope, kind: type[Document], key: PublicKey) -> bool:
    try:
        open_envelope(envelope, kind, [key])
    except DocumentRefusedError:
        return False
    return True


def _opened(found: Record, agreement: str) -> tuple[Envelope, Agreement]:
    envelope = _envelope(found["document"])
    document = Agreement.from_canonical(envelope.bytes)
    if document.agreement != agreement:
        raise DocumentRefusedError(
            f"the coordinator shows the agreement {document.agreement} in the place of {agreement}; nothing was signed"
        )
    return envelope, document


def _envelope(found: Any) -> Envelope:
    try:
        return Envelope.model_validate_json(json.dumps(found))
    except ValidationError as error:
        raise DocumentRefusedError("what the coordinator shows is not a signed document") from error


# Plans and runs


def submit_plan(api: Coordinator, study: str, plan: Plan, organisation: str | None = None) -> Record:
    """Submits a plan to a study. The same plan again changes nothing."""
    body = {"study": study, "document": plan.document(), "organisation": own_organisation(api, organisation)}
    found = api.post("/api/v1/plans", body)
    if found["digest"] != plan.digest:
        raise UnreachableError(
            f"the coordinator computes the digest {found['digest'][:16]}… for this plan, here it is "
            f"{plan.digest[:16]}…; install the same version of concord as the coordinator"
        )
    return found


def start_run(
    api: Coordinator,
    key: PrivateKey,
    study: str,
    plan: Plan,
    *,
    nodes: Sequence[str] = (),
    start_model: str | None = None,
    priority: int = 0,
    days: int = 30,
    run: str | None = None,
    organisation: str | None = None,
) -> Record:
    """Submits the plan if need be, makes and signs the manifest, starts the run.

    nodes: names, or node/dataset where a node has several; empty for all active ones with an agreed dataset.
    """
    organisation = own_organisation(api, organisation)
    submit_plan(api, study, plan, organisation)
    found = api.get(f"/api/v1/studies/{study}/participants")
    chosen = _choose(found["items"], nodes, study)
    now = _now()
    manifest = _made(
        RunManifest,
        run=run or f"{plan.name[:40]}-{secrets.token_hex(4)}",
        study=study,
        plan_digest=plan.digest,
        organisation=organisation,
        roster_version=found["roster_version"],
        participants=tuple(
            Participant(**{field: each[field] for field in ("node", "organisation", "dataset", "dataset_version")})
            for each in chosen
        ),
        cohort_seed=derive_seed(plan.seed, "cohort"),
        start_model=start_model,
        versions=_versions(),
        nonce=secrets.token_hex(32),
        not_before=now - BEFORE_S,
        not_after=min([now + days * DAY_S, *(each["not_after"] for each in chosen)]),
    )
    return api.post("/api/v1/runs", {"manifest": _sealed(manifest, key), "priority": priority})


def ask_preflight(
    api: Coordinator,
    key: PrivateKey,
    study: str,
    plan: Plan,
    *,
    nodes: Sequence[str] = (),
    wait_s: int = 120,
    organisation: str | None = None,
) -> Record:
    """Submits the plan if need be, and asks each node whether a run of it could begin. `await_preflight` waits.

    nodes: as of `start_run`, but for all with an agreed dataset, active or not. wait_s: who answers later is not heard.
    """
    organisation = own_organisation(api, organisation)
    submit_plan(api, study, plan, organisation)
    candidates = api.get(f"/api/v1/studies/{study}/participants")["items"]
    chosen = _choose(candidates, nodes, study, active_only=False)
    now = _now()
    document = _made(
        PreflightRequest,
        preflight=f"{plan.name[:40].strip('-')}-{secrets.token_hex(4)}",
        study=study,
        plan_digest=plan.digest,
        organisation=organisation,
        datasets=tuple(each["name"] for each in chosen),
        participants=len({each["node"] for each in candidates}),
        issued_at=now,
        not_after=now + wait_s,
    )
    return api.post(f"/api/v1/studies/{study}/preflights", _sealed(document, key))


def await_preflight(api: Coordinator, asked: Record, wait_s: float) -> Iterator[Record]:
    """The preflight as it stands, each time that somebody answered; the last one when all did, or the time is over."""
    path, until = f"/api/v1/studies/{asked['study']}/preflights/{asked['preflight']}", time.monotonic() + wait_s
    seen = -1
    while True:
        found = api.get(path)
        answers = sum(each["answered_at"] is not None for each in found["nodes"])
        over = found["answered"] or time.monotonic() >= until
        if answers > seen or over:
            yield found
        if over:
            return
        seen = answers
        time.sleep(POLL_S)


def watch_run(api: Coordinator, run: str) -> Iterator[tuple[str, Record]]:
    """`("state", …)` when it changes, `("round", record)` for each step, at last `("end", report)`. A connection that
    is lost is made again, and goes on where it was.

    Raises:
        UnreachableError: the coordinator did not come back.
    """
    rounds, failures = 0, 0
    told: Record | None = None
    while True:
        try:
            for event, data in api.events(f"/api/v1/runs/{run}/events", after=rounds - 1 if rounds else None):
                failures = 0
                if event == "state" and data == told:
                    continue
                rounds += event == "round"
                told = data if event == "state" else told
                yield event, data
                if event == "end":
                    return
        except (UnreachableError, UnavailableError, TooManyError):
            failures += 1
            if failures > RETRIES:
                raise
        time.sleep(RETRY_S if failures else 0.1)


def _choose(
    candidates: Sequence[Record], nodes: Sequence[str], study: str, *, active_only: bool = True
) -> list[Record]:
    """The datasets that take part, one for each node, in name order. active_only: where no nodes are named."""
    if not candidates:
        raise UsageError(f"no dataset serves the study {study} yet; ask an owner: concord agreement request")
    if not nodes:
        chosen = [each for each in candidates if each["state"] == "active" or not active_only]
    else:
        known = {each["name"] for each in candidates} | {each["node"] for each in candidates}
        if unknown := sorted(set(nodes) - known):
            raise UsageError(f"no dataset of {', '.join(unknown)} serves the study {study}; there is: "
                             f"{', '.join(each['name'] for each in candidates)}")  # fmt: skip
        chosen = [each for each in candidates if each["name"] in nodes or each["node"] in nodes]
    names = [each["node"] for each in chosen]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{', '.join(twice)}: several datasets serve the study; name one each: --nodes NODE/DATASET")
    if not chosen:
        raise UsageError(f"none of the nodes whose datasets serve the study {study} is active")
    return chosen


def _versions() -> dict[str, str]:
    """Of the packages here, by their metadata: nothing is imported."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# Models


def download_model(api: Coordinator, digest: str, out: Path, run: str | None = None) -> Record:
    """All files of a model, each verified by its digest, and the model itself by its own."""
    found = api.get(f"/api/v1/models/{digest}/files", run=run)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtefactError(f"cannot make {out}: {explain(error)}") from error
    for file in found["files"]:
        path = out / Path(file["name"]).name
        api.download(f"/api/v1/models/{digest}/files/{file['name']}", path, run=run)
        if (path.stat().st_size, file_digest(path)) != (file["size"], file["sha256"]):
            path.unlink()
            raise ArtefactError(f"{file['name']} did not arrive as the coordinator announced it; try again")
    _check_model(out / MODEL_FILE, digest)
    return found | {"out": str(out)}


def release_model(api: Coordinator, key: PrivateKey, digest: str, run: str | None = None) -> Record:
    """Clears a model for use. Its files are downloaded and verified first: what is signed has been seen."""
    with tempfile.TemporaryDirectory() as folder:
        found = download_model(api, digest, Path(folder), run)
    document = _made(
        Release,
        model_digest=digest,
        plan_digest=found["plan_digest"],
        study=found["study"],
        run=found["run"],
        organisation=found["organisation"],
        files=tuple(ModelFile(**file) for file in found["files"]),
        metrics=found["metrics"],
        issued_at=_now(),
    )
    return api.post(f"/api/v1/models/{digest}/release", _sealed(document, key))


def _check_model(path: Path, digest: str) -> None:
    """Raises: ArtefactError: the tensors are not those of that digest."""
    import numpy as np

    from concord_shared.tensors import Layout, model_digest, read_safetensors

    tensors, _ = read_safetensors(path)
    layout = Layout.of({name: tensor.shape for name, tensor in tensors.items()})
    vector = layout.join({name: tensor.astype(np.float32, copy=False) for name, tensor in tensors.items()})
    if model_digest(layout, vector) != digest:
        raise ArtefactError(f"{path.name} is not the model {digest[:16]}…; do not use it, and tell the coordinator")


# Documents


def _made(kind: Any, **fields: Any) -> Any:
    """A document of these fields. Raises: UsageError: a field cannot be so, by name."""
    try:
        return kind(**fields)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False))
        raise UsageError("; ".join(faults)) from error


def _sealed(document: Document, key: PrivateKey) -> Record:
    return seal(document, key).model_dump(mode="json")


def _now() -> int:
    return int(time.time())
