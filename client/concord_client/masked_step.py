"""The node's side of one masked attempt (FSA-1): five answers, each given once.

    keys      my one-time keys, signed
    shares    my two secrets in shares, sealed for each peer; a commitment to the first
    masked    my Update under masks
    consent   my signature under the one list of survivors that I accept
    open      for each survivor my share of its own mask's seed; for each who vanished, of its mask key

A node opens once in a (run, step), and only what it worked out itself: nobody can ask it for names. All secrets are in
memory alone, so a node that was killed cannot answer twice: it has dropped out of the attempt.
"""

import itertools
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any, Protocol

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from concord_shared.canonical import canonical_digest
from concord_shared.errors import MaskingRefusedError
from concord_shared.masking.attempt import (
    STAGES,
    Advert,
    Commitment,
    MaskedAttempt,
    agreed_digest,
    channel_key,
    commitment_of,
    mask_keys,
    own_keys,
    pair_secret,
)
from concord_shared.masking.shamir import SHARE_BYTES, split
from concord_shared.masking.stream import add_masks
from concord_shared.masking.tables import Table, pack_table, read_table
from concord_shared.signing import PrivateKey, public_text

__all__ = ["Journal", "MaskedStep"]

Integers = NDArray[np.signedinteger[Any]]
Records = Mapping[str, Any]
NONCE = bytes(12)
"""A channel key encrypts one message only."""


class Facts(Protocol):
    """Where a journal is kept; durable when a call returns. A `NodeStore` is one."""

    def fact(self, name: str) -> str | None: ...
    def set_fact(self, name: str, value: str) -> None: ...


class MemoryFacts:
    """For a simulation, whose nodes live and die together."""

    def __init__(self) -> None:
        self._facts: dict[str, str] = {}

    def fact(self, name: str) -> str | None:
        return self._facts.get(name)

    def set_fact(self, name: str, value: str) -> None:
        self._facts[name] = value


class Journal:
    """What a killed node must still know of a step: the attempt that it began, about what, and whether it opened."""

    def __init__(self, facts: Facts | None = None) -> None:
        self._facts = facts or MemoryFacts()

    def begin(self, attempt: MaskedAttempt) -> None:
        """Raises: MaskingRefusedError: not newer than one that was begun, or about something else, or opened before."""
        number, about = attempt.offer.attempt, _about(attempt)
        text = self._facts.fact(_name_of(attempt))
        if text is not None:
            last = json.loads(text)
            if last["opened"]:
                raise MaskingRefusedError("replayed", "this node opened this step already; it never opens one twice")
            if number <= last["attempt"]:
                raise MaskingRefusedError("replayed", f"attempt {number} is not newer than {last['attempt']}")
            if about != last["about"]:
                raise MaskingRefusedError(
                    "places", "another model, other nodes or thresholds than in an earlier attempt of this step"
                )
        self._write(attempt, opened=False)

    def close(self, attempt: MaskedAttempt) -> None:
        """This step is opened: no attempt of it is ever joined again."""
        self._write(attempt, opened=True)

    def _write(self, attempt: MaskedAttempt, opened: bool) -> None:
        entry = {"attempt": attempt.offer.attempt, "about": _about(attempt), "opened": opened}
        self._facts.set_fact(_name_of(attempt), json.dumps(entry))


def _name_of(attempt: MaskedAttempt) -> str:
    offer = attempt.offer
    return f"masked/{offer.run}/{offer.kind}/{offer.round_number}"


def _about(attempt: MaskedAttempt) -> str:
    parties = [[name, public_text(key)] for name, key in attempt.identities]
    return canonical_digest([attempt.offer.question, parties, list(astuple(attempt.thresholds))])


class MaskedStep:
    """One attempt at one node.

    update: gives the plain blocks of the answer, waiting for them where they are still being made. It is called once,
    after the peers' keys and shares were found sound.
    pinned: names that this node's owner knows; None where the owner pinned nobody. At least `minimum` of them, this
    node among them, must be in every list. agree: raises where this node does not want a sum over just these survivors.
    """

    def __init__(
        self,
        attempt: MaskedAttempt,
        node: str,
        key: PrivateKey,
        journal: Journal,
        update: Callable[[], Mapping[str, Integers]],
        pinned: frozenset[str] | None = None,
        minimum: int = 0,
        agree: Callable[[tuple[str, ...]], None] = lambda survivors: None,
    ) -> None:
        self.attempt, self._key, self._journal, self._update = attempt, key, journal, update
        self._place = attempt.names.index(node)
        self._pinned = (
            {place for place, name in enumerate(attempt.names) if name in pinned} if pinned is not None else None
        )
        self._minimum, self._agree = minimum, agree
        self._due = 0
        self._check_pinned(range(len(attempt.names)))

    def answer(self, stage: str, records: Records) -> tuple[dict[str, Any], dict[str, Integers]]:
        """Config records by name, and blocks, of the answer to one stage.

        Raises:
            MaskingRefusedError: the request breaks a rule; this node takes no further part in the attempt.
        """
        due, self._due = self._due, len(STAGES)  # after a refusal nothing more is answered
        if due >= len(STAGES) or stage != STAGES[due]:
            raise MaskingRefusedError("order", f"{stage!r} is not what comes next in this masked step")
        tables, blocks = getattr(self, f"_{stage}")(records)
        self._due = due + 1
        return dict(pack_table(name, rows) for name, rows in tables.items()), blocks

    # One method a stage

    def _keys(self, records: Records) -> tuple[dict[str, Table], dict[str, Integers]]:
        self._journal.begin(self.attempt)
        self._channel, self._mask = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._advert = self.attempt.sign_advert(
            self._key, self._channel.public_key().public_bytes_raw(), self._mask.public_key().public_bytes_raw()
        )
        return {"adverts": {self._place: (self._advert.channel, self._advert.mask, self._advert.signature)}}, {}

    def _shares(self, records: Records) -> tuple[dict[str, Table], dict[str, Integers]]:
        attempt, needed = self.attempt, self.attempt.thresholds
        adverts = {place: Advert(*row) for place, row in read_table(records, "adverts").items()}
        self._check_list(list(adverts), range(needed.nodes), "adverts")
        if adverts[self._place] != self._advert:
            raise MaskingRefusedError("keys", "this node's own keys were changed on the way")
        for place, advert in adverts.items():
            if place != self._place:
                attempt.check_advert(place, advert)
        keys = [key for advert in adverts.values() for key in (advert.channel, advert.mask)]
        if len(set(keys)) != len(keys):
            raise MaskingRefusedError("keys", "two of the adverts hold the same key")
        self._agreed = agreed_digest(attempt.context, adverts)
        self._pairs = {
            place: self._secret(self._mask, place, advert.mask)
            for place, advert in adverts.items()
            if place != self._place
        }
        self._channels = {place: self._secret(self._channel, place, adverts[place].channel) for place in self._pairs}
        self._seed = secrets.token_bytes(32)
        points = [place + 1 for place in adverts]
        seeds = split(self._seed, points, needed.opening)
        masks = split(self._mask.private_bytes_raw(), points, needed.opening)
        self._held = {self._place: (seeds[self._place + 1], masks[self._place + 1])}
        sealed: Table = {}
        for place, secret in self._channels.items():
            cipher = AESGCM(channel_key(secret, self._agreed, self._place, place))
            both = seeds[place + 1] + masks[place + 1]
            sealed[place] = (cipher.encrypt(NONCE, both, self._agreed),)
        self._commitment = attempt.sign_commitment(self._key, self._agreed, commitment_of(self._agreed, self._seed))
        own = (self._commitment.digest, self._commitment.signature)
        return {"sealed": sealed, "commitments": {self._place: own}}, {}

    def _masked(self, records: Records) -> tuple[dict[str, Table], dict[str, Integers]]:
        commitments = {place: Commitment(*row) for place, row in read_table(records, "commitments").items()}
        sealed = read_table(records, "sealed")
        self._check_list(list(commitments), [self._place, *self._pairs], "commitments")
        if commitments[self._place] != self._commitment or set(sealed) != set(commitments) - {self._place}:
            raise MaskingRefusedError("shares", "the shares are not those of the nodes that are named")
        for place, commitment in commitments.items():
            if place != self._place:
                self.attempt.check_commitment(place, self._agreed, commitment)
                self._held[place] = self._unseal(place, sealed[place][0])
        self._shared = tuple(sorted(commitments))
        blocks = self._update()
        masked = self._under_masks(blocks)
        del self._pairs, self._channels, self._seed, self._mask, self._channel
        return {}, masked

    def _consent(self, records: Records) -> tuple[dict[str, Table], dict[str, Integers]]:
        survivors = tuple(read_table(records, "survivors"))
        self._check_list(survivors, self._shared, "survivors")
        self._agree(tuple(self.attempt.names[place] for place in survivors))
        self._survivors = survivors
        signature = self.attempt.sign_consent(self._key, self._agreed, self._shared, survivors)
        return {"consents": {self._place: (signature,)}}, {}

    def _open(self, records: Records) -> tuple[dict[str, Table], dict[str, Integers]]:
        consents = read_table(records, "consents")
        self.attempt.check_places(list(consents), self._survivors, self.attempt.thresholds.opening, "consents")
        for place, (signature,) in consents.items():
            self.attempt.check_consent(place, self._agreed, self._shared, self._survivors, signature)
        self._journal.close(self.attempt)
        shares: Table = {place: (self._held[place][place not in self._survivors],) for place in self._shared}
        self._held.clear()
        return {"shares": shares}, {}

    # What they use

    def _check_list(self, places: Any, of: Any, what: str) -> None:
        self.attempt.check_places(places, of, self.attempt.thresholds.survivors, what)
        if self._place not in places:
            raise MaskingRefusedError("places", f"this node is not among the {what}")
        self._check_pinned(places)

    def _check_pinned(self, places: Any) -> None:
        if self._pinned is not None and len({self._place, *self._pinned} & set(places)) < self._minimum:
            raise MaskingRefusedError(
                "pinned", f"fewer than {self._minimum} of the nodes that this node's owner pinned take part"
            )

    def _secret(self, mine: X25519PrivateKey, place: int, theirs: bytes) -> bytes:
        try:
            return pair_secret(mine, theirs)
        except ValueError as error:
            raise MaskingRefusedError("keys", f"the key of {self.attempt.names[place]} is no proper one") from error

    def _unseal(self, place: int, sealed: bytes) -> tuple[bytes, bytes]:
        cipher = AESGCM(channel_key(self._channels[place], self._agreed, place, self._place))
        try:
            both = cipher.decrypt(NONCE, sealed, self._agreed)
        except InvalidTag as error:
            name = self.attempt.names[place]
            raise MaskingRefusedError("shares", f"the shares of {name} cannot be opened") from error
        return both[:SHARE_BYTES], both[SHARE_BYTES:]

    def _under_masks(self, blocks: Mapping[str, Integers]) -> dict[str, Integers]:
        own = own_keys(self._seed, self._agreed, blocks)
        above = [
            mask_keys(secret, self._agreed, self._place, place, blocks)
            for place, secret in self._pairs.items()
            if place > self._place and place in self._shared
        ]
        below = [
            mask_keys(secret, self._agreed, place, self._place, blocks)
            for place, secret in self._pairs.items()
            if place < self._place and place in self._shared
        ]
        masked = {}
        for name, values in blocks.items():
            words = values.astype(values.dtype.newbyteorder("<")).view(f"<u{values.dtype.itemsize}")
            plus = itertools.chain([own[name]], (keys[name] for keys in above))
            add_masks(words, plus, (keys[name] for keys in below))
            masked[name] = words.view(values.dtype)
        return masked
