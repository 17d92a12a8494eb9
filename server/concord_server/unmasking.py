"""The coordinator's side of one masked step (FSA-1): hands on what nodes say to each other, and opens the sum.

It keeps what every stage brought and never sees an Update. Whatever it hands on wrongly, nodes refuse.
"""

import os
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ConfigRecord
from numpy.typing import NDArray

from concord_shared.errors import MaskingRefusedError, RoundAbortedError, UpdateRefusedError
from concord_shared.masking.attempt import (
    Advert,
    Commitment,
    MaskedAttempt,
    agreed_digest,
    commitment_of,
    mask_keys,
    own_keys,
    pair_secret,
)
from concord_shared.masking.shamir import combine
from concord_shared.masking.stream import add_masks
from concord_shared.masking.tables import Table, pack_table, read_table

__all__ = ["MaskedCollection"]

Integers = NDArray[np.signedinteger[Any]]
TRIES_MAX = 5_000
"""Sets of shares that are tried where some node gave a wrong one."""


class MaskedCollection:
    """What the stages of one attempt have brought so far."""

    def __init__(self, attempt: MaskedAttempt) -> None:
        self.attempt = attempt
        self._adverts: dict[int, Advert] = {}
        self._commitments: dict[int, Commitment] = {}
        self._sealed: dict[int, dict[int, bytes]] = {}
        self._consents: dict[int, bytes] = {}
        self._shares: dict[int, dict[int, bytes]] = {}
        self._agreed = b""
        self._shared: tuple[int, ...] = ()
        self._survivors: tuple[int, ...] = ()
        self.liars: set[str] = set()

    def begin(self, stage: str, nodes: Iterable[str]) -> None:
        """`nodes` are those who answered the stage before: whom this stage asks."""
        places = tuple(sorted(self.attempt.names.index(name) for name in nodes))
        if stage == "shares":
            self._adverts = {place: self._adverts[place] for place in places}
            self._agreed = agreed_digest(self.attempt.context, self._adverts)
        elif stage == "masked":
            self._shared = places
        elif stage == "consent":
            self._survivors = places

    def request(self, stage: str, node: str) -> dict[str, ConfigRecord]:
        """The records that a stage's message to `node` carries."""
        place = self.attempt.names.index(node)
        tables: dict[str, Table] = {}
        if stage == "shares":
            tables["adverts"] = {each: (a.channel, a.mask, a.signature) for each, a in self._adverts.items()}
        elif stage == "masked":
            chosen = {each: self._commitments[each] for each in self._shared}
            tables["commitments"] = {each: (c.digest, c.signature) for each, c in chosen.items()}
            tables["sealed"] = {each: (self._sealed[each][place],) for each in self._shared if each != place}
        elif stage == "consent":
            tables["survivors"] = dict.fromkeys(self._survivors, ())
        elif stage == "open":
            tables["consents"] = {each: (signature,) for each, signature in self._consents.items()}
        return dict(pack_table(name, rows) for name, rows in tables.items())

    def accept(self, stage: str, node: str, records: Mapping[str, Any]) -> None:
        """Keeps what a node answered to a stage (its masked blocks go elsewhere: into the sum).

        Raises:
            UpdateRefusedError: it is not what that stage asks for.
        """
        place = self.attempt.names.index(node)
        try:
            if stage == "keys":
                self._accept_advert(place, records)
            elif stage == "shares":
                self._accept_shares(place, records)
            elif stage == "consent":
                [signature] = self._only(place, records, "consents")
                self.attempt.check_consent(place, self._agreed, self._shared, self._survivors, signature)
                self._consents[place] = signature
            elif stage == "open":
                shares = read_table(records, "shares")
                if tuple(shares) != self._shared:
                    raise MaskingRefusedError("shares", "the shares are not of the nodes of this step")
                self._shares[place] = {each: share for each, (share,) in shares.items()}
        except MaskingRefusedError as error:
            raise UpdateRefusedError(error.check, str(error)) from error

    def open(self, sums: Mapping[str, Integers]) -> None:
        """Takes the masks off the sums of the survivors' blocks, in place.

        Raises:
            RoundAbortedError: the shares that came do not open them.
        """
        plus: dict[str, list[bytes]] = {name: [] for name in sums}
        minus: dict[str, list[bytes]] = {name: [] for name in sums}
        for place in self._shared:
            if place in self._survivors:
                for name, key in own_keys(self._seed_of(place), self._agreed, sums).items():
                    minus[name].append(key)
                continue
            secret = X25519PrivateKey.from_private_bytes(self._mask_of(place))
            for other in self._survivors:
                low, high = min(place, other), max(place, other)
                shared = pair_secret(secret, self._adverts[other].mask)
                for name, key in mask_keys(shared, self._agreed, low, high, sums).items():
                    (minus if other == low else plus)[name].append(key)
        for name, total in sums.items():
            add_masks(total.view(f"<u{total.dtype.itemsize}"), plus[name], minus[name], os.cpu_count() or 1)

    def _accept_advert(self, place: int, records: Mapping[str, Any]) -> None:
        advert = Advert(*self._only(place, records, "adverts"))
        self.attempt.check_advert(place, advert)
        taken = {key for other in self._adverts.values() for key in (other.channel, other.mask)}
        if advert.channel == advert.mask or taken & {advert.channel, advert.mask}:
            raise MaskingRefusedError("keys", "its keys are another node's")
        self._adverts[place] = advert

    def _accept_shares(self, place: int, records: Mapping[str, Any]) -> None:
        commitment = Commitment(*self._only(place, records, "commitments"))
        self.attempt.check_commitment(place, self._agreed, commitment)
        sealed = read_table(records, "sealed")
        if set(sealed) != set(self._adverts) - {place}:
            raise MaskingRefusedError("shares", "it did not seal one pair of shares for each peer")
        self._commitments[place] = commitment
        self._sealed[place] = {peer: both for peer, (both,) in sealed.items()}

    def _only(self, place: int, records: Mapping[str, Any], name: str) -> tuple[bytes, ...]:
        rows = read_table(records, name)
        if set(rows) != {place}:
            raise MaskingRefusedError("places", f"the {name} are not the node's own")
        return rows[place]

    def _seed_of(self, place: int) -> bytes:
        wanted = self._commitments[place].digest
        return self._combined(place, lambda secret: commitment_of(self._agreed, secret) == wanted)

    def _mask_of(self, place: int) -> bytes:
        wanted = self._adverts[place].mask

        def fits(secret: bytes) -> bool:
            return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw() == wanted

        return self._combined(place, fits)

    def _combined(self, place: int, fits: Any) -> bytes:
        """A node's secret from the shares of those who opened. Who gave a share that does not fit is named."""
        shares = {opener + 1: given[place] for opener, given in self._shares.items()}
        needed = self.attempt.thresholds.opening
        trusted = [point for point in sorted(shares) if self.attempt.names[point - 1] not in self.liars]
        for points in self._sets(trusted, sorted(shares), needed):
            try:
                secret = combine({point: shares[point] for point in points})
            except ValueError:
                continue
            if fits(secret):
                self._blame(points, shares, fits)
                return secret
        raise RoundAbortedError(
            f"the masks of {self.attempt.names[place]} cannot be taken off: of {TRIES_MAX} sets of {needed} among "
            f"{len(shares)} shares, none fits; too many nodes gave wrong ones"
        )

    def _sets(self, trusted: list[int], all_points: list[int], needed: int) -> Iterator[tuple[int, ...]]:
        """First who never lied; then sets by chance: with few liars, a fair part of them holds none."""
        if len(trusted) >= needed:
            yield tuple(trusted[:needed])
        chance = random.SystemRandom()
        for _ in range(TRIES_MAX):
            yield tuple(sorted(chance.sample(all_points, needed)))

    def _blame(self, good: tuple[int, ...], shares: Mapping[int, bytes], fits: Any) -> None:
        """A share lies if it does not fit in the place of a good one. Checked where any set failed before."""
        if good == tuple(sorted(shares))[: len(good)]:
            return
        for point in set(shares) - set(good):
            try:
                honest = fits(combine({each: shares[each] for each in (*good[1:], point)}))
            except ValueError:
                honest = False
            if not honest:
                self.liars.add(self.attempt.names[point - 1])
