"""What a table of this node looks like: inferred from its rows, corrected by its owner.

Ranges and categories are values of the data: they are shown to the owner and written to the owner's own file, and
never stored in the node's database or sent.
"""

from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import Field, model_validator

from concord_shared.errors import UsageError
from concord_shared.files import write_atomically
from concord_shared.plan.section import Section

__all__ = ["DatasetSchema", "SchemaColumn", "check_correction", "write_schema"]

HEADER = """\
# What the node inferred of dataset {name}. It stays on this machine. Correct what is wrong: above all, say the unit of
# each number, as in unit = "mmol/L". Then: concord-node data schema {name} --edit-with {file}

"""


class SchemaColumn(Section):
    """unit: the owner's statement; "" where it is unknown. missing: how many rows have no value."""

    name: str = Field(min_length=1)
    kind: Literal["number", "category", "text"]
    unit: str = Field("", max_length=40)
    missing: int = Field(0, ge=0)
    range: tuple[float, float] | None = None
    categories: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind != "number" and (self.unit or self.range):
            raise ValueError(f"column {self.name}: a unit and a range belong to numbers")
        return self


class DatasetSchema(Section):
    """encoding: of a file of text; "" where the format has types of its own. target: what looks like one."""

    rows: int = Field(ge=0)
    encoding: str = ""
    target: str = ""
    columns: tuple[SchemaColumn, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names):
            raise ValueError("column names are unique")
        if self.target and self.target not in names:
            raise ValueError("the target is one of the columns")
        return self

    @property
    def units(self) -> dict[str, str]:
        """Of the columns whose unit the owner stated."""
        return {column.name: column.unit for column in self.columns if column.unit}

    def without_values(self) -> "DatasetSchema":
        """What is stored: names, kinds, units and counts."""
        columns = tuple(column.model_copy(update={"range": None, "categories": ()}) for column in self.columns)
        return self.model_copy(update={"columns": columns})


def write_schema(path: Path, name: str, schema: DatasetSchema) -> None:
    """For its owner to read and to correct."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    table: dict[str, Any] = schema.model_dump(exclude_none=True)
    for column in table["columns"]:
        if not column["categories"]:
            del column["categories"]
    write_atomically(path, HEADER.format(name=name, file=path) + tomli_w.dumps(table, multiline_strings=False))
    path.chmod(0o600)


def check_correction(corrected: DatasetSchema, inferred: DatasetSchema) -> None:
    """Raises: UsageError: it is about other columns."""
    names, known = ({column.name for column in each.columns} for each in (corrected, inferred))
    if names != known:
        raise UsageError(
            f"the schema is of other columns: {len(known - names)} of the data are not in it, and {len(names - known)} "
            "of it are not in the data. Begin with the one that `concord-node data add` wrote"
        )
