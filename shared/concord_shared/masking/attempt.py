"""What all parties of one masked attempt agree on: who takes part, under which parameters, and what they sign.

FSA-1, an adaptation of Bonawitz et al. 2017 (active adversary, complete graph). It has no proof and no outside review.

    context   digest of everything that the attempt is bound to: each node computes it from what it holds itself
    agreed    digest of the context and of all adverts: keys, masks and shares are derived under it

A node is named by its place among the participants in name order; Shamir's point is that place plus one.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from concord_shared.canonical import canonical_bytes
from concord_shared.errors import MaskingRefusedError
from concord_shared.masking.thresholds import Thresholds
from concord_shared.messages import Offer
from concord_shared.signing import PrivateKey, PublicKey, public_text, sign_bytes, verify_bytes

__all__ = [
    "STAGES",
    "Advert",
    "Commitment",
    "MaskedAttempt",
    "Signers",
    "agreed_digest",
    "channel_key",
    "commitment_of",
    "mask_keys",
    "own_keys",
    "pair_secret",
]

STAGES = ("keys", "shares", "masked", "consent", "open")
"""The requests of a masked step, in order. A plain step is the one request \"\"."""
SUITE = "X25519 HKDF-SHA256 AES-256-GCM AES-256-CTR Ed25519 SHA-256 Shamir(2**256+297)"
KEY_BYTES = 32


@dataclass(frozen=True)
class Advert:
    """A node's one-time X25519 keys: for the channel of shares, and for masks."""

    channel: bytes
    mask: bytes
    signature: bytes


@dataclass(frozen=True)
class Commitment:
    """A node's word on the seed of its own mask, so that a wrong opening is seen."""

    digest: bytes
    signature: bytes


@dataclass(frozen=True)
class Signers:
    """Identity keys by node, and the digest of the run's manifest: "" in a simulation, which has none."""

    keys: Mapping[str, PublicKey] = field(default_factory=dict)
    manifest: str = ""


@dataclass(frozen=True)
class MaskedAttempt:
    """One attempt of one step. `identities`: the participants' identity keys in name order, from the roster.

    manifest: its digest; it names the roster's version. The answer's blocks follow from the offer's plan and layout.
    """

    offer: Offer
    identities: tuple[tuple[str, PublicKey], ...]
    thresholds: Thresholds
    weight_cap: int
    manifest: str = ""

    def __post_init__(self) -> None:
        names = [name for name, _ in self.identities]
        assert names == sorted(set(names)), "participants are in name order"
        assert len(names) == self.thresholds.nodes

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.identities)

    @cached_property
    def context(self) -> bytes:
        """SHA-256 of the canonical form of everything that masks and signatures of this attempt are bound to."""
        offer, needed = self.offer, self.thresholds
        return hashlib.sha256(
            canonical_bytes(
                {
                    "schema": "concord/masked-attempt/1",
                    "suite": SUITE,
                    "run": offer.run,
                    "kind": offer.kind,
                    "round": offer.round_number,
                    "attempt": offer.attempt,
                    "plan": offer.plan_digest,
                    "manifest": self.manifest,
                    "model": offer.model_digest,
                    "layout": offer.layout_digest,
                    "preprocessing": hashlib.sha256(offer.preprocessing.encode()).hexdigest(),
                    "evaluate_incoming": offer.evaluate_incoming,
                    "participants": [[name, public_text(key)] for name, key in self.identities],
                    "n": needed.nodes,
                    "c": needed.collusion,
                    "t": needed.opening,
                    "m": needed.survivors,
                    "nodes_max": offer.nodes_max,
                    "rows_max": offer.rows_max,
                    "weight_cap": self.weight_cap,
                }
            )
        ).digest()

    # What is signed. Every body begins with what it is, and is bound to the context or to what was agreed under it.

    def sign_advert(self, key: PrivateKey, channel: bytes, mask: bytes) -> Advert:
        return Advert(channel, mask, sign_bytes(key, _body("advert", self.context, channel, mask)))

    def check_advert(self, place: int, advert: Advert) -> None:
        """Raises: MaskingRefusedError."""
        self._check(place, advert.signature, _body("advert", self.context, advert.channel, advert.mask), "advert")

    def sign_commitment(self, key: PrivateKey, agreed: bytes, digest: bytes) -> Commitment:
        return Commitment(digest, sign_bytes(key, _body("commitment", agreed, digest)))

    def check_commitment(self, place: int, agreed: bytes, commitment: Commitment) -> None:
        """Raises: MaskingRefusedError."""
        self._check(place, commitment.signature, _body("commitment", agreed, commitment.digest), "commitment")

    def sign_consent(self, key: PrivateKey, agreed: bytes, shared: Iterable[int], survivors: Iterable[int]) -> bytes:
        return sign_bytes(key, _consent(agreed, shared, survivors))

    def check_consent(
        self, place: int, agreed: bytes, shared: Iterable[int], survivors: Iterable[int], signature: bytes
    ) -> None:
        """Raises: MaskingRefusedError."""
        self._check(place, signature, _consent(agreed, shared, survivors), "consent")

    def check_places(self, places: Sequence[int], of: Iterable[int], least: int, what: str) -> None:
        """Places in order, each once, all of them `of`, at least so many.

        Raises:
            MaskingRefusedError: with the reason.
        """
        if list(places) != sorted(set(places)) or not set(places) <= set(of):
            raise MaskingRefusedError("places", f"the list of {what} names nodes twice, out of order, or strangers")
        if len(places) < least:
            raise MaskingRefusedError("too-few", f"{len(places)} {what} are below the {least} that are needed")

    def _check(self, place: int, signature: bytes, body: bytes, what: str) -> None:
        name, key = self.identities[place]
        try:
            verify_bytes(key, signature, body)
        except InvalidSignature as error:
            raise MaskingRefusedError("signature", f"the {what} of {name} is not signed by it for this step") from error


def agreed_digest(context: bytes, adverts: Mapping[int, Advert]) -> bytes:
    """SHA-256 of the context and of every advert, by place."""
    digest = hashlib.sha256(b"concord/masking/agreed/1\0" + context)
    for place in sorted(adverts):
        digest.update(place.to_bytes(8, "big") + adverts[place].channel + adverts[place].mask)
    return digest.digest()


def commitment_of(agreed: bytes, seed: bytes) -> bytes:
    """To a node's own mask seed (32 bytes)."""
    return hashlib.sha256(b"concord/masking/seed/1\0" + agreed + seed).digest()


def pair_secret(mine: X25519PrivateKey, theirs: bytes) -> bytes:
    """Raises: ValueError: their key is a point of small order."""
    return mine.exchange(X25519PublicKey.from_public_bytes(theirs))


def mask_keys(secret: bytes, agreed: bytes, low: int, high: int, blocks: Iterable[str]) -> dict[str, bytes]:
    """The stream keys of the masks between two places, one for each block, by name."""
    pair = low.to_bytes(8, "big") + high.to_bytes(8, "big")
    return {name: _derive(secret, agreed, b"concord/masking/pair/1\0" + pair, name) for name in blocks}


def own_keys(seed: bytes, agreed: bytes, blocks: Iterable[str]) -> dict[str, bytes]:
    """The stream keys of a node's own mask, one for each block, by name."""
    return {name: _derive(seed, agreed, b"concord/masking/own/1\0", name) for name in blocks}


def channel_key(secret: bytes, agreed: bytes, sender: int, receiver: int) -> bytes:
    """Encrypts exactly one message: sender to receiver, once."""
    pair = sender.to_bytes(8, "big") + receiver.to_bytes(8, "big")
    return _derive(secret, agreed, b"concord/masking/channel/1\0" + pair, "")


def _derive(secret: bytes, agreed: bytes, purpose: bytes, name: str) -> bytes:
    return HKDF(SHA256(), length=KEY_BYTES, salt=agreed, info=purpose + name.encode()).derive(secret)


def _body(what: str, *parts: bytes) -> bytes:
    """Parts of fixed lengths: no two bodies are equal by shifting."""
    return b"concord/masking/" + what.encode() + b"/1\0" + hashlib.sha256(b"".join(parts)).digest()


def _consent(agreed: bytes, shared: Iterable[int], survivors: Iterable[int]) -> bytes:
    lists: dict[str, Any] = {"shared": list(shared), "survivors": list(survivors)}
    return _body("consent", agreed, canonical_bytes(lists))
