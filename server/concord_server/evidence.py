"""The coordinator's evidence as a person's machine fetches it: all of it is verified here, from the pinned root on."""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from concord_server.client import Coordinator
from concord_shared.certificates import read_certificate, root_fingerprint
from concord_shared.errors import ArtefactError, DocumentRefusedError, UsageError
from concord_shared.evidence.chain import KeyChain
from concord_shared.evidence.heads import TreeHead
from concord_shared.evidence.log import export_log
from concord_shared.evidence.proofs import EntryProof, prove_entry, verify_entry
from concord_shared.files import explain
from concord_shared.signing import Envelope, PublicKey, fingerprint, open_envelope

__all__ = ["SignedHead", "entry_proof", "export_run", "exported_log", "pinned_root", "signed_head"]

ENTRIES_MAX = 1000


@dataclass(frozen=True)
class SignedHead:
    head: TreeHead
    envelope: Envelope
    key: PublicKey

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.key)


def signed_head(api: Coordinator) -> SignedHead:
    """The head of the log now, signed by the key that the roster names, which the root of `concord login` vouches for.

    Raises:
        DocumentRefusedError: with the link that is broken.
    """
    found = api.get("/api/v1/audit/head")
    try:
        told = {name: found[name] for name in ("root_certificate", "membership_certificate", "roster")}
        chain = KeyChain.model_validate_json(json.dumps(told))
        envelope = Envelope.model_validate_json(json.dumps(found["head"]))
    except (KeyError, ValidationError) as error:
        raise DocumentRefusedError("what the coordinator shows is not a signed head") from error
    key = chain.coordinator_key(pinned_root(api))
    return SignedHead(open_envelope(envelope, TreeHead, [key]), envelope, key)


def pinned_root(api: Coordinator) -> str:
    """The fingerprint that `concord login` was given."""
    if not api.root_pem:
        raise UsageError("this connection has no root key to check signatures by; log in: concord login URL --root …")
    return root_fingerprint(read_certificate(api.root_pem))


def exported_log(api: Coordinator) -> tuple[bytes, str]:
    """The whole log as a file, not yet verified, and the fingerprint of the key that must have signed its head."""
    found = signed_head(api)
    entries: list[tuple[bytes, bytes]] = []
    while len(entries) < found.head.size:
        limit = min(ENTRIES_MAX, found.head.size - len(entries))
        items = api.get("/api/v1/audit/entries", first=len(entries) + 1, limit=limit)["items"]
        if not items:
            break  # the verifier says what is missing
        entries += [(each["body"].encode("utf-8"), _hash(each)) for each in items]
    return b"".join(export_log(found.envelope, found.key, entries)), found.fingerprint


def entry_proof(api: Coordinator, entry: int) -> tuple[EntryProof, dict[str, Any]]:
    """The proof of one entry, verified; and what it shows. Raises: DocumentRefusedError: it does not hold."""
    key = signed_head(api).key
    found = api.get(f"/api/v1/audit/entries/{entry}/proof")
    try:
        head = Envelope.model_validate_json(json.dumps(found["head"]))
        made = prove_entry(found["body"].encode("utf-8"), found["before"], found["proof"], head, key)
    except (KeyError, ValidationError) as error:
        raise DocumentRefusedError("what the coordinator shows is not a proof") from error
    shown, under, signer = verify_entry(made, fingerprint(key))
    if shown.sequence != entry:
        raise DocumentRefusedError(f"the coordinator proves entry {shown.sequence}, not {entry}")
    return made, {"entry": shown.model_dump(mode="json"), "head": under.mark, "key": signer}


def _hash(item: dict[str, str]) -> bytes:
    try:
        return bytes.fromhex(item["hash"])
    except ValueError as error:
        raise DocumentRefusedError("what the coordinator shows is not an entry of a log") from error


def export_run(api: Coordinator, run: str, out: Path) -> dict[str, Any]:
    """The capsule of a run, verified before it takes its place; what it shows.

    Raises:
        DocumentRefusedError: what came does not hold; nothing is kept.
    """
    from concord_shared.evidence.verify import verify_capsule

    root = pinned_root(api)
    fresh = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        api.download(f"/api/v1/runs/{run}/capsule", fresh)
        found = verify_capsule(fresh, root)
        if found["run"] != run:
            raise DocumentRefusedError(f"the coordinator gives the capsule of {found['run']} in the place of {run}")
        fresh.replace(out)
    except OSError as error:
        raise ArtefactError(f"cannot write {out}: {explain(error)}") from error
    finally:
        fresh.unlink(missing_ok=True)
    return found
