"""The control channel between a node and its coordinator: `/api/trust`, `/api/enrol` and `/api/node/*`.

Every request carries `Concord-Protocol: 1`; another version is refused by name (status 426). All but the first two need
the node's certificate (mTLS). Bodies are JSON of the records below; errors are problem+json.

    GET  /api/trust                          Trust               no certificate; says nothing secret
    POST /api/enrol                          EnrolRequest → EnrolResponse   the token admits, once
    GET  /api/node/updates?after=&wait_s=    Updates             long poll: answers at once when there is something new
    POST /api/node/renew                     RenewRequest → Certificate
    POST /api/node/cards                     Envelope of DatasetCard, or of CardWithdrawal      204
    POST /api/node/approvals                 Envelope of Approval            204
    POST /api/node/preflights                Envelope of PreflightReport     204
    POST /api/node/leave                     Envelope of Leave               204
    POST /api/node/ledger-head               Envelope of LedgerHead          204
    GET  /api/node/ledger-head               LedgerWitness       the newest that this node sent
    GET  /api/node/models/{model_digest}/{file}      the bytes of a released model's file
    GET  /api/node/heads?since=              Heads               of both logs; proves that the coordinator's only grew
    POST /api/node/heads                     HeadSent            204; proves that the node's only grew
    GET  /api/node/receipts?after=           Receipts            for Updates of this node that were taken
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from concord_shared.documents import Count, Digest, NodeState, Seconds
from concord_shared.errors import UsageError
from concord_shared.evidence.merkle import PROOF_MAX
from concord_shared.plan.section import Name
from concord_shared.signing import Document, Envelope, Record

__all__ = [
    "PROTOCOL",
    "PROTOCOL_HEADER",
    "RECEIPTS_MAX",
    "UPDATES_MAX",
    "WAIT_S_MAX",
    "CardWithdrawal",
    "Certificate",
    "EnrolRequest",
    "EnrolResponse",
    "HeadSent",
    "Heads",
    "InvitationLine",
    "LedgerHead",
    "LedgerWitness",
    "Problem",
    "Receipts",
    "RenewRequest",
    "Trust",
    "Update",
    "Updates",
]

PROTOCOL = 1
PROTOCOL_HEADER = "Concord-Protocol"
WAIT_S_MAX = 25
UPDATES_MAX = 100
RECEIPTS_MAX = 500
Pem = Annotated[str, Field(max_length=20_000)]


class Trust(Record):
    """What a node needs to verify everything else; it pins the root key's fingerprint.

    superlink: host:port of Flower's fleet.
    """

    federation: Name
    protocols: tuple[int, ...] = Field(max_length=100)
    root_certificate: Pem
    membership_certificate: Pem
    superlink: str = Field(pattern=r"^[^/\s\x00-\x1f\x7f-\x9f]+:\d{1,5}$", max_length=300)
    now: Seconds


class EnrolRequest(Record):
    """claim: an Envelope of EnrolmentClaim, signed by the identity key *and* by the Flower key.

    request: a PEM certificate request, signed by the TLS key; of it only the key is used.
    """

    token: str = Field(max_length=200)
    claim: Envelope
    request: str = Field(max_length=10_000)


class Certificate(Record):
    """PEM, the node's certificate first, then the membership certificate."""

    chain: Pem


class EnrolResponse(Record):
    certificate: Certificate
    roster: Envelope
    state: NodeState


class RenewRequest(Record):
    request: str = Field(max_length=10_000)


class CardWithdrawal(Document):
    """A node's word that a dataset of its own is gone: its card is shown, agreed on and run with no more."""

    SCHEMA: ClassVar[str] = "concord/card-withdrawal/1"
    node: Name
    organisation: Name
    dataset: Name
    issued_at: Seconds


class LedgerHead(Document):
    """A node's word where its privacy ledger stands: an entry's place and hash. Tells nothing of what was spent."""

    SCHEMA: ClassVar[str] = "concord/ledger-head/1"
    node: Name
    organisation: Name
    sequence: int = Field(ge=1, le=1 << 53)
    hash: str = Field(pattern="^[0-9a-f]{64}$")
    issued_at: Seconds


class LedgerWitness(Record):
    """head: the furthest LedgerHead that the node sent; None where it sent none."""

    head: Envelope | None


UpdateKind = Literal[
    "roster", "trust", "study", "agreement", "withdrawal", "plan", "manifest", "run", "release", "preflight"
]


class Update(Record):
    """One thing that a node should know. body by kind:

    roster, study, manifest, release   an Envelope
    withdrawal                         an Envelope of Withdrawal
    preflight                          an Envelope of PreflightRequest
    agreement                          {"state": …, "envelope": Envelope}; only agreed ones can admit a plan
    trust                              a Trust
    plan                               {"study": Id, "document": the plan's document, "requested_by": organisation}
    run                                {"run": Id, "state": …, "reason": …}: of a run that this node takes part in
    """

    sequence: Count
    kind: UpdateKind
    body: dict[str, Any]


class Updates(Record):
    """state: the node's own; revoked ones get no updates.

    cursor: what to ask for next, which is the last one's sequence; a node goes by what it received.
    """

    updates: tuple[Update, ...] = Field(max_length=UPDATES_MAX)
    cursor: Count
    state: NodeState
    now: Seconds


class Heads(Record):
    """head: an Envelope of the coordinator's TreeHead; proof: that its log begins with the `since` entries asked for.

    remembered: the node's own last head that the coordinator took, None before the first.
    """

    head: Envelope
    proof: tuple[Digest, ...] = Field(max_length=PROOF_MAX)
    remembered: Envelope | None


class HeadSent(Record):
    """head: an Envelope of the node's TreeHead; proof: that its log begins with what the coordinator remembers."""

    head: Envelope
    proof: tuple[Digest, ...] = Field(max_length=PROOF_MAX)


class Receipts(Record):
    """receipts: Envelopes of Receipt, oldest first. cursor: what to ask for next."""

    receipts: tuple[Envelope, ...] = Field(max_length=RECEIPTS_MAX)
    cursor: Count


class Problem(Record):
    """RFC 9457. code: a word to branch on; errors: one line a field, of an invalid request."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = ""
    code: str
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class InvitationLine:
    """`concord://host:port/organisation/node#root.token`: all that a partner needs to enrol, on one line."""

    host: str
    port: int
    organisation: str
    node: str
    root: str
    token: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"concord://{host}:{self.port}/{self.organisation}/{self.node}#{self.root}.{self.token}"

    @classmethod
    def parse(cls, text: str) -> "InvitationLine":
        """Raises: UsageError: not such a line."""
        match = re.fullmatch(
            r"concord://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):(\d{1,5})/([a-z0-9-]+)/([a-z0-9-]+)#([0-9a-f]{64})\.([\w-]{20,200})",
            text.strip(),
        )
        if match is None:
            raise UsageError(
                "not an invitation: expected concord://HOST:PORT/ORGANISATION/NODE#ROOT.TOKEN, whole and on one line; "
                "quote it, for # begins a comment in a shell"
            )
        host, port, organisation, node, root, token = match.groups()
        return cls(host.strip("[]"), int(port), organisation, node, root, token)
