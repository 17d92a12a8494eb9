"""Two words about one Update: the coordinator's, that it took it, and the node's, for what it sent.

The node's word is the signature of its reply (`concord_shared.signed_rounds`), over a statement that binds run, round,
attempt, plan, model and the digest of every block. The coordinator keeps it; the node gets the receipt.
"""

from typing import ClassVar, Literal

from pydantic import Field

from concord_shared.documents import Digest, Id, Seconds
from concord_shared.plan.section import Name
from concord_shared.signing import Document

__all__ = ["Receipt"]


class Receipt(Document):
    """Signed by the coordinator: it took this node's Update, and the round was applied (or the step done) with it.

    sent: the digest of what the node signed, as its own log has it. charge: the digest of the ledger's charge for the
    round, where the plan costs privacy.
    """

    SCHEMA: ClassVar[str] = "concord/receipt/1"
    run: Id
    plan_digest: Digest
    manifest_digest: Digest
    kind: Literal["statistics", "train", "evaluate"]
    round_number: int = Field(ge=0, lt=1 << 31)
    attempt: int = Field(ge=1, lt=1 << 31)
    node: Name
    organisation: Name
    dataset: Name
    dataset_version: Digest
    sent: Digest
    taken_at: Seconds
    charge: Digest | None = None

    @property
    def step(self) -> str:
        return f"{self.run}/{self.kind}/{self.round_number}/{self.attempt}"
