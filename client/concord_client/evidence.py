"""Evidence that this node and its coordinator keep of each other, exchanged after rounds and from time to time.

    coordinator's head ─► does its log begin with the one that I remember? ─► remembered
    my own head        ─► the coordinator remembers it, and would notice if I rewrote my log
    receipts           ─► are they about what my log says I sent? ─► kept

A log that was cut or rewritten is an alarm: both heads are kept, for both are signed, and by the owner's policy this
node takes part in nothing until a person has looked.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from concord_client.control import ControlChannel
from concord_client.home import NodeHome
from concord_client.ledger.ledger import PrivacyLedger
from concord_client.store import NodeStore
from concord_shared.errors import ConflictError, DocumentRefusedError, LogForkedError, UsageError
from concord_shared.evidence.heads import TreeHead, check_grown, coordinator_log, node_log
from concord_shared.evidence.receipts import Receipt
from concord_shared.protocol import RECEIPTS_MAX, HeadSent
from concord_shared.signing import Envelope, PublicKey, open_envelope, read_public_text, seal

__all__ = [
    "Alarm",
    "accept_logs",
    "alarms",
    "coordinator_key",
    "exchange",
    "own_head",
    "remembered_head",
    "take_receipt",
]

Whose = Literal["coordinator", "own"]
HELD = "head/coordinator"
CURSOR = "receipts/cursor"
TAKEN_AT = "head/at"


@dataclass(frozen=True)
class Alarm:
    """whose: which of the two logs. held, shown: the signed heads that contradict each other."""

    whose: Whose
    at: int
    reason: str
    held: Envelope
    shown: Envelope


def coordinator_key(store: NodeStore) -> PublicKey:
    """Raises: DocumentRefusedError: no roster is here yet."""
    roster = store.roster()
    if roster is None:
        raise DocumentRefusedError(
            "this node holds no roster yet, so it cannot tell whose signatures are the coordinator's"
        )
    return read_public_text(roster.coordinator_key)


def own_head(home: NodeHome, store: NodeStore, size: int | None = None) -> TreeHead:
    config = home.config
    return store.log_head(node_log(config.federation, config.organisation, config.node), size)


def remembered_head(store: NodeStore) -> TreeHead | None:
    """The newest head of the coordinator's log that follows from all before."""
    text = store.fact(HELD)
    return None if text is None else TreeHead.from_canonical(Envelope.model_validate_json(text).bytes)


def alarms(store: NodeStore) -> list[Alarm]:
    found = [store.fact(f"alarm/{whose}") for whose in ("coordinator", "own")]
    return [_alarm(text) for text in found if text]


def exchange(home: NodeHome, store: NodeStore, channel: ControlChannel, now: float) -> None:
    """Fetches receipts and the coordinator's head, sends the own one. Everything is checked; nothing is believed.

    Raises:
        LogForkedError: one of the two logs is not the one of before; the alarm is stored.
        DocumentRefusedError: the coordinator's answer is not what it must be.
        UnreachableError, ApiError: the coordinator does not answer.
    """
    key = coordinator_key(store)
    _fetch_receipts(home, store, channel, key, now)
    held = remembered_head(store)
    found = channel.heads(held.size if held else 0)
    head = open_envelope(found.head, TreeHead, [key])
    _check_coordinator(home, store, held, head, found.head, found.proof, now)
    known = _check_remembered(home, store, channel, found.remembered, now)
    mine = own_head(home, store)
    if known is None or mine.size > known.size:
        proof = store.log_grown(known.size, mine.size) if known else ()
        envelope = seal(mine, home.identity_key())
        try:
            channel.send_head(HeadSent(head=envelope, proof=proof))
        except ConflictError as error:
            if error.code != "log-forked":
                raise
            raise _alarmed(store, Alarm("own", int(now), str(error), found.remembered or envelope, envelope)) from error
    store.set_fact(TAKEN_AT, str(int(now)))


def _check_coordinator(
    home: NodeHome,
    store: NodeStore,
    held: TreeHead | None,
    head: TreeHead,
    envelope: Envelope,
    proof: tuple[str, ...],
    now: float,
) -> None:
    wanted = coordinator_log(home.config.federation)
    if held is None:
        if head.log != wanted:
            raise DocumentRefusedError(f"the coordinator shows a head of the log {head.log}, expected {wanted}")
    else:
        try:
            check_grown(held, head, proof)
        except LogForkedError as error:
            text = store.fact(HELD)
            assert text is not None
            alarm = Alarm("coordinator", int(now), f"the coordinator's log: {error}", _read(text), envelope)
            raise _alarmed(store, alarm) from error
    if held is None or head.size > held.size:
        store.set_fact(HELD, envelope.model_dump_json())


def _check_remembered(
    home: NodeHome, store: NodeStore, channel: ControlChannel, envelope: Envelope | None, now: float
) -> TreeHead | None:
    """What the coordinator remembers of this node's log is in it; else this node was put back to an older state."""
    if envelope is None:
        return None
    known = open_envelope(envelope, TreeHead, [home.identity_key().public_key()])
    mine = own_head(home, store)
    if known.log != mine.log:
        raise DocumentRefusedError(f"the coordinator remembers a head of the log {known.log}, expected {mine.log}")
    then = own_head(home, store, known.size) if known.size <= mine.size else mine
    if (then.size, then.root) != (known.size, known.root):
        reason = (
            f"this node's own log is not the one that it signed before: it signed {known.mark[:24]}…, and is at "
            f"{mine.mark[:24]}…. Was an older backup put back?"
        )
        shown = seal(mine, home.identity_key())
        with suppress(ConflictError):  # which is what it will answer, and so its people are told
            channel.send_head(HeadSent(head=shown, proof=()))
        raise _alarmed(store, Alarm("own", int(now), reason, envelope, shown))
    return known


def _fetch_receipts(home: NodeHome, store: NodeStore, channel: ControlChannel, key: PublicKey, now: float) -> None:
    while True:
        after = int(store.fact(CURSOR) or 0)
        found = channel.receipts(after)
        if found.receipts:
            with home.ledger(repairing=True) as ledger:
                for envelope in found.receipts:
                    try:
                        take_receipt(home, store, ledger, envelope, key)
                    except DocumentRefusedError as error:
                        store.refuse(now, "receipt", "receipt", str(error), envelope.model_dump(mode="json"))
        if found.cursor > after:
            store.set_fact(CURSOR, str(found.cursor))
        if len(found.receipts) < RECEIPTS_MAX or found.cursor <= after:
            return


def take_receipt(
    home: NodeHome, store: NodeStore, ledger: PrivacyLedger, envelope: Envelope, key: PublicKey
) -> Receipt:
    """Keeps a receipt after these checks:

    1. the coordinator signed it
    2. it is this node's, of a run whose manifest is held, of that plan, dataset and version
    3. this node's own log says that exactly this was sent, for this step
    4. it names the charge of this node's privacy ledger for that round of training

    Raises:
        DocumentRefusedError: with the check that it failed.
    """
    receipt = open_envelope(envelope, Receipt, [key])
    config, manifest = home.config, store.manifest(receipt.run)
    if (receipt.node, receipt.organisation) != (config.node, config.organisation):
        raise DocumentRefusedError(f"a receipt for {receipt.organisation}/{receipt.node}, not for this node")
    if manifest is None or (manifest.digest, manifest.plan_digest) != (receipt.manifest_digest, receipt.plan_digest):
        raise DocumentRefusedError(f"the receipt for {receipt.step} is not of the manifest that this node holds")
    mine = [each for each in manifest.participants if each.node == config.node]
    if [(each.dataset, each.dataset_version) for each in mine] != [(receipt.dataset, receipt.dataset_version)]:
        raise DocumentRefusedError(f"the receipt for {receipt.step} names another dataset than the manifest")
    names = (f"{receipt.step}/{config.node}", f"{receipt.step}/{config.node}/masked")
    if not any(store.has_sent("reply", name, receipt.sent) for name in names):
        raise DocumentRefusedError(
            f"the receipt for {receipt.step} is for {receipt.sent[:16]}…, which this node's log does not say it sent"
        )
    if receipt.kind == "train" and receipt.charge != ledger.charge_of(receipt.run, receipt.round_number):
        raise DocumentRefusedError(f"the receipt for {receipt.step} names another charge than the ledger")
    store.put_receipt(receipt, envelope)
    return receipt


def accept_logs(store: NodeStore, reason: str) -> list[Alarm]:
    """A person looked: the logs as they are now are the ones to go on from.

    Raises:
        UsageError: there is no alarm.
    """
    found = alarms(store)
    if not found:
        raise UsageError("there is no alarm; nothing was changed")
    for alarm in found:
        store.record("owner", "log:accept", alarm.whose, reason=reason, alarm=alarm.reason)
        if alarm.whose == "coordinator":
            store.set_fact(HELD, alarm.shown.model_dump_json())
        store.drop_fact(f"alarm/{alarm.whose}")
    return found


def _alarmed(store: NodeStore, alarm: Alarm) -> LogForkedError:
    """The first one stays: it is what a person has to look at."""
    name = f"alarm/{alarm.whose}"
    if store.fact(name) is None:
        told = {"whose": alarm.whose, "at": alarm.at, "reason": alarm.reason}
        heads = {"held": alarm.held.model_dump(mode="json"), "shown": alarm.shown.model_dump(mode="json")}
        store.record("node", "log:alarm", alarm.whose, reason=alarm.reason, **heads)
        store.set_fact(name, json.dumps(told | heads))
    return LogForkedError(alarm.reason)


def _alarm(text: str) -> Alarm:
    found = json.loads(text)
    heads = {name: _read(json.dumps(found[name])) for name in ("held", "shown")}
    return Alarm(found["whose"], found["at"], found["reason"], **heads)


def _read(text: str) -> Envelope:
    return Envelope.model_validate_json(text)
