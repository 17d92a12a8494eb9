"""Preflights: what was asked of nodes before a run, and what they answered."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "preflight",
        sa.Column("preflight", sa.String(), nullable=False),
        sa.Column("study", sa.String(), nullable=False),
        sa.Column("plan_digest", sa.String(), nullable=False),
        sa.Column("organisation", sa.String(), nullable=False),
        sa.Column("not_after", sa.BigInteger(), nullable=False),
        sa.Column("envelope", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["organisation"], ["organisation.name"], name=op.f("fk_preflight_organisation_organisation")
        ),
        sa.ForeignKeyConstraint(["plan_digest"], ["plan.digest"], name=op.f("fk_preflight_plan_digest_plan")),
        sa.ForeignKeyConstraint(["study"], ["study.study"], name=op.f("fk_preflight_study_study")),
        sa.PrimaryKeyConstraint("preflight", name=op.f("pk_preflight")),
    )
    with op.batch_alter_table("preflight", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_preflight_created_at"), ["created_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_preflight_study"), ["study"], unique=False)
    op.create_table(
        "preflight_report",
        sa.Column("preflight", sa.String(), nullable=False),
        sa.Column("node", sa.String(), nullable=False),
        sa.Column("envelope", sa.JSON(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["node"], ["node.name"], name=op.f("fk_preflight_report_node_node")),
        sa.ForeignKeyConstraint(
            ["preflight"], ["preflight.preflight"], name=op.f("fk_preflight_report_preflight_preflight")
        ),
        sa.PrimaryKeyConstraint("preflight", "node", name=op.f("pk_preflight_report")),
    )


def downgrade() -> None:
    op.drop_table("preflight_report")
    op.drop_table("preflight")
