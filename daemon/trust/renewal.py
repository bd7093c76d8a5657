"""Keeps this node's certificate fresh, and renews those of others where this node is an issuer.

From the half of its day on a certificate is renewed: by this node itself if it is an issuer, else by the first
issuer that answers. While none does, members go on accepting it for a week, and this node says so every hour.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from daemon.trust.credentials import Credentials, Now, utc_now
from hexmesh.errors import HexmeshError, Refused
from hexmesh.identity.certificates import MemberIdentity
from hexmesh.ids import NodeId, short
from hexmesh.wire.trust import Renew, Renewed, RenewRefused

log = logging.getLogger("hexmesh.trust")

ANSWER_S = 5.0
LONGEST_PAUSE_S = 30.0
_SHORTEST_PAUSE_S = 0.1
SAY_AGAIN_S = 3600.0

Answer = Renewed | RenewRefused


class Reminder:
    """Which warnings are to be said now: each once an hour."""

    def __init__(self) -> None:
        self._said_s: dict[str, float] = {}

    def is_due(self, what: str, now_unix_s: float) -> bool:
        """Whether to say this now; counts as said."""
        if now_unix_s - self._said_s.get(what, float("-inf")) < SAY_AGAIN_S:
            return False
        self._said_s[what] = now_unix_s
        return True


class Renewal:
    """Owner of the question that is being asked. `issuers` tells whom to ask: those up now, this node not among them.

    `is_void(identity)` says that a certificate has to be replaced at once, because its issuer was removed.
    `on_expired` is called when nobody accepts this node's certificate any more.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        ask: Callable[[NodeId, Renew], None],
        issuers: Callable[[], Sequence[NodeId]],
        may_renew: Callable[[MemberIdentity], bool],
        is_void: Callable[[MemberIdentity], bool],
        on_expired: Callable[[Refused], None],
        rng: random.Random,
        now: Now = utc_now,
    ) -> None:
        self._credentials = credentials
        self._ask = ask
        self._issuers = issuers
        self._may_renew = may_renew
        self._is_void = is_void
        self._on_expired = on_expired
        self._rng = rng
        self._now = now
        self._reminder = Reminder()
        self._nudge = asyncio.Event()
        self._asked: tuple[NodeId, asyncio.Future[Answer]] | None = None

    async def run(self) -> NoReturn:
        """Renew in time, for ever."""
        while True:
            self._nudge.clear()
            await self.keep_fresh()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s()):
                    await self._nudge.wait()

    def look_now(self) -> None:
        """Something changed that may make a new certificate necessary, or possible."""
        self._nudge.set()

    async def keep_fresh(self) -> None:
        """Renew if that is due. A failure is for the next time."""
        identity = self._credentials.identity
        if not self._is_due(identity):
            return
        try:
            if self._credentials.issuer is not None:
                await self._credentials.renew_self()
            else:
                await self._ask_around()
        except HexmeshError as error:
            log.warning("certificate not renewed reason=%s", error.one_line())
        self._warn()

    def answer(self, member: MemberIdentity) -> Answer:
        """What an issuer says to a member that wants its next certificate."""
        issuer = self._credentials.issuer
        if issuer is None:
            return RenewRefused(code="not_an_issuer", message="this node is no issuer")
        if not self._may_renew(member):
            return RenewRefused(code="removed", message=f"node {short(member.node_id)} was removed")
        return Renewed(chain=(issuer.renew(member, self._now()), *issuer.chain))

    def hear(self, src: NodeId, answer: Answer) -> None:
        """An issuer answered; answers that were not asked for count for nothing."""
        if self._asked is not None and self._asked[0] == src and not self._asked[1].done():
            self._asked[1].set_result(answer)

    def _is_due(self, identity: MemberIdentity) -> bool:
        if identity.validity.standing(self._now()) != "fresh" or self._is_void(identity):
            return True
        return self._credentials.issuer is not None and not identity.is_issuer

    async def _ask_around(self) -> None:
        issuers = list(self._issuers())
        self._rng.shuffle(issuers)
        for issuer in issuers:
            answer = await self._answer_of(issuer)
            if isinstance(answer, Renewed):
                await self._credentials.install(answer.chain)
                return
            if answer is not None:
                log.warning("issuer does not renew node=%s reason=%s", short(issuer), answer.message)

    async def _answer_of(self, issuer: NodeId) -> Answer | None:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._asked = (issuer, answer)
        self._ask(issuer, Renew(chain=self._credentials.chain))
        try:
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError:
            return None
        finally:
            self._asked = None

    def _warn(self) -> None:
        """Say aloud that the certificate is in grace, and when it is not even that any more."""
        validity = self._credentials.identity.validity
        match validity.standing(self._now()):
            case "grace":
                if self._reminder.is_due("own", self._now().timestamp()):
                    log.warning(
                        "this node's certificate expired at %s and no issuer renews it; others accept it until %s "
                        "next_step=start an issuer, or see that one is reached (`hexmesh members` shows who is)",
                        f"{validity.expires_at:%Y-%m-%d %H:%M:%S} UTC",
                        f"{validity.refused_at:%Y-%m-%d %H:%M:%S} UTC",
                    )
            case "expired":
                self._on_expired(
                    Refused(
                        f"this node's certificate expired at {validity.refused_at:%Y-%m-%d %H:%M:%S} UTC, "
                        "grace included, and no issuer renewed it",
                        code="certificate_expired",
                        next_step="start it with a new token (`hexmesh token create` on an issuer)",
                    )
                )
            case "fresh" | "due":
                return

    def _pause_s(self) -> float:
        """Until renewal is due; while it fails, a sixteenth of a certificate's day, half a minute at most."""
        validity = self._credentials.identity.validity
        left_s = (validity.due_at - self._now()).total_seconds()
        step_s = (validity.expires_at - validity.issued_at).total_seconds() / 16
        wait_s = left_s if left_s > 0 else step_s
        return min(LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, wait_s))
