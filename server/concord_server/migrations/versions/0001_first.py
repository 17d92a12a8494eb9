"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "audit_event",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_event")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("audit_event", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_audit_event_action"), ["action"], unique=False)
        batch_op.create_index(batch_op.f("ix_audit_event_actor"), ["actor"], unique=False)
        batch_op.create_index(batch_op.f("ix_audit_event_subject"), ["subject"], unique=False)

    op.create_table(
        "idempotent_request",
        sa.Column("person", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("request", sa.String(), nullable=False),
        sa.Column("response", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("person", "key", name=op.f("pk_idempotent_request")),
    )
    with op.batch_alter_table("idempotent_request", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_idempotent_request_created_at"), ["created_at"], unique=False)

    op.create_table(
        "organisation",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("title", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_organisation")),
    )
    op.create_table(
        "plan",
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_plan")),
    )
    op.create_table(
        "roster_version",
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("envelope", sa.JSON(), nullable=False),
        sa.Column("issued_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("version", name=op.f("pk_roster_version")),
    )
    op.create_table(
        "invitation",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("organisation", sa.String(), nullable=False),
        sa.Column("node", sa.String(), nullable=False),
        sa.Column("token_digest", sa.String(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["organisation"], ["organisation.name"], name=op.f("fk_invitation_organisation_organisation")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_invitation")),
        sa.UniqueConstraint("token_digest", name=op.f("uq_invitation_token_digest")),
    )
    with op.batch_alter_table("invitation", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_invitation_node"), ["node"], unique=False)

    op.create_table(
        "node",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("organisation", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("identity_key", sa.String(), nullable=False),
        sa.Column("flower_key", sa.String(), nullable=False),
        sa.Column("tls_key", sa.String(), nullable=False),
        sa.Column("tls_key_next", sa.String(), nullable=True),
        sa.Column("certificate_serial", sa.String(), nullable=False),
        sa.Column("certificate_not_after", sa.DateTime(timezone=True), nullable=False),
        sa.Column("enrolled_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_seen_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("delivered", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["organisation"], ["organisation.name"], name=op.f("fk_node_organisation_organisation")
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_node")),
        sa.UniqueConstraint("flower_key", name=op.f("uq_node_flower_key")),
        sa.UniqueConstraint("identity_key", name=op.f("uq_node_identity_key")),
        sa.UniqueConstraint("tls_key", name=op.f("uq_node_tls_key")),
        sa.UniqueConstraint("tls_key_next", name=op.f("uq_node_tls_key_next")),
    )
    with op.batch_alter_table("node", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_node_organisation"), ["organisation"], unique=False)
        batch_op.create_index(batch_op.f("ix_node_state"), ["state"], unique=False)

    op.create_table(
        "person",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("organisation", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["organisation"], ["organisation.name"], name=op.f("fk_person_organisation_organisation")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_person")),
        sa.UniqueConstraint("name", name=op.f("uq_person_name")),
    )
    op.create_table(
        "study",
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("organisation", sa.String(), nullable=False),
        sa.Column("title", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("envelope", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["organisation"], ["organisation.name"], name=op.f("fk_study_organisation_organisation")
        ),
        sa.PrimaryKeyConstraint("study", name=op.f("pk_study")),
    )
    with op.batch_alter_table("study", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_study_organisation"), ["organisation"], unique=False)

    op.create_table(
        "agreement",
        sa.Column("agreement", sa.String(), nullable=False),
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("requester", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("envelope", sa.JSON(), nullable=False),
        sa.Column("withdrawal", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["owner"], ["organisation.name"], name=op.f("fk_agreement_owner_organisation")),
        sa.ForeignKeyConstraint(["requester"], ["organisation.name"], name=op.f("fk_agreement_requester_organisation")),
        sa.ForeignKeyConstraint(["study"], ["study.study"], name=op.f("fk_agreement_study_study")),
        sa.PrimaryKeyConstraint("agreement", name=op.f("pk_agreement")),
    )
    with op.batch_alter_table("agreement", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_agreement_owner"), ["owner"], unique=False)
        batch_op.create_index(batch_op.f("ix_agreement_requester"), ["requester"], unique=False)
        batch_op.create_index(batch_op.f("ix_agreement_study"), ["study"], unique=False)

    op.create_table(
        "api_token",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("person", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("title", sa.String(), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["person"], ["person.id"], name=op.f("fk_api_token_person_person")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_token")),
        sa.UniqueConstraint("digest", name=op.f("uq_api_token_digest")),
    )
    with op.batch_alter_table("api_token", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_api_token_person"), ["person"], unique=False)

    op.create_table(
        "approval",
        sa.Column("node", sa.String(), nullable=False),
        sa.Column("dataset", sa.String(), nullable=False),
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("plan_digest", sa.String(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("decision", sa.String(), nullable=False),
        sa.Column("dataset_version", sa.String(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("evaluation_rows", sa.BigInteger(), nullable=False),
        sa.Column("not_after", sa.BigInteger(), nullable=False),
        sa.Column("envelope", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["node"], ["node.name"], name=op.f("fk_approval_node_node")),
        sa.ForeignKeyConstraint(["plan_digest"], ["plan.digest"], name=op.f("fk_approval_plan_digest_plan")),
        sa.ForeignKeyConstraint(["study"], ["study.study"], name=op.f("fk_approval_study_study")),
        sa.PrimaryKeyConstraint("node", "dataset", "study", "plan_digest", "sequence", name=op.f("pk_approval")),
    )
    with op.batch_alter_table("approval", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_approval_study"), ["study"], unique=False)

    op.create_table(
        "dataset_card",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("node", sa.String(), nullable=False),
        sa.Column("dataset", sa.String(), nullable=False),
        sa.Column("organisation", sa.String(), nullable=False),
        sa.Column("title", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("issued_at", sa.BigInteger(), nullable=False),
        sa.Column("envelope", sa.JSON(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["node"], ["node.name"], name=op.f("fk_dataset_card_node_node")),
        sa.ForeignKeyConstraint(
            ["organisation"], ["organisation.name"], name=op.f("fk_dataset_card_organisation_organisation")
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_dataset_card")),
    )
    with op.batch_alter_table("dataset_card", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_dataset_card_node"), ["node"], unique=False)
        batch_op.create_index(batch_op.f("ix_dataset_card_organisation"), ["organisation"], unique=False)

    op.create_table(
        "node_update",
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("node", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["node"], ["node.name"], name=op.f("fk_node_update_node_node")),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_node_update")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("node_update", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_node_update_node"), ["node"], unique=False)

    op.create_table(
        "role_grant",
        sa.Column("person", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("organisation", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["person"], ["person.id"], name=op.f("fk_role_grant_person_person")),
        sa.PrimaryKeyConstraint("person", "role", "organisation", name=op.f("pk_role_grant")),
    )
    op.create_table(
        "run",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("plan_digest", sa.String(), nullable=False),
        sa.Column("organisation", sa.String(), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=False),
        sa.Column("admitted", sa.JSON(), nullable=False),
        sa.Column("start_model", sa.String(), nullable=True),
        sa.Column("not_before", sa.BigInteger(), nullable=False),
        sa.Column("not_after", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("waiting_for", sa.JSON(), nullable=False),
        sa.Column("awaited", sa.JSON(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("served_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lease_owner", sa.String(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("fruitless", sa.Integer(), nullable=False),
        sa.Column("stop_requested", sa.Boolean(), nullable=False),
        sa.Column("checkpoint", sa.JSON(), nullable=True),
        sa.Column("summary", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["organisation"], ["organisation.name"], name=op.f("fk_run_organisation_organisation")),
        sa.ForeignKeyConstraint(["plan_digest"], ["plan.digest"], name=op.f("fk_run_plan_digest_plan")),
        sa.ForeignKeyConstraint(["study"], ["study.study"], name=op.f("fk_run_study_study")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run")),
        sa.UniqueConstraint("sequence", name=op.f("uq_run_sequence")),
    )
    with op.batch_alter_table("run", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_run_organisation"), ["organisation"], unique=False)
        batch_op.create_index(batch_op.f("ix_run_plan_digest"), ["plan_digest"], unique=False)
        batch_op.create_index(batch_op.f("ix_run_state"), ["state"], unique=False)
        batch_op.create_index(batch_op.f("ix_run_study"), ["study"], unique=False)

    op.create_table(
        "study_member",
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("organisation", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["study"], ["study.study"], name=op.f("fk_study_member_study_study")),
        sa.PrimaryKeyConstraint("study", "organisation", name=op.f("pk_study_member")),
    )
    with op.batch_alter_table("study_member", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_study_member_organisation"), ["organisation"], unique=False)

    op.create_table(
        "study_plan",
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("plan_digest", sa.String(), nullable=False),
        sa.Column("requested_by", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["plan_digest"], ["plan.digest"], name=op.f("fk_study_plan_plan_digest_plan")),
        sa.ForeignKeyConstraint(
            ["requested_by"], ["organisation.name"], name=op.f("fk_study_plan_requested_by_organisation")
        ),
        sa.ForeignKeyConstraint(["study"], ["study.study"], name=op.f("fk_study_plan_study_study")),
        sa.PrimaryKeyConstraint("study", "plan_digest", name=op.f("pk_study_plan")),
    )
    with op.batch_alter_table("study_plan", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_study_plan_plan_digest"), ["plan_digest"], unique=False)

    op.create_table(
        "agreement_dataset",
        sa.Column("agreement", sa.String(), nullable=False),
        sa.Column("node", sa.String(), nullable=False),
        sa.Column("dataset", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["agreement"], ["agreement.agreement"], name=op.f("fk_agreement_dataset_agreement_agreement")
        ),
        sa.ForeignKeyConstraint(["node"], ["node.name"], name=op.f("fk_agreement_dataset_node_node")),
        sa.PrimaryKeyConstraint("agreement", "node", "dataset", name=op.f("pk_agreement_dataset")),
    )
    op.create_table(
        "model_version",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("run", sa.String(), nullable=False),
        sa.Column("plan_digest", sa.String(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("final", sa.Boolean(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["plan_digest"], ["plan.digest"], name=op.f("fk_model_version_plan_digest_plan")),
        sa.ForeignKeyConstraint(["run"], ["run.id"], name=op.f("fk_model_version_run_run")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_version")),
        sa.UniqueConstraint("digest", "run", name=op.f("uq_model_version_digest_run")),
    )
    with op.batch_alter_table("model_version", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_model_version_run"), ["run"], unique=False)

    op.create_table(
        "release",
        sa.Column("model_digest", sa.String(), nullable=False),
        sa.Column("run", sa.String(), nullable=False),
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("organisation", sa.String(), nullable=False),
        sa.Column("envelope", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["organisation"], ["organisation.name"], name=op.f("fk_release_organisation_organisation")
        ),
        sa.ForeignKeyConstraint(["run"], ["run.id"], name=op.f("fk_release_run_run")),
        sa.ForeignKeyConstraint(["study"], ["study.study"], name=op.f("fk_release_study_study")),
        sa.PrimaryKeyConstraint("model_digest", "run", name=op.f("pk_release")),
    )
    with op.batch_alter_table("release", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_release_study"), ["study"], unique=False)

    op.create_table(
        "round",
        sa.Column("run", sa.String(), nullable=False),
        sa.Column("index", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("record", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["run.id"], name=op.f("fk_round_run_run")),
        sa.PrimaryKeyConstraint("run", "index", name=op.f("pk_round")),
    )


def downgrade() -> None:
    op.drop_table("round")
    with op.batch_alter_table("release", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_release_study"))

    op.drop_table("release")
    with op.batch_alter_table("model_version", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_model_version_run"))

    op.drop_table("model_version")
    op.drop_table("agreement_dataset")
    with op.batch_alter_table("study_plan", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_study_plan_plan_digest"))

    op.drop_table("study_plan")
    with op.batch_alter_table("study_member", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_study_member_organisation"))

    op.drop_table("study_member")
    with op.batch_alter_table("run", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_run_study"))
        batch_op.drop_index(batch_op.f("ix_run_state"))
        batch_op.drop_index(batch_op.f("ix_run_plan_digest"))
        batch_op.drop_index(batch_op.f("ix_run_organisation"))

    op.drop_table("run")
    op.drop_table("role_grant")
    with op.batch_alter_table("node_update", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_node_update_node"))

    op.drop_table("node_update")
    with op.batch_alter_table("dataset_card", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_dataset_card_organisation"))
        batch_op.drop_index(batch_op.f("ix_dataset_card_node"))

    op.drop_table("dataset_card")
    with op.batch_alter_table("approval", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_approval_study"))

    op.drop_table("approval")
    with op.batch_alter_table("api_token", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_api_token_person"))

    op.drop_table("api_token")
    with op.batch_alter_table("agreement", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_agreement_study"))
        batch_op.drop_index(batch_op.f("ix_agreement_requester"))
        batch_op.drop_index(batch_op.f("ix_agreement_owner"))

    op.drop_table("agreement")
    with op.batch_alter_table("study", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_study_organisation"))

    op.drop_table("study")
    op.drop_table("person")
    with op.batch_alter_table("node", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_node_state"))
        batch_op.drop_index(batch_op.f("ix_node_organisation"))

    op.drop_table("node")
    with op.batch_alter_table("invitation", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_invitation_node"))

    op.drop_table("invitation")
    op.drop_table("roster_version")
    op.drop_table("plan")
    op.drop_table("organisation")
    with op.batch_alter_table("idempotent_request", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_idempotent_request_created_at"))

    op.drop_table("idempotent_request")
    with op.batch_alter_table("audit_event", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_audit_event_subject"))
        batch_op.drop_index(batch_op.f("ix_audit_event_actor"))
        batch_op.drop_index(batch_op.f("ix_audit_event_action"))

    op.drop_table("audit_event")
