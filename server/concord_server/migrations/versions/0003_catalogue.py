"""What dataset cards are searched by stands beside them."""

import base64
import json
import unicodedata
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

NEW: dict[str, Any] = {
    "rows": sa.BigInteger(),
    "input": sa.String(),
    "licence": sa.String(),
    "words": sa.String(),
    "columns": sa.String(),
    "purposes": sa.String(),
    "told": sa.JSON(),
}


def upgrade() -> None:
    with op.batch_alter_table("dataset_card", schema=None) as batch_op:
        for name, kind in NEW.items():
            empty = {"rows": "0", "told": "{}"}.get(name, "")
            batch_op.add_column(sa.Column(name, kind, nullable=False, server_default=empty))
    _index()
    with op.batch_alter_table("dataset_card", schema=None) as batch_op:
        for name in NEW:
            batch_op.alter_column(name, server_default=None)


def downgrade() -> None:
    with op.batch_alter_table("dataset_card", schema=None) as batch_op:
        for name in reversed(NEW):
            batch_op.drop_column(name)


def _index() -> None:
    """Cards of before had neither keywords nor terms."""
    connection = op.get_bind()
    for row in connection.execute(sa.text("SELECT name, envelope FROM dataset_card")).fetchall():
        envelope = json.loads(row.envelope) if isinstance(row.envelope, str) else row.envelope
        card = json.loads(base64.b64decode(envelope["payload"]))
        said = [row.name, card["organisation"], card["title"], card["description"], *card["columns"]]
        columns = "".join(f"{_folded(each)}\n" for each in card["columns"])
        connection.execute(
            sa.text(
                'UPDATE dataset_card SET "rows" = :rows, input = :input, licence = :licence, words = :words, '
                "columns = :columns, told = :told WHERE name = :name"
            ),
            {
                "name": row.name,
                "rows": card["rows"],
                "input": card["input"],
                "licence": card["licence"],
                "words": "\n".join(_folded(each) for each in said),
                "columns": f"\n{columns}" if columns else "",
                "told": json.dumps(
                    {key: card[key] for key in ("title", "rows")} | {"rows_told": "", "keywords": [], "languages": []}
                ),
            },
        )


def _folded(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(letter if letter.isprintable() else " " for letter in folded).split())
