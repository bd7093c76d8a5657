"""Where a request enters: keeps prompt, output and seed until the end, and replays them when a replica breaks.

Attempts are numbered; tokens of an older attempt are dropped, and so are tokens that the client has already. A
request ends with its tokens or with an error that names the blocker, within its deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Set
from dataclasses import dataclass, field, replace

from daemon.courier import Courier
from daemon.web.service import GenerationPart, GenerationRequest
from hexmesh.errors import Busy, Closed, HexmeshError, InvalidInput, NotReady, TimedOut
from hexmesh.serving.watchdog import LOOK_S, SUSPECT_S, Patience
from hexmesh.wire.control import Epoch
from hexmesh.wire.data import Generate, GenerateCancel, Generated, GenerateFailed, PromptScored

log = logging.getLogger("hexmesh.gateway")

SILENCE_S = 60.0
"""A driver that sends nothing for so long is given up, and the request is tried again."""
LOOK_FOR_ROUTE_S = 0.25
"""A route may come back without any news: when a node that was not heard for a while is heard again."""
RETRY_PAUSE_S = 0.02
MAX_RETRY_PAUSE_S = 0.5
_SPARE_MESSAGES = 16
"""A driver has one message a token to send, and a few besides; what is over that is a flood."""
MAX_BUSY_S = 1.0
"""How long a request that found the queue full is tried before the client is told."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request can go now: a replica of the committed epoch and the node that drives it."""

    epoch: Epoch
    replica: str
    driver: str
    nodes: frozenset[str]
    """Every node that holds a stage of the replica."""


@dataclass(slots=True)
class Flight:
    """One sequence under way; owned by its `generate` call."""

    key: str
    """The sequence's name on the wire: two peers may be given the same request id at the same time."""
    request: GenerationRequest
    started_s: float
    deadline_s: float
    attempt: int = 0
    has_token: bool = False
    """Whether the present attempt has brought a token."""
    is_cancelled: bool = False
    error: HexmeshError | None = None
    """What ends it, whatever its driver may still send."""
    emitted: list[int] = field(default_factory=list)
    n_scored: int = 0
    """Tokens of the prompt whose scores the client has."""
    route: Route | None = None
    failed: set[tuple[Epoch, str]] = field(default_factory=set)
    """Replicas that an attempt failed on: others come first."""
    inbox: asyncio.Queue[Generated | PromptScored | GenerateFailed] = field(default_factory=asyncio.Queue)

    @property
    def n_to_score(self) -> int:
        """Tokens of the prompt whose scores are wanted in all."""
        return len(self.request.prompt) - 1 if self.request.n_prompt_logprobs >= 0 else 0

    @property
    def most_messages(self) -> int:
        """What a driver may have sent that was not read yet; more is a flood."""
        return self.request.max_tokens + self.n_to_score + _SPARE_MESSAGES


class Gateway:
    """Owns the sequences that entered at this node."""

    def __init__(
        self,
        *,
        courier: Courier,
        route: Callable[[Set[tuple[Epoch, str]]], Route | None],
        blocker: Callable[[], HexmeshError],
        on_recovered: Callable[[], None],
        is_heard: Callable[[str], bool],
    ) -> None:
        self._courier = courier
        """`route` gives where a request goes now; rather not to replicas of the set it is given."""
        self._route = route
        self._blocker = blocker
        self._on_recovered = on_recovered
        self._is_heard = is_heard
        self._flights: dict[str, Flight] = {}
        self._routes_changed = asyncio.Event()

    def flights(self) -> list[Flight]:
        """Every sequence under way."""
        return list(self._flights.values())

    def cancel(self, request_id: str) -> bool:
        """End all sequences of a request as if its client had left."""
        flights = [flight for flight in self._flights.values() if flight.request.request_id == request_id]
        for flight in flights:
            flight.is_cancelled = True
            flight.inbox.put_nowait(self._give_up(flight, "cancelled by request"))
        return bool(flights)

    def end_all(self, error: HexmeshError) -> None:
        """This node goes: what has not ended fails with `error`."""
        for flight in self._flights.values():
            flight.error = error
            flight.inbox.put_nowait(self._give_up(flight, error.message))

    def routes_changed(self) -> None:
        """A plan was committed, or a node came or went: requests that wait look for a route again."""
        self._routes_changed.set()
        self._routes_changed = asyncio.Event()

    def node_lost(self, node: str, reason: str) -> None:
        """Replay what ran over a node that is gone."""
        for flight in self._flights.values():
            if flight.route is not None and node in flight.route.nodes:
                flight.inbox.put_nowait(self._give_up(flight, reason, retry=True))
        self.routes_changed()

    def carried_over(self, old: Epoch, new: Epoch, replicas: Mapping[str, str]) -> None:
        """What runs in replicas that a new plan leaves as they are (new id -> old id) runs in the new one."""
        ids = {old_id: new_id for new_id, old_id in replicas.items()}
        for flight in self._flights.values():
            route = flight.route
            if route is not None and route.epoch == old and route.replica in ids:
                flight.route = replace(route, epoch=new, replica=ids[route.replica])

    def link_lost(self, node: str, reason: str) -> None:
        """A connection was cut: tokens from a driver there may be lost."""
        for flight in self._flights.values():
            if flight.route is not None and flight.route.driver == node:
                flight.inbox.put_nowait(self._give_up(flight, reason, retry=True))

    def on_message(self, src: str, message: Generated | PromptScored | GenerateFailed) -> None:
        """Tokens or a failure from a driver; those of another node or an older attempt are dropped."""
        flight = self._flights.get(message.sequence)
        if flight is None or message.attempt != flight.attempt or flight.route is None:
            return
        if src == flight.route.driver and flight.inbox.qsize() < flight.most_messages:
            flight.inbox.put_nowait(message)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationPart, None]:
        """Parts of one sequence as they come; see `MeshService.generate`."""
        key = f"{self._courier.node_id}/{request.sequence}"
        if key in self._flights:
            raise InvalidInput(
                f"request {request.request_id} is under way already", next_step="use another X-Request-Id"
            )
        now_s = time.monotonic()
        flight = Flight(key, request, now_s, now_s + request.timeout_s)
        self._flights[key] = flight
        is_finished = False
        try:
            while not is_finished:
                await self._open(flight)
                async for part in self._parts(flight):
                    is_finished = part.finish_reason is not None
                    yield part
        finally:
            del self._flights[key]
            if not is_finished:
                self._cancel_at_driver(flight)

    async def _open(self, flight: Flight) -> None:
        """Start the next attempt on a replica that is whole, waiting for one if need be."""
        if flight.attempt:
            self._cancel_at_driver(flight)  # the next attempt may be another driver's
            flight.route = None
            await self._pause(flight)
        route = await self._await_route(flight)
        flight.attempt += 1
        flight.has_token = False
        flight.route = route
        flight.inbox = asyncio.Queue()
        request = flight.request
        message = Generate(
            sequence=flight.key,
            attempt=flight.attempt,
            epoch=route.epoch,
            replica=route.replica,
            prompt=request.prompt,
            emitted=flight.emitted,
            max_tokens=request.max_tokens,
            stop_token_ids=request.stop_token_ids,
            sampling=request.sampling,
            min_tokens=request.min_tokens,
            n_prompt_logprobs=request.n_prompt_logprobs,
            n_scored=flight.n_scored,
            priority=request.priority,
            timeout_s=max(0.0, flight.deadline_s - time.monotonic()),
        )
        if not self._courier.send(route.driver, message):
            flight.inbox.put_nowait(self._give_up(flight, "its driver cannot be reached", retry=True))

    async def _pause(self, flight: Flight) -> None:
        """Wait before another attempt, longer each time, unless the routes change."""
        changed = self._routes_changed
        pause_s = min(MAX_RETRY_PAUSE_S, RETRY_PAUSE_S * 2 ** min(flight.attempt, 10))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await changed.wait()

    async def _await_route(self, flight: Flight) -> Route:
        while (route := self._route(flight.failed)) is None:
            if flight.attempt == 0:
                raise self._blocker()
            left_s = flight.deadline_s - time.monotonic()
            if left_s <= 0:
                raise self._too_late(flight)
            changed = self._routes_changed
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(LOOK_FOR_ROUTE_S, left_s)):
                    await changed.wait()
        return route

    async def _parts(self, flight: Flight) -> AsyncGenerator[GenerationPart, None]:
        """Parts of the present attempt; ends early when another attempt must be made."""
        while True:
            message = await self._next_message(flight)
            if isinstance(message, Generated | PromptScored):
                if _is_late(flight, message):
                    self._cancel_at_driver(flight)
                    self._note_retry(
                        flight, self._give_up(flight, "tokens were lost on their way", retry=True)
                    )
                    return
                part = self._take(flight, message)
                if part is not None:
                    yield part
                if part is not None and part.finish_reason is not None:
                    return
            elif flight.error is not None:
                raise flight.error
            elif flight.is_cancelled:
                raise Closed(message.reason, code="cancelled")
            elif not message.retry:
                raise InvalidInput(message.reason)
            elif message.busy and not flight.emitted and self._waited_long(flight):
                raise Busy(
                    message.reason, code="queue_full", next_step="try again shortly", retry_after_s=1.0
                )
            else:
                self._note_retry(flight, message)
                return

    async def _next_message(self, flight: Flight) -> Generated | PromptScored | GenerateFailed:
        patience = Patience(SILENCE_S, time.monotonic())
        while not patience.is_over:
            left_s = flight.deadline_s - time.monotonic()
            if left_s <= 0:
                raise self._too_late(flight)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(LOOK_S, left_s)):
                    return await flight.inbox.get()
            patience.spend(time.monotonic())
            if patience.spent_s >= SUSPECT_S and not self._driver_is_heard(flight):
                self._cancel_at_driver(flight)
                return self._give_up(flight, "its driver's node is not heard", retry=True)
        self._cancel_at_driver(flight)
        return self._give_up(flight, f"its driver was silent for {SILENCE_S:.0f} s", retry=True)

    def _driver_is_heard(self, flight: Flight) -> bool:
        assert flight.route is not None
        return flight.route.driver == self._courier.node_id or self._is_heard(flight.route.driver)

    def _take(self, flight: Flight, message: Generated | PromptScored) -> GenerationPart | None:
        """The tokens or scores that the client does not have yet."""
        flight.has_token = True
        if isinstance(message, PromptScored):
            scores = message.scores[flight.n_scored - message.first : flight.n_to_score - message.first]
            flight.n_scored += len(scores)
            return GenerationPart(tokens=[], finish_reason=None, scores=scores) if scores else None
        new = message.tokens[max(0, len(flight.emitted) - message.first) :]
        flight.emitted.extend(token.token_id for token in new)
        if not new and message.finish_reason is None:
            return None
        return GenerationPart(tokens=new, finish_reason=message.finish_reason)

    def _note_retry(self, flight: Flight, failed: GenerateFailed) -> None:
        assert flight.route is not None
        replica = (flight.route.epoch, flight.route.replica)
        is_news = replica not in flight.failed
        flight.failed.add(replica)
        if is_news and not failed.busy:  # the same one is tried again while there is no other
            self._on_recovered()
            log.info(
                "request replayed request=%s attempt=%d output_tokens=%d reason=%s",
                flight.request.request_id,
                flight.attempt,
                len(flight.emitted),
                failed.reason,
            )

    def _give_up(self, flight: Flight, reason: str, *, retry: bool = False) -> GenerateFailed:
        return GenerateFailed(sequence=flight.key, attempt=flight.attempt, reason=reason, retry=retry)

    def _cancel_at_driver(self, flight: Flight) -> None:
        if flight.route is not None:
            cancel = GenerateCancel(sequence=flight.key, attempt=flight.attempt)
            self._courier.send(flight.route.driver, cancel)

    def _waited_long(self, flight: Flight) -> bool:
        return time.monotonic() - flight.started_s > MAX_BUSY_S

    def _too_late(self, flight: Flight) -> HexmeshError:
        blocker = self._blocker()
        waited_s = time.monotonic() - flight.started_s
        if isinstance(blocker, NotReady):
            return TimedOut(
                f"no answer within {waited_s:.0f} s: {blocker.message}", next_step=blocker.next_step
            )
        return TimedOut(
            f"no answer within {waited_s:.0f} s", next_step="ask for fewer tokens or a longer deadline"
        )


def _is_late(flight: Flight, message: Generated | PromptScored) -> bool:
    """Whether something that should have come before it was lost."""
    if isinstance(message, PromptScored):
        return message.first > flight.n_scored
    return message.first > len(flight.emitted) or flight.n_scored < flight.n_to_score
