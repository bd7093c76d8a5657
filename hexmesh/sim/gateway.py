"""Requests' lives, from their arrival to their end: routing, handing over, replaying.

Mirrors `daemon/gateway.py`. All requests enter at one gateway, which is at no distance from any driver. Where prompt
and output are computed by different replicas, the prompt's draws the first token and keeps the blocks leased; the
output's takes the request up when it has blocks for it; then the KV of each layer goes from who holds it there to who
holds it here, without passing anything where that is one host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from hexmesh.errors import Busy, InvalidInput
from hexmesh.score import handoff_bytes
from hexmesh.serving.batcher import Emission
from hexmesh.serving.sequence import Sequence as Tokens
from hexmesh.sim.events import Events
from hexmesh.sim.mesh import Mesh
from hexmesh.sim.network import Network, Way
from hexmesh.sim.replica import SimulatedReplica
from hexmesh.sim.routes import Route, Routes
from hexmesh.wire.data import SamplingParams

RETRY_PAUSE_S = 0.02
STRANDED_S = 1.0
"""Between two looks for a route of a request that has none."""
_SAMPLING = SamplingParams()
_NO_STOP = frozenset[int]()


@dataclass(slots=True, kw_only=True, eq=False)
class Flight:
    """A request under way; owned by the gateway. Equal only to itself."""

    key: str
    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    deadline_s: float
    is_resident: bool = False
    """It was there when the simulation began."""
    n_emitted: int = 0
    """Output tokens of attempts that were given up."""
    attempt: int = 0
    first_s: float = math.nan
    """When its first token came."""
    route: Route | None = None
    prefill: Tokens | None = None
    """In the replica that computes its prompt, up to the end of the handoff."""
    decode: Tokens | None = None
    """In the one that its KV goes to."""
    handed_s: float = 0.0
    """When the handoff began."""
    avoid: set[str] = field(default_factory=set)
    full: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Listener:
    """Who wants to know what becomes of requests."""

    on_tokens: Callable[[int], None]
    on_prompt: Callable[[], None]
    """A request has its first token."""
    on_served: Callable[[Flight], None]
    on_refused: Callable[[Flight], None]
    on_lost: Callable[[Flight], None]
    on_replayed: Callable[[Flight], None]
    on_handed_over: Callable[[float, float], None]
    """Bytes that crossed between hosts, and seconds."""


class Gateway:
    """Owns the requests under way."""

    def __init__(
        self,
        *,
        mesh: Mesh,
        routes: Routes,
        events: Events,
        network: Network,
        listener: Listener,
        max_model_tokens: int,
        kv_token_bytes: float,
    ) -> None:
        self._mesh = mesh
        self._routes = routes
        self._events = events
        self._network = network
        self._listener = listener
        self._max_model_tokens = max_model_tokens
        self._kv_token_bytes = kv_token_bytes
        """Of one layer."""
        self._flights: dict[str, Flight] = {}
        self._stranded: dict[Flight, None] = {}
        """Those that ran somewhere and have no route now."""
        self._token_ways: dict[Route, dict[Way, float]] = {}

    @property
    def n_flights(self) -> int:
        return len(self._flights)

    @property
    def n_without_route(self) -> int:
        return len(self._stranded)

    def arrive(self, flight: Flight) -> None:
        """A request comes in."""
        self._flights[flight.key] = flight
        if flight.prompt_tokens + flight.output_tokens > self._max_model_tokens:
            self._refuse(flight)
        else:
            self._open(flight)

    def place(self, flight: Flight, replica: str, n_emitted: int) -> None:
        """A request is in the middle of its output, its KV at hand."""
        self._flights[flight.key] = flight
        flight.n_emitted, flight.first_s, flight.attempt = n_emitted, self._events.now_s, 1
        flight.route = Route(replica, replica)
        self._routes.sent(flight.route, 0)
        flight.decode = self._tokens(flight, flight.output_tokens, awaits_kv=True)
        self._mesh.replicas[replica].submit(flight.decode)

    def take(self, replica: SimulatedReplica, emissions: list[Emission], n_tokens: int) -> None:
        """A replica drew tokens, so many in all; the last of each sequence are told."""
        self._listener.on_tokens(n_tokens)
        for emission in emissions:
            if emission.first and emission.finish_reason is None:
                continue
            flight = self._flights[emission.sequence.id]
            if math.isnan(flight.first_s):
                flight.first_s = self._events.now_s
                self._listener.on_prompt()
            if emission.finish_reason is None:
                continue
            if emission.sequence.n_output < flight.output_tokens:
                self._hand_over(flight)
            else:
                self._end(flight)
                self._listener.on_served(flight)

    def expire(self) -> None:
        """Let go of what is past its deadline."""
        now_s = self._events.now_s
        for replica in self._mesh.whole():
            for tokens in replica.batcher.expire(now_s):
                self._lose(self._flights[tokens.id])
        for flight in [one for one in self._stranded if one.deadline_s <= now_s]:
            self._lose(flight)

    def nodes_lost(self) -> None:
        """Replay what ran over replicas that are broken."""
        for flight in list(self._flights.values()):
            broken = {name for name in self._needed(flight) if self._mesh.replicas[name].is_dead}
            if broken:
                flight.avoid |= broken
                self._retry(flight)

    def routes_changed(self) -> None:
        """A replica came back: what waits looks for a route."""
        for flight in list(self._stranded):
            self._reopen(flight)

    # --- a request's life ---

    def _open(self, flight: Flight) -> None:
        route = self._find_route(flight)
        while route is not None and not self._submit(flight, route):
            flight.avoid.add(route.prefill)
            flight.full.add(route.prefill)
            route = self._find_route(flight)
            if route is not None and route.prefill in flight.full:
                break
        if flight.route is None and flight.key in self._flights:
            if flight not in self._stranded:
                self._refuse(flight)
            else:
                self._events.at(self._events.now_s + STRANDED_S, self._reopen, flight)

    def _find_route(self, flight: Flight) -> Route | None:
        return self._routes.choose(
            flight.prompt_tokens + flight.n_emitted,
            self._events.now_s,
            lost_nodes=self._mesh.lost_nodes,
            avoid=flight.avoid,
            may_wait=_may_wait(flight),
        )

    def _submit(self, flight: Flight, route: Route) -> bool:
        """Send the next attempt to a replica; False if its queue is full."""
        hands_over = route.prefill != route.decode
        n_wanted = flight.n_emitted + 1 if hands_over else flight.output_tokens
        flight.attempt += 1
        tokens = self._tokens(flight, n_wanted)
        if hands_over and n_wanted < flight.output_tokens:
            tokens.kept_s = math.inf
        replica = self._mesh.replicas[route.prefill]
        try:
            if not replica.is_dead:  # else it is sent, and nobody is there
                replica.submit(tokens)
        except Busy:
            return False
        except InvalidInput:
            self._refuse(flight)
            return True
        flight.route, flight.prefill, flight.decode = route, tokens, None
        self._stranded.pop(flight, None)
        self._routes.sent(route, len(tokens.tokens))
        return True

    def _tokens(self, flight: Flight, max_tokens: int, *, awaits_kv: bool = False) -> Tokens:
        return Tokens(
            id=flight.key,
            attempt=flight.attempt,
            tokens=[0] * (flight.prompt_tokens + flight.n_emitted),
            n_prompt=flight.prompt_tokens,
            max_tokens=max_tokens,
            stop_token_ids=_NO_STOP,
            sampling=_SAMPLING,
            deadline_s=flight.deadline_s,
            reuses_prefix=False,
            names_blocks=False,
            awaits_kv=awaits_kv,
        )

    def _reopen(self, flight: Flight) -> None:
        if flight in self._stranded:
            self._open(flight)

    def _retry(self, flight: Flight) -> None:
        """Give the attempt up and make another after a pause."""
        flight.n_emitted = self._n_output(flight)
        self._let_go(flight)
        self._stranded[flight] = None
        self._listener.on_replayed(flight)
        self._events.at(self._events.now_s + RETRY_PAUSE_S, self._reopen, flight)

    def _n_output(self, flight: Flight) -> int:
        tokens = flight.decode or flight.prefill
        return flight.n_emitted if tokens is None else tokens.n_output

    def _refuse(self, flight: Flight) -> None:
        self._end(flight)
        self._listener.on_refused(flight)

    def _lose(self, flight: Flight) -> None:
        self._end(flight)
        self._listener.on_lost(flight)

    def _end(self, flight: Flight) -> None:
        self._let_go(flight)
        self._stranded.pop(flight, None)
        del self._flights[flight.key]

    def _let_go(self, flight: Flight) -> None:
        """Nobody waits for this attempt any more."""
        route = flight.route
        if route is None:
            return
        for name, tokens in ((route.prefill, flight.prefill), (route.decode, flight.decode)):
            replica = self._mesh.replicas[name]
            if tokens is not None and not replica.is_dead:
                replica.batcher.cancel(tokens.id, tokens.attempt)
                replica.batcher.pool.end_lease(tokens.lease_id)
        for name in route.replicas if flight.decode is None else (route.decode,):
            self._routes.ended(name)
        flight.route = flight.prefill = flight.decode = None

    def _needed(self, flight: Flight) -> set[str]:
        """The replicas that its present attempt relies on."""
        route = flight.route
        if route is None:
            return set()
        return {route.decode} if flight.prefill is None else {route.prefill, route.decode}

    # --- handing over ---

    def _hand_over(self, flight: Flight) -> None:
        """Its prompt and first token are there: ask the other replica for blocks."""
        assert flight.route is not None
        flight.n_emitted = self._n_output(flight)
        flight.handed_s = self._events.now_s
        self._routes.ended(flight.route.prefill)
        flight.decode = self._tokens(flight, flight.output_tokens, awaits_kv=True)
        replica = self._mesh.replicas[flight.route.decode]
        if replica.is_dead:
            return  # until that is known
        try:
            replica.submit(flight.decode)
        except InvalidInput:
            self._refuse(flight)

    def send_kv(self, replica: SimulatedReplica, fetched: list[Tokens]) -> None:
        """A replica has blocks for these."""
        for tokens in fetched:
            flight = self._flights.get(tokens.id)
            if flight is None or flight.decode is not tokens or flight.prefill is None:
                self._receive(replica, tokens)
                continue
            assert flight.route is not None
            n_tokens = len(tokens.tokens) - 1 - tokens.n_computed
            ways = {way: n_tokens * each for way, each in self._ways(flight.route).items()}
            n_left = [len(ways)]
            arrived = partial(self._arrived, replica, flight, tokens, sum(ways.values()), n_left)
            for way, n_bytes in ways.items():
                self._network.send_bulk(way, n_bytes, arrived)
            if not ways:
                n_left[0] = 1
                self._events.at(self._events.now_s, arrived)

    def _arrived(
        self,
        replica: SimulatedReplica,
        flight: Flight,
        tokens: Tokens,
        n_bytes: float,
        n_left: list[int],
    ) -> None:
        """One way has brought its part of a sequence's KV."""
        n_left[0] -= 1
        if n_left[0]:
            return
        if flight.decode is not tokens or flight.prefill is None or flight.route is None:
            self._receive(replica, tokens)  # given up
            return
        source = self._mesh.replicas[flight.route.prefill]
        if source.is_dead:  # which the gateway will know soon
            replica.batcher.cancel(tokens.id)
        self._receive(replica, tokens)
        if source.is_dead:
            return
        source.batcher.pool.end_lease(flight.prefill.lease_id)
        source.send_soon()
        flight.prefill = None
        self._listener.on_handed_over(n_bytes, self._events.now_s - flight.handed_s)

    def _receive(self, replica: SimulatedReplica, tokens: Tokens) -> None:
        replica.batcher.received(tokens)
        replica.send_soon()

    def _ways(self, route: Route) -> dict[Way, float]:
        """Bytes of one token's KV by way."""
        ways = self._token_ways.get(route)
        if ways is None:
            p, d = (self._mesh.replicas[name].replica.stages for name in (route.prefill, route.decode))
            ways = self._token_ways[route] = handoff_bytes(p, d, self._kv_token_bytes)
        return ways


def _may_wait(flight: Flight) -> bool:
    """Who ran somewhere already has waited: a place in any queue will do."""
    return bool(flight.n_emitted) or bool(flight.avoid - flight.full)
