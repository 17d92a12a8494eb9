"""The coordinator as a witness of where this node's ledger stood: it can forget that, but it cannot make it up.

After each charge the node signs the newest entry's place and hash, and sends it. On a new connection it asks for the
newest that the coordinator holds. A backup of a whole home that rolls the ledger back is found so.
"""

import json
from dataclasses import asdict

from concord_client.home import NodeHome
from concord_client.ledger.ledger import PrivacyLedger
from concord_client.ledger.marks import BEGINNING, Mark
from concord_client.store import NodeStore
from concord_shared.errors import DocumentRefusedError
from concord_shared.protocol import LedgerHead
from concord_shared.signing import Envelope, open_envelope, seal

__all__ = ["KIND", "check_witness", "note_witness", "post_head", "witnessed"]

KIND = "ledger-head"
FACT = "ledger/witnessed"


def post_head(home: NodeHome, store: NodeStore, head: Mark, now: float) -> None:
    """Posts the newest state, in place of an older one that was not sent yet."""
    config = home.config
    word = LedgerHead(
        node=config.node,
        organisation=config.organisation,
        sequence=head.sequence,
        hash=head.hash,
        issued_at=int(now),
    )
    for posted in store.outbox():
        if posted.kind == KIND:
            store.delivered(posted.id)
    store.post(KIND, config.node, seal(word, home.identity_key()))


def note_witness(home: NodeHome, store: NodeStore, envelope: Envelope) -> None:
    """Remembers what the coordinator holds, if this node signed it; the newest of all is kept.

    Raises:
        DocumentRefusedError: this node never said so.
    """
    said = open_envelope(envelope, LedgerHead, [home.identity_key().public_key()])
    if (said.node, said.organisation) != (home.config.node, home.config.organisation):
        raise DocumentRefusedError("the coordinator's word about this node's ledger is about another node")
    if said.sequence > witnessed(store).sequence:
        store.set_fact(FACT, json.dumps(asdict(Mark(said.sequence, said.hash))))


def witnessed(store: NodeStore) -> Mark:
    text = store.fact(FACT)
    return BEGINNING if text is None else Mark(**json.loads(text))


def check_witness(store: NodeStore, ledger: PrivacyLedger) -> None:
    """Raises: LedgerDamagedError: the ledger does not hold what it was known to hold."""
    ledger.check_mark(witnessed(store))
