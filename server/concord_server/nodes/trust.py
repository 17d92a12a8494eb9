"""What a node verifies everything else with."""

from concord_server.database import utc_now
from concord_server.pki import Authority
from concord_server.settings import Settings
from concord_shared.protocol import PROTOCOL, Trust

__all__ = ["trust_of"]


def trust_of(settings: Settings, authority: Authority) -> Trust:
    return Trust(
        federation=settings.federation,
        protocols=(PROTOCOL,),
        root_certificate=authority.root_pem,
        membership_certificate=authority.membership_pem,
        superlink=settings.superlink_address,
        now=int(utc_now().timestamp()),
    )
