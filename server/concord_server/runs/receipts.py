"""What the coordinator gives, and keeps, for each Update that it took."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func as sql
from sqlmodel import Session, col, select

from concord_server.database import lock, utc_now
from concord_server.runs.tables import ReceiptRow
from concord_server.studies.envelopes import envelope_of, keep
from concord_shared.canonical import canonical_digest
from concord_shared.documents import RunManifest
from concord_shared.evidence.receipts import Receipt
from concord_shared.protocol import RECEIPTS_MAX, Receipts
from concord_shared.signed_rounds import Sent
from concord_shared.signing import PrivateKey, seal

__all__ = ["evidence", "of_node", "of_run", "store", "taken_digest"]

LOCK = "receipts"


def store(
    session: Session,
    manifest: RunManifest,
    step: tuple[str, int, int],
    sent: Mapping[str, Sent],
    signer: PrivateKey,
) -> None:
    """A receipt for each node whose Update is in this step, beside the node's own word. step: kind, round, attempt.

    Numbers are given under a lock: a node that saw one never misses a lower one.
    """
    if not sent:
        return
    kind, round_number, attempt = step
    lock(session, LOCK)
    number = session.exec(select(sql.max(ReceiptRow.number))).one() or 0
    now = int(utc_now().timestamp())
    for participant in manifest.participants:
        given = sent.get(participant.node)
        if given is None:
            continue
        number += 1
        receipt = Receipt(
            run=manifest.run,
            plan_digest=manifest.plan_digest,
            manifest_digest=manifest.digest,
            kind=kind,  # type: ignore[arg-type]  # one of the three kinds of steps
            round_number=round_number,
            attempt=attempt,
            node=participant.node,
            organisation=participant.organisation,
            dataset=participant.dataset,
            dataset_version=participant.dataset_version,
            sent=given.digest,
            taken_at=now,
            charge=given.charge,
        )
        row = ReceiptRow(
            number=number,
            run=manifest.run,
            node=participant.node,
            kind=kind,
            round=round_number,
            statement=given.statement.decode("utf-8"),
            signature=given.signature.hex(),
            envelope=keep(seal(receipt, signer)),
        )
        session.add(row)


def taken_digest(sent: Mapping[str, str]) -> str:
    """Stands in the audit log for the Updates of a step. sent: by node, the digest of what it signed."""
    return canonical_digest(dict(sent))


def of_node(session: Session, node: str, after: int) -> Receipts:
    """The receipts of a node after number `after`, oldest first."""
    query = select(ReceiptRow).where(ReceiptRow.node == node, ReceiptRow.number > after)
    rows = session.exec(query.order_by(col(ReceiptRow.number)).limit(RECEIPTS_MAX)).all()
    cursor = rows[-1].number if rows else after
    return Receipts(receipts=tuple(envelope_of(row.envelope) for row in rows), cursor=cursor)


def of_run(session: Session, run: str) -> list[ReceiptRow]:
    query = select(ReceiptRow).where(ReceiptRow.run == run)
    return list(session.exec(query.order_by(col(ReceiptRow.number))))


def evidence(row: ReceiptRow) -> dict[str, Any]:
    """As a capsule holds it."""
    return {"receipt": row.envelope, "statement": row.statement, "signature": row.signature}
