"""Reading a partner's data into the two arrays that everything else works on."""

from concord_client.data.adapters import adapter_names, differences, locate, read_batches, read_data, resolve_spec
from concord_client.data.contract import Difference, check_contract
from concord_client.data.dataset import NodeDataset, RawData, Split

__all__ = [
    "Difference",
    "NodeDataset",
    "RawData",
    "Split",
    "adapter_names",
    "check_contract",
    "differences",
    "locate",
    "read_batches",
    "read_data",
    "resolve_spec",
]
