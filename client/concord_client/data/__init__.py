"""Reading a partner's data into the two arrays that everything else works on."""

from concord_client.data.adapters import (
    Reading,
    adapter_names,
    differences,
    is_table,
    locate,
    read_batches,
    read_data,
    resolve_spec,
    table_frames,
)
from concord_client.data.contract import Difference
from concord_client.data.dataset import NodeDataset, RawData, Split

__all__ = [
    "Difference",
    "NodeDataset",
    "RawData",
    "Reading",
    "Split",
    "adapter_names",
    "differences",
    "is_table",
    "locate",
    "read_batches",
    "read_data",
    "resolve_spec",
    "table_frames",
]
