"""What partners and coordinator sign and exchange, outside of rounds. `architecture.md`'s words, one class each.

    Roster       the membership key     who belongs to the federation, with which keys
    DatasetCard  the node               what others may know of a dataset
    Study        its organisation       a purpose
    Agreement    both organisations     which datasets may serve a study, on which terms
    Withdrawal   the owner              the end of an agreement
    Approval     the node               a person's word (or the policy's) on one plan, dataset and study
    RunManifest  its organisation       one run of a plan, with the nodes that take part
    Release      its organisation       a trained model, cleared for use

Every name is `Name`; ids are made by their signer and unique in a federation.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from concord_shared.plan.section import Name, is_empty
from concord_shared.signing import Document, Record

__all__ = [
    "Agreement",
    "Approval",
    "CardColumn",
    "DataTerms",
    "DatasetCard",
    "Decision",
    "EnrolmentClaim",
    "Leave",
    "ModelFile",
    "NodeState",
    "Output",
    "Participant",
    "Quality",
    "Release",
    "Roster",
    "RosterNode",
    "RosterOrganisation",
    "RunManifest",
    "Study",
    "Terms",
    "Withdrawal",
]

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Id = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9-]{0,62}$")]
Seconds = Annotated[int, Field(ge=0, lt=1 << 40)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Version = Annotated[int, Field(ge=1, lt=1 << 63)]
Key = Annotated[str, Field(min_length=16, max_length=400)]
Line = Annotated[str, Field(max_length=300)]
Text = Annotated[str, Field(max_length=4000)]
Word = Annotated[str, Field(min_length=1, max_length=60)]
Number = Annotated[str, Field(pattern=r"^-?[0-9]{1,18}(\.[0-9]{1,18})?$")]
"""A decimal as people write it: documents hold no floats."""
Figure = Annotated[str, Field(pattern=r"^(<[0-9]{1,6}|(100|[0-9]{1,2})%)?$")]
"""A share of rows, coarsened: `15%`; `<10`, fewer than ten rows and perhaps none; empty, not told."""
Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]{1,8}){0,4}$")]
Output = Literal["release", "commercial"]
"""What may be made of a trained model: a release for the study's members; commercial use."""
NodeState = Literal["invited", "enrolled", "active", "suspended", "revoked"]
Decision = Literal["approved", "rejected", "withdrawn"]
NODES_MAX = 10_000


class RosterOrganisation(Record):
    """key: the organisation's own Ed25519 key, once its people registered it."""

    name: Name
    key: Key | None = None


class RosterNode(Record):
    """One row, four things that belong together: name, TLS name (spiffe), Ed25519 identity and Flower key."""

    name: Name
    organisation: Name
    state: NodeState
    identity_key: Key
    flower_key: Key

    def spiffe(self, federation: str) -> str:
        return f"spiffe://{federation}/{self.organisation}/{self.name}"


class Roster(Document):
    """Version counts up by one; a node logs every version and refuses an older one.

    coordinator_key: the Ed25519 key that signs the offers of rounds.
    """

    SCHEMA: ClassVar[str] = "concord/roster/1"
    federation: Name
    version: Version
    issued_at: Seconds
    coordinator_key: Key
    organisations: tuple[RosterOrganisation, ...] = Field(max_length=NODES_MAX)
    nodes: tuple[RosterNode, ...] = Field(max_length=NODES_MAX)


class EnrolmentClaim(Document):
    """Signed by the node's new identity key: proof that whoever holds the token also holds the keys."""

    SCHEMA: ClassVar[str] = "concord/enrolment/1"
    federation: Name
    organisation: Name
    node: Name
    token_digest: Digest
    tls_key: Key
    identity_key: Key
    flower_key: Key
    issued_at: Seconds


class CardColumn(Record):
    """A column as its owner chose to describe it. range and categories are those of a contract or the owner's word,
    never read from rows.
    """

    name: Line
    kind: Literal["number", "category", "text", ""] = ""
    unit: Annotated[str, Field(max_length=40)] = ""
    range: tuple[Number, Number] | None = None
    categories: tuple[Line, ...] = Field((), max_length=1000)
    description: Line = ""


class Quality(Record):
    """Measured at the node over the rows of the card's version. minimum: rows below which a figure says only that.

    missing: by column. duplicates: rows that repeat another one. largest_class, smallest_class: of all rows.
    suspect_labels: rows whose label a model that never saw them contradicts.
    """

    minimum: int = Field(ge=2, lt=1_000_000)
    missing: dict[Line, Figure] = Field({}, max_length=10_000)
    duplicates: Figure = ""
    largest_class: Figure = ""
    smallest_class: Figure = ""
    suspect_labels: Figure = ""


class DataTerms(Record):
    """The ceiling that the owner's node holds every agreement and every plan to. What is empty is not restricted.

    purposes: an agreement names at least one of them, and no other. who: organisations that may ask and start runs.
    not_after: the latest end of an agreement. epsilon: of a whole run, so plans need differential privacy of the
    node's own. outputs: what an agreement may allow to be made of models; None for not restricted, () for nothing.
    """

    purposes: tuple[Name, ...] = Field((), max_length=100)
    who: tuple[Name, ...] = Field((), max_length=1000)
    not_after: Seconds = 0
    minimum_cohort: int = Field(0, ge=0, le=NODES_MAX)
    epsilon: Literal[""] | Number = ""
    outputs: tuple[Output, ...] | None = Field(None, max_length=2)


class DatasetCard(Document):
    """What the owner chose to tell. dataset_version: the content hash at registration.

    rows_told: "" for the exact number, "about" for a rounded one, "fewer" for fewer than `rows`. details: of some
    `columns`. licence: an SPDX expression. languages: BCP 47.
    """

    SCHEMA: ClassVar[str] = "concord/dataset-card/1"
    node: Name
    organisation: Name
    dataset: Name
    dataset_version: Digest
    title: Line
    description: Text = ""
    rows: Count
    rows_told: Literal["", "about", "fewer"] = Field("", exclude_if=is_empty)
    input: Literal["image", "table", "text", "array"]
    columns: tuple[Line, ...] = Field((), max_length=10_000)
    details: tuple[CardColumn, ...] = Field((), max_length=10_000, exclude_if=is_empty)
    keywords: tuple[Word, ...] = Field((), max_length=50, exclude_if=is_empty)
    languages: tuple[Language, ...] = Field((), max_length=20, exclude_if=is_empty)
    quality: Quality | None = Field(None, exclude_if=is_empty)
    terms: DataTerms | None = Field(None, exclude_if=is_empty)
    licence: Line = ""
    issued_at: Seconds


class Study(Document):
    """members: organisations that may see the study and start runs of its plans."""

    SCHEMA: ClassVar[str] = "concord/study/1"
    study: Id
    title: Line
    purpose: Text
    organisation: Name
    members: tuple[Name, ...] = Field(max_length=1000)
    issued_at: Seconds


class Terms(Record):
    """The node enforces them, and holds them under the terms of its dataset's card; `use` is words for people.

    models: names that plans may use, empty for any that the node has installed. purposes, outputs: what the data and
    the model are for; None where outputs are not spoken of.
    """

    minimum_cohort: int = Field(2, ge=1, le=NODES_MAX)
    rounds_max: int = Field(1000, ge=1, lt=1 << 31)
    models: tuple[Line, ...] = Field((), max_length=1000)
    not_after: Seconds
    use: Text = ""
    purposes: tuple[Name, ...] = Field((), max_length=100, exclude_if=is_empty)
    outputs: tuple[Output, ...] | None = Field(None, max_length=2, exclude_if=lambda given: given is None)


class Agreement(Document):
    """requested (signed by the requester) → offered (terms set and signed by the owner) → agreed (both signatures over
    the same bytes) → withdrawn (the owner's word alone). datasets: `node/dataset`.
    """

    SCHEMA: ClassVar[str] = "concord/agreement/1"
    agreement: Id
    study: Id
    study_digest: Digest
    requester: Name
    owner: Name
    datasets: tuple[Line, ...] = Field(min_length=1, max_length=1000)
    terms: Terms
    issued_at: Seconds


class Withdrawal(Document):
    """The end of an agreement, which its owner may declare alone and at any time. organisation: the owner."""

    SCHEMA: ClassVar[str] = "concord/withdrawal/1"
    agreement: Id
    organisation: Name
    reason: Text = ""
    issued_at: Seconds


class Approval(Document):
    """A node's word on one plan digest × dataset × study. sequence: a later one replaces an earlier one.

    rows, evaluation_rows: what the plan's split of this dataset has for training and for evaluation; the coordinator
    checks each reply's weight against them. 0 unless approved.
    """

    SCHEMA: ClassVar[str] = "concord/approval/1"
    node: Name
    organisation: Name
    dataset: Name
    dataset_version: Digest
    study: Id
    plan_digest: Digest
    decision: Decision
    reason: Text = ""
    decided_by: Line
    rows: Count = 0
    evaluation_rows: Count = 0
    sequence: Version
    issued_at: Seconds
    not_after: Seconds


class Participant(Record):
    node: Name
    organisation: Name
    dataset: Name
    dataset_version: Digest


class RunManifest(Document):
    """One run of a plan. The cohort of round r is a public function of plan, participants and cohort_seed.

    start_model: the digest of the model version to start from, or None for the plan's seeded model.
    """

    SCHEMA: ClassVar[str] = "concord/run-manifest/1"
    run: Id
    study: Id
    plan_digest: Digest
    organisation: Name
    roster_version: Version
    participants: tuple[Participant, ...] = Field(min_length=1, max_length=NODES_MAX)
    cohort_seed: int = Field(ge=0, lt=1 << 63)
    start_model: Digest | None = None
    versions: dict[Line, Line] = Field(max_length=100)
    nonce: Digest
    not_before: Seconds
    not_after: Seconds


class ModelFile(Record):
    name: Line
    sha256: Digest
    size: Count


class Release(Document):
    """metrics: as text, of the run's last evaluation over all nodes."""

    SCHEMA: ClassVar[str] = "concord/release/1"
    model_digest: Digest
    plan_digest: Digest
    study: Id
    run: Id
    organisation: Name
    files: tuple[ModelFile, ...] = Field(min_length=1, max_length=16)
    metrics: dict[Line, Line] = Field(max_length=100)
    issued_at: Seconds


class Leave(Document):
    """A node's own end: the coordinator revokes it at once."""

    SCHEMA: ClassVar[str] = "concord/leave/1"
    node: Name
    reason: Text = ""
    issued_at: Seconds
