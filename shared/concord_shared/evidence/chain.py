"""From the pinned root to the keys of a federation: what a third party needs to know whose signature is whose."""

import datetime

from pydantic import Field

from concord_shared.certificates import membership_key
from concord_shared.documents import Roster
from concord_shared.errors import DocumentRefusedError
from concord_shared.signing import Envelope, PublicKey, Record, open_envelope, read_public_text

__all__ = ["KeyChain", "plain_fingerprint"]

Pem = str


class KeyChain(Record):
    """root and membership certificate (PEM), and a roster (Envelope) that the membership key signed."""

    root_certificate: Pem = Field(max_length=20_000)
    membership_certificate: Pem = Field(max_length=20_000)
    roster: Envelope

    def verified(self, root: str) -> Roster:
        """The roster, up to the root key with the fingerprint `root`, as of the time when the roster was signed: what
        was signed by a key stays so after the key's end.

        Raises:
            DocumentRefusedError: with the link that is broken.
        """
        claimed = Roster.from_canonical(self.roster.bytes)
        try:
            moment = datetime.datetime.fromtimestamp(claimed.issued_at, datetime.UTC)
        except (ValueError, OverflowError) as error:
            raise DocumentRefusedError("the roster is of no time that there is") from error
        key = membership_key(self.root_certificate, self.membership_certificate, root, moment)
        return open_envelope(self.roster, Roster, [key])

    def coordinator_key(self, root: str) -> PublicKey:
        return read_public_text(self.verified(root).coordinator_key)


def plain_fingerprint(text: str) -> str:
    """As people write it: in groups, with colons, in capitals."""
    return "".join(text.split()).replace(":", "").lower()
