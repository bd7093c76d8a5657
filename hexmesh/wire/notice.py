"""Notices from the coordinator to the hosts it holds: why no plan can be made."""

from __future__ import annotations

import msgspec


class PlanBlocked(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """No plan fits the hosts held now; or, with `code` None, the earlier notice is void."""

    code: str | None
    message: str
    next_step: str
    needed_bytes: int | None
    room_bytes: int | None


NOTICE_MESSAGE = PlanBlocked
