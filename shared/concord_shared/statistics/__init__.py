"""Statistics over nodes as exact integer sums: see `programme`."""

from concord_shared.statistics.columns import Batch, channel_names, columns_by_name, described, width
from concord_shared.statistics.programme import KNOWN_SCHEMA, Programme
from concord_shared.statistics.wanted import Wanted, wanted_of

__all__ = [
    "KNOWN_SCHEMA",
    "Batch",
    "Programme",
    "Wanted",
    "channel_names",
    "columns_by_name",
    "described",
    "wanted_of",
    "width",
]
