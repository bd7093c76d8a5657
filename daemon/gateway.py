"""Where a request enters: keeps prompt, output and seed until the end, and replays them when a replica breaks.

Attempts are numbered; tokens of an older attempt are dropped, and so are tokens that the client has already. A
request ends with its tokens or with an error that names the blocker, within its deadline.

Nothing waits here: a message of a driver is handed on to the clients' sinks at once, and one look a tenth of a
second watches over all sequences. Messages may be lost. A gap in a sequence's tokens shows that, and so does the
list that a driver sends of what it holds; a driver that sends neither tokens nor lists is given up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from typing import Protocol

from daemon.courier import Courier
from daemon.flight import Flight, Route
from daemon.web.http_errors import CANCELLED
from daemon.web.service import GenerationPart, GenerationRequest, TokenSink
from hexmesh.errors import Closed, HexmeshError, InvalidInput, NotReady, TimedOut
from hexmesh.serving.watchdog import LOOK_S, SUSPECT_S, Patience
from hexmesh.wire.control import Epoch
from hexmesh.wire.data import (
    Generate,
    GenerateCancel,
    Generated,
    GenerateFailed,
    HeldSequence,
    Holding,
    PromptScored,
    SequenceTokens,
)

log = logging.getLogger("hexmesh.gateway")

SILENCE_S = 5.0
"""A driver that sends nothing for so long, not even its list, is given up: its sequences are tried again."""
MAX_MISSED = 3
"""So many lists in a row may lack a sequence: it may be on its way to the driver still, if not for long."""
MAX_CANCELS = 256
"""In answer to one list; the next comes in a second."""
RETRY_PAUSE_S = 0.02
MAX_RETRY_PAUSE_S = 0.5


class Router(Protocol):
    """Where requests go, as this node knows the mesh."""

    def route(self, n_tokens: int, avoid: Set[tuple[Epoch, str]], *, may_wait: bool) -> Route | None:
        """For a sequence of so many tokens so far, rather not to a replica to `avoid`.

        None when no replica is whole, or when all are full and it may not wait.
        """
        ...

    def refusal(self) -> HexmeshError:
        """Why there is no route for a new request now."""
        ...


class Gateway:
    """Owns the sequences that entered at this node."""

    def __init__(
        self,
        *,
        courier: Courier,
        router: Callable[[], Router],
        on_recovered: Callable[[], None],
        is_heard: Callable[[str], bool],
    ) -> None:
        self._courier = courier
        self._router = router
        self._on_recovered = on_recovered
        self._is_heard = is_heard
        self._flights: dict[str, Flight] = {}
        self._patience: dict[str, Patience] = {}
        """With each driver that is asked for something."""
        self._next_look: asyncio.TimerHandle | None = None

    def flights(self) -> list[Flight]:
        """Every sequence under way."""
        return list(self._flights.values())

    def generate(self, request: GenerationRequest, sink: TokenSink) -> Callable[[], None]:
        """Start a sequence; see `MeshService.generate`."""
        key = f"{self._courier.node_id}/{request.sequence}"
        if key in self._flights:
            raise InvalidInput(
                f"request {request.request_id} is under way already", next_step="use another X-Request-Id"
            )
        now_s = time.monotonic()
        flight = Flight(key, request, sink, now_s, now_s + request.timeout_s)
        route = self._find_route(flight)
        if route is None:
            raise self._router().refusal()
        self._flights[key] = flight
        self._open(flight, route)
        if self._next_look is None:
            self._next_look = asyncio.get_running_loop().call_later(LOOK_S, self._look)
        return lambda: self._leave(flight)

    def cancel(self, request_id: str) -> bool:
        """End all sequences of a request; False when there is none."""
        flights = [flight for flight in self.flights() if flight.request.request_id == request_id]
        for flight in flights:
            self._fail(flight, Closed("cancelled by request", code=CANCELLED))
        return bool(flights)

    def end_all(self, error: HexmeshError) -> None:
        """This node goes: what has not ended fails with `error`."""
        for flight in self.flights():
            self._fail(flight, error)

    def routes_changed(self) -> None:
        """A plan was committed, or a node came or went: requests that wait look for a route again."""
        for flight in self.flights():
            self._reopen(flight)

    def node_lost(self, node: str, reason: str) -> None:
        """Replay what ran over a node that is gone."""
        for flight in self.flights():
            if flight.route is not None and node in flight.route.nodes:
                self._retry(flight, reason)
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
        for flight in self._driven_by(node):
            self._retry(flight, reason)

    # --- what drivers say; of another node or an older attempt it is dropped ---

    def on_tokens(self, src: str, message: Generated) -> None:
        """What one step of a driver drew for sequences of ours."""
        self._was_heard(src)
        for answer in message.answers:
            flight = self._meant(src, answer.sequence, answer.attempt)
            if flight is not None:
                self._take(flight, answer)

    def on_scores(self, src: str, message: PromptScored) -> None:
        """A driver has scored a part of a prompt."""
        self._was_heard(src)
        flight = self._meant(src, message.sequence, message.attempt)
        if flight is None:
            return
        if message.first > flight.n_scored:
            self._retry(flight, "scores were lost on their way")
            return
        flight.has_token = True
        scores = message.scores[flight.n_scored - message.first : flight.n_to_score - message.first]
        if scores:
            flight.n_scored += len(scores)
            flight.sink.take(GenerationPart(tokens=[], finish_reason=None, scores=scores))

    def on_failed(self, src: str, message: GenerateFailed) -> None:
        """A driver gives an attempt up."""
        self._was_heard(src)
        flight = self._meant(src, message.sequence, message.attempt)
        if flight is None:
            return
        if not message.retry:
            self._fail(flight, InvalidInput(message.reason), tells_driver=False)
        elif message.busy:
            self._try_another(flight, message.reason)
        else:
            self._retry(flight, message.reason)

    def on_holding(self, src: str, message: Holding) -> None:
        """What a driver holds of ours: repairs what lost messages left on either side."""
        self._was_heard(src)
        held = {one.sequence: one for one in message.sequences}
        for flight in self._driven_by(src):
            known = held.get(flight.key)
            if known is None or known.attempt != flight.attempt:
                flight.n_missed += 1
                if flight.n_missed >= MAX_MISSED:
                    self._retry(flight, "its driver does not have it any more")
            else:
                flight.n_missed = 0
                if known.n_output > len(flight.emitted):
                    self._retry(flight, "tokens were lost on their way")
        unwanted = [one for one in message.sequences if not self._wants(one)]
        for one in unwanted[:MAX_CANCELS]:
            self._courier.send(src, GenerateCancel(sequence=one.sequence, attempt=one.attempt))

    def _wants(self, held: HeldSequence) -> bool:
        flight = self._flights.get(held.sequence)
        return flight is not None and flight.attempt <= held.attempt

    # --- a sequence's life ---

    def _find_route(self, flight: Flight) -> Route | None:
        # Who has tokens already has waited: a place in any queue will do.
        may_wait = bool(flight.emitted) or bool(flight.failed - flight.full)
        return self._router().route(flight.n_tokens, flight.failed, may_wait=may_wait)

    def _open(self, flight: Flight, route: Route) -> None:
        """Send the next attempt to a driver."""
        flight.attempt += 1
        flight.has_token = False
        flight.n_missed = 0
        flight.route = route
        flight.sent_s = time.monotonic()
        if route.driver not in self._patience:
            self._patience[route.driver] = Patience(SILENCE_S, time.monotonic())
        request = flight.request
        message = Generate(
            sequence=flight.key,
            attempt=flight.attempt,
            epoch=route.epoch,
            replica=route.replica,
            prompt=request.prompt,
            emitted=list(flight.emitted),
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
            self._retry(flight, "its driver cannot be reached")

    def _reopen(self, flight: Flight) -> None:
        """Try to start the next attempt of a sequence that waits for a route."""
        is_waiting = flight.route is None and self._is_under_way(flight)
        if is_waiting and (route := self._find_route(flight)) is not None:
            self._open(flight, route)

    def _take(self, flight: Flight, answer: SequenceTokens) -> None:
        """Hand on the tokens that the client does not have yet."""
        n_emitted = len(flight.emitted)
        if answer.first > n_emitted or flight.n_scored < flight.n_to_score:
            self._retry(flight, "tokens were lost on their way")
            return
        flight.has_token = True
        new = answer.tokens[n_emitted - answer.first : flight.request.max_tokens - answer.first]
        if not new and answer.finish_reason is None:
            return
        for token in new:
            flight.emitted.append(token.token_id)
        if answer.finish_reason is not None:
            del self._flights[flight.key]
        flight.sink.take(
            GenerationPart(tokens=new, finish_reason=answer.finish_reason, n_cached=answer.n_cached)
        )

    def _try_another(self, flight: Flight, reason: str) -> None:
        """Its driver's queue is full: ask the next one now, and refuse the request if there is none."""
        assert flight.route is not None
        replica = (flight.route.epoch, flight.route.replica)
        flight.failed.add(replica)
        flight.full.add(replica)
        if flight.emitted:
            self._retry(flight, reason, is_news=False)
            return
        route = self._find_route(flight)
        if route is None or (route.epoch, route.replica) in flight.full:
            self._fail(flight, self._router().refusal(), tells_driver=False)
        else:
            self._open(flight, route)

    def _retry(self, flight: Flight, reason: str, *, is_news: bool = True) -> None:
        """Give the present attempt up and make another after a pause, longer each time."""
        if flight.route is None:
            return
        self._note_failure(flight, flight.route, reason, is_news=is_news)
        self._cancel_at_driver(flight)
        flight.route = None
        pause_s = min(MAX_RETRY_PAUSE_S, RETRY_PAUSE_S * 2 ** min(flight.attempt, 10))
        asyncio.get_running_loop().call_later(pause_s, self._reopen, flight)

    def _note_failure(self, flight: Flight, route: Route, reason: str, *, is_news: bool) -> None:
        replica = (route.epoch, route.replica)
        if is_news and replica not in flight.failed:  # the same one is tried again while there is no other
            self._on_recovered()
            log.info(
                "request replayed request=%s attempt=%d output_tokens=%d reason=%s",
                flight.request.request_id,
                flight.attempt,
                len(flight.emitted),
                reason,
            )
        flight.failed.add(replica)

    def _leave(self, flight: Flight) -> None:
        """Nobody waits for it any more."""
        if self._is_under_way(flight):
            del self._flights[flight.key]
            self._cancel_at_driver(flight)

    def _fail(self, flight: Flight, error: HexmeshError, *, tells_driver: bool = True) -> None:
        if not self._is_under_way(flight):
            return  # it left with another sequence of its request
        del self._flights[flight.key]
        if tells_driver:
            self._cancel_at_driver(flight)
        flight.sink.fail(error)

    def _is_under_way(self, flight: Flight) -> bool:
        return self._flights.get(flight.key) is flight

    def _cancel_at_driver(self, flight: Flight) -> None:
        if flight.route is not None:
            cancel = GenerateCancel(sequence=flight.key, attempt=flight.attempt)
            self._courier.send(flight.route.driver, cancel)

    # --- watching ---

    def _look(self) -> None:
        """Look after all sequences: deadlines, silent drivers, and routes that came back without any news."""
        now_s = time.monotonic()
        self._next_look = None
        for flight in self.flights():
            if now_s >= flight.deadline_s:
                self._fail(flight, self._too_late(flight))
            else:
                self._reopen(flight)
        drivers = {flight.route.driver for flight in self._flights.values() if flight.route is not None}
        self._patience = {node: self._patience[node] for node in drivers}
        for node, patience in list(self._patience.items()):
            patience.spend(now_s)
            if (why := self._why_given_up(node, patience)) is not None:
                for flight in self._driven_by(node):
                    self._retry(flight, why)
        if self._flights:
            self._next_look = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def _why_given_up(self, driver: str, patience: Patience) -> str | None:
        if patience.is_over:
            return f"its driver was silent for {SILENCE_S:.0f} s"
        is_here = driver == self._courier.node_id
        if patience.spent_s >= SUSPECT_S and not is_here and not self._is_heard(driver):
            return "its driver's node is not heard"
        return None

    def _was_heard(self, driver: str) -> None:
        if driver in self._patience:
            self._patience[driver] = Patience(SILENCE_S, time.monotonic())

    def _driven_by(self, node: str) -> list[Flight]:
        flights = self._flights.values()
        return [one for one in flights if one.route is not None and one.route.driver == node]

    def _meant(self, src: str, sequence: str, attempt: int) -> Flight | None:
        """The flight that `src` may speak of, as the driver of its present attempt."""
        flight = self._flights.get(sequence)
        if flight is None or flight.attempt != attempt or flight.route is None:
            return None
        return flight if flight.route.driver == src else None

    def _too_late(self, flight: Flight) -> HexmeshError:
        waited_s = time.monotonic() - flight.started_s
        if flight.route is None and isinstance(why := self._router().refusal(), NotReady):
            return TimedOut(f"no answer within {waited_s:.0f} s: {why.message}", next_step=why.next_step)
        return TimedOut(
            f"no answer within {waited_s:.0f} s", next_step="ask for fewer tokens or a longer deadline"
        )
