"""What a node says once it is up: a line for scripts, and on a terminal how others join."""

from __future__ import annotations

import logging
import sys

from daemon.peering.address import Address
from daemon.trust.admission import Admission
from daemon.views import UpLine

progress = logging.getLogger("hexmesh.progress")

FIRST_TOKEN_USES = 16
FIRST_TOKEN_TTL_S = 3600.0


def up_line(*, node_id: str, name: str, http_url: str, address: Address, admission: Admission) -> UpLine:
    """The line; where this node may admit others, with a token for the first of them."""
    issued = None
    if admission.may_admit:
        issued = admission.create_token(ttl_s=FIRST_TOKEN_TTL_S, uses=FIRST_TOKEN_USES)
    if issued is not None and sys.stderr.isatty():  # a secret: for the person who looks, not for a log file
        progress.info("others join with:  %s", issued.join_command)
    return UpLine(
        node_id=node_id,
        name=name,
        http_url=http_url,
        peer_addr=str(address),
        join_command=issued.join_command if issued is not None else None,
        token_expires_s=issued.expires_s if issued is not None else None,
    )
