"""receipts.json: what is left of a node that left, for whoever doubts later what it decided, sent and was told.

Signed by the node's identity key, which is erased afterwards. It holds the whole audit log, every receipt of the
coordinator, and the way from the federation's root to the keys that signed them.
"""

import base64
import json
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature

from concord_client.evidence import own_head
from concord_client.home import NodeHome
from concord_client.store import NodeStore
from concord_shared.canonical import canonical_bytes
from concord_shared.documents import Leave
from concord_shared.errors import DocumentRefusedError
from concord_shared.evidence.chain import KeyChain
from concord_shared.evidence.files import read_limited
from concord_shared.evidence.log import LOG_BYTES_MAX, export_log, verify_log
from concord_shared.evidence.receipts import Receipt
from concord_shared.files import write_atomically
from concord_shared.signing import (
    Envelope,
    fingerprint,
    open_envelope,
    public_text,
    read_public_text,
    seal,
    sign_bytes,
    verify_bytes,
)

__all__ = ["verify_farewell", "write_farewell"]

RECEIPTS = "concord/receipts/1"


def write_farewell(home: NodeHome, store: NodeStore, farewell: Envelope) -> None:
    """farewell: the node's own Leave."""
    key = home.identity_key()
    content: dict[str, Any] = {
        "schema": RECEIPTS,
        "federation": home.config.federation,
        "organisation": home.config.organisation,
        "node": home.config.node,
        "identity_key": public_text(key.public_key()),
        "leave": farewell.model_dump(mode="json"),
        "approvals": [envelope.model_dump(mode="json") for envelope in store.approval_envelopes()],
        "ledger": _ledger_entries(home),
        "egress": [
            {
                "at_ms": round(e.at * 1000),
                "to": e.to,
                "kind": e.kind,
                "subject": e.subject,
                "bytes": e.bytes,
                "sha256": e.sha256,
            }
            for e in store.egress()
        ],
        "receipts": [envelope.model_dump(mode="json") for envelope in store.receipts()],
        "keys": _keys(home, store),
        "log": _log(home, store),
    }
    signature = base64.b64encode(sign_bytes(key, RECEIPTS.encode() + b"\0" + canonical_bytes(content))).decode()
    write_atomically(home.receipts, json.dumps(content | {"signature": signature}, indent=1, ensure_ascii=False) + "\n")


def verify_farewell(path: Path, root: str) -> dict[str, Any]:
    """What receipts.json shows, if all of it holds, under the federation's root key with this fingerprint:

    1. the node's identity key signed all of it, and the log in it
    2. the roster, up to the root, names that key as the node's
    3. every receipt is signed by the coordinator that the roster names, and is for this node
    4. the log says that exactly that was sent

    Raises:
        DocumentRefusedError: with what does not hold. ArtefactError: it cannot be read.
    """
    try:
        content = json.loads(read_limited(path, LOG_BYTES_MAX))
        signature = base64.b64decode(content.pop("signature"), validate=True)
        key, schema = read_public_text(content["identity_key"]), content["schema"]
        verify_bytes(key, signature, RECEIPTS.encode() + b"\0" + canonical_bytes(content))
        envelopes = [Envelope.model_validate_json(json.dumps(each)) for each in content["receipts"]]
        leave = Envelope.model_validate_json(json.dumps(content["leave"]))
        chain = KeyChain.model_validate_json(json.dumps(content["keys"]))
        log, node = content["log"].encode("utf-8"), str(content["node"])
    except InvalidSignature as error:
        raise DocumentRefusedError(f"{path} was altered: the node's signature under it is wrong") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DocumentRefusedError(f"{path} is not what `concord-node leave` writes") from error
    if schema != RECEIPTS or open_envelope(leave, Leave, [key]).node != node:
        raise DocumentRefusedError(f"{path} is not the farewell of the node {node}")
    roster = chain.verified(root)
    if [row.identity_key for row in roster.nodes if row.name == node] != [public_text(key)]:
        raise DocumentRefusedError(f"the roster does not name this key as that of the node {node}")
    found = verify_log(log, fingerprint(key))
    receipts = [open_envelope(each, Receipt, [read_public_text(roster.coordinator_key)]) for each in envelopes]
    sent = _sent(log)
    for receipt in receipts:
        if receipt.node != node or receipt.sent not in sent:
            raise DocumentRefusedError(f"the receipt for {receipt.step} is for something that the log does not have")
    return {"node": node, "receipts": len(receipts), "entries": found.entries, "key": found.key}


def _sent(log: bytes) -> set[str]:
    try:
        entries = [json.loads(line)["body"] for line in log.splitlines()[1:]]
        return {each["detail"]["sha256"] for each in entries if each["action"] == "egress:reply"}
    except (KeyError, TypeError) as error:
        raise DocumentRefusedError("an entry of the log says that a reply was sent, but not which one") from error


def _keys(home: NodeHome, store: NodeStore) -> dict[str, Any] | None:
    """None of a node that leaves before it held a roster."""
    version = store.fact("roster")
    stored = None if version is None else store.get("roster", version)
    if stored is None:
        return None
    keys = {"root_certificate": home.root_pem(), "membership_certificate": home.membership_pem()}
    return keys | {"roster": stored.body}


def _ledger_entries(home: NodeHome) -> list[Any]:
    """What every dataset has told: its records spent it, and go on to have spent it."""
    with home.ledger(repairing=True) as ledger:
        return [json.loads(entry.canonical) for entry in ledger.entries()]


def _log(home: NodeHome, store: NodeStore) -> str:
    key, head = home.identity_key(), own_head(home, store)
    entries = ((each.canonical, found) for each, found in store.log_entries(1, head.size))
    return b"".join(export_log(seal(head, key), key.public_key(), entries)).decode("utf-8")
