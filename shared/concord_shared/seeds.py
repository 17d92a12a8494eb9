"""Seeds for training and sampling, all derived from the plan's one seed.

A seed depends on what it is for, on the round and on the node's *name*: never on an index, a worker or a run
id, so the same plan gives the same numbers wherever it runs. Nothing secret may come from here: keys, masks
and noise come from the operating system.
"""

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from concord_shared.canonical import canonical_bytes

__all__ = ["derive_seed"]


def derive_seed(seed: int, purpose: str, round_number: int = 0, node: str = "") -> int:
    """HKDF-SHA256(seed, purpose, round, node) as a non-negative integer below 2**63."""
    info = canonical_bytes(["concord/seed/1", purpose, round_number, node])
    material = HKDF(SHA256(), length=8, salt=None, info=info).derive(seed.to_bytes(8, "big"))
    return int.from_bytes(material, "big") >> 1
