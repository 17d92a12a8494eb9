"""The audit log is chained, has a Merkle tree, and only grows; heads of nodes' logs; receipts for Updates.

Events that are there already are numbered without gaps and chained as they are now: nothing is proven of the time
before.
"""

import json
from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

from concord_shared.evidence.log import GENESIS, Entry, chained

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLES = ("audit_event", "audit_subtree")
REFUSED = "the audit log only grows"


def upgrade() -> None:
    op.create_table(
        "audit_subtree",
        sa.Column("level", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("level", "index", name=op.f("pk_audit_subtree")),
    )
    op.create_table(
        "node_head",
        sa.Column("node", sa.String(), nullable=False),
        sa.Column("identity_key", sa.String(), nullable=False),
        sa.Column("head", sa.JSON(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("alarm", sa.String(), nullable=False),
        sa.Column("offered", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["node"], ["node.name"], name=op.f("fk_node_head_node_node")),
        sa.PrimaryKeyConstraint("node", name=op.f("pk_node_head")),
    )
    op.create_table(
        "receipt",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("run", sa.String(), nullable=False),
        sa.Column("node", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("statement", sa.String(), nullable=False),
        sa.Column("signature", sa.String(), nullable=False),
        sa.Column("envelope", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["node"], ["node.name"], name=op.f("fk_receipt_node_node")),
        sa.ForeignKeyConstraint(["run"], ["run.id"], name=op.f("fk_receipt_run_run")),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_receipt")),
    )
    with op.batch_alter_table("receipt", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_receipt_node"), ["node"], unique=False)
        batch_op.create_index(batch_op.f("ix_receipt_run"), ["run"], unique=False)
    with op.batch_alter_table("audit_event", schema=None) as batch_op:
        batch_op.add_column(sa.Column("hash", sa.String(), nullable=False, server_default=""))
    _chain()
    with op.batch_alter_table("audit_event", schema=None) as batch_op:
        batch_op.alter_column("hash", server_default=None)
    for table in TABLES:
        _close(table)


def downgrade() -> None:
    for table in TABLES:
        _open(table)
    with op.batch_alter_table("audit_event", schema=None) as batch_op:
        batch_op.drop_column("hash")
    op.drop_table("receipt")
    op.drop_table("node_head")
    op.drop_table("audit_subtree")


def _chain() -> None:
    connection = op.get_bind()
    rows = connection.execute(sa.text("SELECT id, at, actor, action, subject, detail FROM audit_event ORDER BY id"))
    stored: dict[tuple[int, int], bytes] = {}
    before = GENESIS
    for sequence, row in enumerate(rows.fetchall(), 1):
        detail = json.loads(row.detail) if isinstance(row.detail, str) else row.detail
        entry = Entry(
            sequence=sequence,
            at=_moment(row.at),
            actor=row.actor,
            action=row.action,
            subject=row.subject,
            detail=detail,
        )
        before, above = chained(entry, before, lambda level, index: stored[level, index])
        stored[0, sequence - 1] = before
        connection.execute(
            sa.text("UPDATE audit_event SET id = :id, hash = :hash WHERE id = :was"),
            {"id": sequence, "hash": before.hex(), "was": row.id},
        )
        for level, index, found in above:
            stored[level, index] = found
            connection.execute(
                sa.text('INSERT INTO audit_subtree (level, "index", hash) VALUES (:level, :index, :hash)'),
                {"level": level, "index": index, "hash": found.hex()},
            )


def _moment(at: datetime | str) -> str:
    """SQLite gives text without a zone, which is UTC."""
    found = datetime.fromisoformat(at) if isinstance(at, str) else at
    found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    return found.isoformat(timespec="microseconds")


def _close(table: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("update", "delete"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb.upper()} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{REFUSED}'); END"
            )
        return
    op.execute(
        f"CREATE FUNCTION {table}_only_grows() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{REFUSED}' USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )
    for verb, each in (("UPDATE OR DELETE", "ROW"), ("TRUNCATE", "STATEMENT")):
        name = f"{table}_no_{verb.partition(' ')[0].lower()}"
        op.execute(
            f"CREATE TRIGGER {name} BEFORE {verb} ON {table} FOR EACH {each} EXECUTE FUNCTION {table}_only_grows()"
        )


def _open(table: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("update", "delete"):
            op.execute(f"DROP TRIGGER {table}_no_{verb}")
        return
    for verb in ("update", "truncate"):
        op.execute(f"DROP TRIGGER {table}_no_{verb} ON {table}")
    op.execute(f"DROP FUNCTION {table}_only_grows()")
