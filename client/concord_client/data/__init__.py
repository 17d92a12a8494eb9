"""Reading a partner's data into the two arrays that everything else works on."""

from concord_client.data.adapters import adapter_names, locate, read_data, resolve_spec
from concord_client.data.dataset import NodeDataset, RawData, Split, check_contract

__all__ = ["NodeDataset", "RawData", "Split", "adapter_names", "check_contract", "locate", "read_data", "resolve_spec"]
