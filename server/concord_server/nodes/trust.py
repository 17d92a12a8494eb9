"""What a node verifies everything else with."""

from concord_server.database import utc_now
from concord_server.pki import Authority
from concord_server.settings import Settings
from concord_shared.protocol import PROTOCOL, Trust

__all__ = ["trust_of"]


def trust_of(settings: Settings, authority: Authority) -> Trust:
    host = f"[{settings.public_host}]" if ":" in settings.public_host else settings.public_host
    return Trust(
        federation=settings.federation,
        protocols=(PROTOCOL,),
        root_certificate=authority.root_pem,
        membership_certificate=authority.membership_pem,
        superlink=f"{host}:{settings.superlink_port}",
        now=int(utc_now().timestamp()),
    )
