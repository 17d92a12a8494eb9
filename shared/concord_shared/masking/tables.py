"""What travels in a masked step besides the masked blocks: tables of fixed-length bytes, one row a node.

A table is a Flower `ConfigRecord` of a list of places and one value of bytes for each column, the rows one after the
other: for a hundred nodes about 60 kB a step, where text would take twice that.
"""

from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord

from concord_shared.errors import MaskingRefusedError
from concord_shared.masking.shamir import SHARE_BYTES
from concord_shared.masking.thresholds import NODES_MAX

__all__ = ["SEALED_BYTES", "TABLES", "Table", "pack_table", "read_table"]

Table = dict[int, tuple[bytes, ...]]
"""Rows by place, each with a value for every column."""

SEALED_BYTES = 2 * SHARE_BYTES + 16
"""Two shares, and the tag of AES-GCM."""
TABLES: Mapping[str, Mapping[str, int]] = {
    "adverts": {"channel": 32, "mask": 32, "signature": 64},
    "sealed": {"shares": SEALED_BYTES},
    "commitments": {"digest": 32, "signature": 64},
    "survivors": {},
    "consents": {"signature": 64},
    "shares": {"share": SHARE_BYTES},
}
PREFIX = "masking."


def pack_table(name: str, rows: Table) -> tuple[str, ConfigRecord]:
    """The record's name in a message, and the record."""
    places = sorted(rows)
    columns = {column: b"".join(rows[place][index] for place in places) for index, column in enumerate(TABLES[name])}
    return PREFIX + name, ConfigRecord({"places": places, **columns})


def read_table(records: Mapping[str, Any], name: str) -> Table:
    """The table of that name among a message's config records.

    Raises:
        MaskingRefusedError: it is absent, or not of this form.
    """
    record, widths = records.get(PREFIX + name), TABLES[name]
    if record is None or set(record) != {"places", *widths}:
        raise MaskingRefusedError("malformed", f"the message carries no {name}")
    places = record["places"]
    sound = isinstance(places, list) and len(places) <= NODES_MAX
    sound = sound and all(type(place) is int and 0 <= place < NODES_MAX for place in places)
    if not sound or places != sorted(set(places)):
        raise MaskingRefusedError("malformed", f"the {name} are not of nodes in order, each once")
    for column, width in widths.items():
        if not isinstance(record[column], bytes) or len(record[column]) != width * len(places):
            raise MaskingRefusedError("malformed", f"the {column} column of the {name} has another length")
    return {
        place: tuple(record[column][index * width : (index + 1) * width] for column, width in widths.items())
        for index, place in enumerate(places)
    }
