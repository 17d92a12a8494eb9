"""Studies, and the agreements that open datasets to them."""
