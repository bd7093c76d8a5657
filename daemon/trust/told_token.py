"""The join token as the operator gave it, held against what the state folder says."""

from __future__ import annotations

from daemon.config import JoinOptions
from daemon.trust.state import Membership
from hexmesh.errors import InvalidInput, Refused
from hexmesh.identity.certificates import root_sha256
from hexmesh.identity.tokens import JoinToken, parse_token
from hexmesh.ids import short


def told_token(options: JoinOptions) -> JoinToken:
    """Raises InvalidInput where there is none, or it cannot be one."""
    if options.token is None:
        raise InvalidInput(
            "joining needs a token",
            code="no_token",
            next_step="get one with `hexmesh token create` on a member, and give it in HEXMESH_TOKEN or --token-file",
        )
    return parse_token(options.token)


def check_told_token(options: JoinOptions, known: Membership | None) -> None:
    """A member keeps its mesh: a token for it is not needed, one for another mesh is a mistake."""
    if known is None or options.token is None:
        return
    if parse_token(options.token).root_sha256 != root_sha256(known.root_der):
        raise Refused(
            f"{options.state_dir} belongs to a member of mesh {short(known.mesh_id)}, and the token is for another",
            code="other_mesh",
            next_step="leave that mesh with `hexmesh leave --forget`, or give another --state-dir",
        )
