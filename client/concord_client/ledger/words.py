"""What an entry of the privacy ledger says. Entries are only ever added, and each names the hash of the one before.

opened ─► cap (owner)          how much the datasets of a group may tell, together
       ─► reservation          approval + manifest: the whole plan's cost is set aside
       ─► charge               one round of it counts as spent, before its training
       ─► release              its answer left; a mark, nothing is given back
       ─► closing (owner)      no round of a run follows; what it never charged is free again
       ─► gap (owner)          entries were lost: every budget counts as spent
"""

import base64
import math
from typing import Annotated, Any, ClassVar, Literal, Self

from cryptography.exceptions import InvalidSignature
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from concord_shared.documents import Id
from concord_shared.errors import DocumentRefusedError
from concord_shared.plan.section import Name
from concord_shared.signing import Document, PrivateKey, PublicKey, Record, sign_bytes, verify_bytes

__all__ = ["NO_HASH", "Cap", "Charge", "Closing", "Entry", "Gap", "Opened", "Release", "Reservation", "Word"]

NO_HASH = "0" * 64
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _number(value: Any) -> Any:
    """Numbers stand in entries as `float.hex()`, so that what is hashed is exactly what is added up."""
    return float.fromhex(value) if isinstance(value, str) else value


def _finite(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"expected a finite number of at least 0, got {value}")
    return value


Exact = Annotated[
    float, BeforeValidator(_number), AfterValidator(_finite), PlainSerializer(lambda value: (value + 0.0).hex())
]


class Opened(Record):
    """orders: of Rényi divergence; every cost in this ledger is a number for each of them."""

    kind: Literal["opened"] = "opened"
    node: Name
    orders: tuple[Annotated[Exact, Field(gt=1)], ...] = Field(min_length=1, max_length=1000)


class Cap(Record):
    """datasets share records, so they share this budget. order: one of the ledger's; it and delta stay what they are.

    versions: the datasets' content, by which it is known under another name too.
    despite_unbounded: the owner knows that something without a bound left before.
    """

    kind: Literal["cap"] = "cap"
    group: Name
    datasets: tuple[Name, ...] = Field(min_length=1, max_length=1000)
    versions: tuple[Hash, ...] = Field((), max_length=1000)
    epsilon: Annotated[Exact, Field(gt=0)]
    delta: Annotated[Exact, Field(gt=0, lt=1)]
    order: Exact
    despite_unbounded: bool = False


class Reservation(Record):
    """rdp: of one round, at each of the ledger's orders; None where nothing bounds what the plan may tell.

    epsilon, delta: of the whole plan by itself, which is less than its rounds add up to.
    """

    kind: Literal["reservation"] = "reservation"
    run: Id
    study: Id
    plan_digest: Hash
    dataset: Name
    dataset_version: Hash
    rows: int = Field(ge=0)
    rounds: int = Field(ge=1)
    rdp: tuple[Exact, ...] | None = Field(max_length=1000)
    epsilon: Exact | None = None
    delta: Exact | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len({each is None for each in (self.rdp, self.epsilon, self.delta)}) != 1:
            raise ValueError("rdp, epsilon and delta go together")
        return self


class Charge(Record):
    kind: Literal["charge"] = "charge"
    run: Id
    round_number: int = Field(ge=1)


class Release(Record):
    """sha256: of the answer that left."""

    kind: Literal["release"] = "release"
    run: Id
    round_number: int = Field(ge=1)
    sha256: Hash


class Closing(Record):
    kind: Literal["closing"] = "closing"
    run: Id
    reason: str = Field("", max_length=2000)


class Gap(Record):
    """The ledger once stood at an entry that is not here any more: what followed is unknown, so all of it is spent."""

    kind: Literal["gap"] = "gap"
    known_sequence: int = Field(ge=0)
    known_hash: Hash


Word = Annotated[Opened | Cap | Reservation | Charge | Release | Closing | Gap, Field(discriminator="kind")]
OWNERS = (Cap, Closing, Gap)
"""Words that only the owner may say: signed with the node's identity key, by the owner's command."""


class Entry(Document):
    """Its digest is the hash that the next entry names. by, signature: of the owner's words."""

    SCHEMA: ClassVar[str] = "concord/ledger-entry/1"
    sequence: int = Field(ge=1)
    at: int = Field(ge=0)
    previous: Hash
    word: Word
    by: str = Field("", max_length=200)
    signature: str = Field("", max_length=200)

    def signed(self, key: PrivateKey) -> "Entry":
        return self.model_copy(update={"signature": base64.b64encode(sign_bytes(key, self._signed_bytes)).decode()})

    def check_signature(self, key: PublicKey) -> None:
        """Raises: DocumentRefusedError: an owner's word without the owner's signature, or another's with one."""
        if not isinstance(self.word, OWNERS):
            if self.signature or self.by:
                raise DocumentRefusedError(f"a {self.word.kind} is nobody's word, it has no signature")
            return
        try:
            verify_bytes(key, base64.b64decode(self.signature, validate=True), self._signed_bytes)
        except (ValueError, InvalidSignature) as error:
            raise DocumentRefusedError(f"the {self.word.kind} is not signed by this node's owner") from error

    @property
    def _signed_bytes(self) -> bytes:
        return self.SCHEMA.encode() + b"\0" + self.model_copy(update={"signature": ""}).canonical
