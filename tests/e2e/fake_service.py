"""A fake node behind a real HTTP server: it "generates" the tokens of fixed texts and records what it got."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from aiohttp import ClientSession
from prometheus_client import CollectorRegistry

import hexmesh
from daemon.plan_order import PlanOrder
from daemon.views import (
    Blocker,
    CachedModelView,
    Issued,
    KvBlocksView,
    LinkView,
    MemberView,
    PlanningView,
    PlanView,
    Readiness,
    Removed,
    RequestView,
    StatusView,
    TokenView,
    TopologyView,
)
from daemon.web.access import HttpOptions
from daemon.web.http import HttpSurface
from daemon.web.service import GenerationPart, GenerationRequest, ServedModel, TokenSink
from daemon.web.telemetry import Telemetry
from daemon.web.text import TextCodec
from hexmesh.cluster import Cluster
from hexmesh.errors import Closed, HexmeshError, NoRoom
from hexmesh.model_spec import model_spec_from_config
from hexmesh.wire.data import SampledToken, ScoredToken
from hexmesh.wire.orders import NodeStanding, OrderAction
from hexmesh.workload import Workload

SHIPPED = Path(hexmesh.__file__).parent / "assets" / "model"
REPLY = "The mesh has 12 nodes, Köln 🦊 included."
EOS = 1
BLOCKER = Blocker(
    code="model_does_not_fit",
    message="the model needs 8 MiB and the mesh has 4 MiB",
    next_step="join another node",
    needed_bytes=8 * 2**20,
    room_bytes=4 * 2**20,
)


@dataclass
class FakeService:
    """Answers every choice with a text of `replies`, token by token, then the end token."""

    telemetry: Telemetry = field(default_factory=lambda: Telemetry(model_name="tiny", alias_vllm=True))
    replies: tuple[str, ...] = (REPLY,)
    tokens_a_part: int = 1
    max_model_tokens: int = 256
    n_cached: int = 0
    """Prompt tokens that the first choice is said to have found in the cache; later ones find all."""
    blocker: Blocker | None = None
    refusal: HexmeshError | None = None
    """Raised instead of a first token."""
    hang_after: int | None = None
    """After so many tokens of each answer there are no more, nor an end."""
    failure_after: tuple[int, Exception] | None = None
    delay_s: float = 0.0
    """Before the first token."""
    asked: list[GenerationRequest] = field(default_factory=list)
    ended: dict[str, float] = field(default_factory=dict)
    """Monotonic time at which each sequence's generator was closed or done."""
    n_hanging: int = 0
    """Sequences that wait at `hang_after`."""
    calls: list[tuple[str, object]] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _cancels: dict[str, asyncio.Event] = field(default_factory=dict)

    @property
    def codec(self) -> TextCodec:
        return shipped_codec()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Waits, at most 5 s, for a claim about sequences asked, hanging and ended."""
        async with asyncio.timeout(5):
            while not is_so():
                self._changed.clear()
                await self._changed.wait()

    @property
    def model(self) -> ServedModel:
        return ServedModel(
            name="tiny",
            root="shipped/tiny",
            folder=str(SHIPPED),
            created_s=1_700_000_000,
            max_model_tokens=self.max_model_tokens,
            vocab_size=1024,
            eos_token_ids=(EOS,),
        )

    @property
    def registry(self) -> CollectorRegistry:
        return self.telemetry.registry

    def readiness(self) -> Readiness:
        return Readiness(ready=self.blocker is None, blocker=self.blocker)

    def script(self, request: GenerationRequest) -> list[int]:
        text = self.replies[request.sampling.choice % len(self.replies)]
        reply = self.codec.encode(text, add_special_tokens=False)
        ends = EOS in request.stop_token_ids
        return [*reply, EOS] if ends else [*reply, EOS] * request.max_tokens

    def generate(self, request: GenerationRequest, sink: TokenSink) -> Callable[[], None]:
        task = asyncio.ensure_future(self._feed(request, sink))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return lambda: task.cancel() and None

    async def _feed(self, request: GenerationRequest, sink: TokenSink) -> None:
        parts = self._parts(request)
        while True:
            try:
                part = await anext(parts, None)
            except Exception as error:
                sink.fail(error)
                return
            if part is None:
                return
            sink.take(part)  # which may not raise

    async def _parts(self, request: GenerationRequest) -> AsyncIterator[GenerationPart]:
        self.asked.append(request)
        self._changed.set()
        cancelled = self._cancels.setdefault(request.request_id, asyncio.Event())
        try:
            await asyncio.sleep(self.delay_s)
            if self.refusal is not None:
                raise self.refusal
            if request.n_prompt_logprobs >= 0:
                for half in halves(request.prompt[1:]):
                    scores = [scored(token, request.n_prompt_logprobs) for token in half]
                    yield GenerationPart(tokens=[], finish_reason=None, scores=scores)
            tokens = self.script(request)
            n_tokens = min(len(tokens), request.max_tokens)
            for start in range(0, n_tokens, self.tokens_a_part):
                await self._stumble(start, cancelled)
                if cancelled.is_set():
                    raise Closed("cancelled by request", code="cancelled")
                drawn = tokens[start : min(start + self.tokens_a_part, n_tokens)]
                named = [i for i, token in enumerate(drawn) if token in request.stop_token_ids]
                drawn = drawn[: named[0] + 1] if named else drawn
                is_last = start + len(drawn) >= n_tokens
                yield GenerationPart(
                    tokens=[sampled(token, request.sampling.n_logprobs) for token in drawn],
                    finish_reason="stop" if named else "length" if is_last else None,
                    n_cached=self.n_cached if request.sampling.choice == 0 else len(request.prompt),
                )
                if named:
                    return
                await asyncio.sleep(0)
        finally:
            self.ended[request.sequence] = time.monotonic()
            self._changed.set()
            self._cancels.pop(request.request_id, None)

    async def _stumble(self, n_done: int, cancelled: asyncio.Event) -> None:
        if self.failure_after is not None and n_done >= self.failure_after[0]:
            raise self.failure_after[1]
        if self.hang_after is not None and n_done >= self.hang_after:
            self.n_hanging += 1
            self._changed.set()
            await cancelled.wait()

    def cancel(self, request_id: str) -> bool:
        if request_id not in self._cancels:
            return False
        self._cancels[request_id].set()
        return True

    def status(self) -> StatusView:
        return StatusView(
            node="n1",
            name="one",
            mesh="m1",
            model="tiny",
            ready=self.blocker is None,
            blocker=self.blocker,
            coordinator="n1",
            plan_id="plan-7",
            nodes_alive=1,
            requests_running=0,
            requests_waiting=0,
            kv_blocks=KvBlocksView(free=4, used=3, cached=2, leased=1),
        )

    async def models(self) -> list[CachedModelView]:
        return []

    def members(self) -> list[MemberView]:
        return [
            MemberView(
                id="n1",
                name="one",
                address="127.0.0.1:7701",
                site="here",
                state="alive",
                roles=[],
                version="0",
                age_s=0.5,
                rtt_s=None,
            )
        ]

    def links(self) -> list[LinkView]:
        return [
            LinkView(
                src="n1",
                dst="n2",
                rtt_p50_s=0.01,
                rtt_p95_s=0.02,
                bytes_per_s=1e9,
                lower_bound=False,
                age_s=1.0,
                relayed=False,
                in_use=True,
            )
        ]

    def topology(self) -> TopologyView:
        return TopologyView(
            mesh_id="m1",
            model="tiny",
            plan_id="plan-7",
            term=1,
            epoch=7,
            coordinator="n1",
            plan_reason="join",
            plan_age_s=2.0,
            nodes=[],
            replicas=[],
            flows=[],
            links=self.links(),
            bottleneck=None,
            unused=[],
        )

    def requests(self) -> list[RequestView]:
        return []

    def plan(self) -> PlanView:
        return PlanView(
            plan_id="plan-7",
            epoch=7,
            reason="join",
            model="tiny",
            dtype="float32",
            devices=[],
            replicas=[],
            predicted_tokens_per_s=None,
            predicted_batch=None,
            blocker=self.blocker,
            explanation=["one node"],
        )

    def planning(self) -> PlanningView:
        return PlanningView(
            model_id="1f" * 32,
            model_name="tiny",
            spec=model_spec_from_config(json.loads((SHIPPED / "config.json").read_text())),
            dtype="float32",
            max_model_tokens=self.max_model_tokens,
            workload=Workload(),
            cluster=Cluster(nodes=(), links=()),
            hosts={},
        )

    async def create_token(self, *, ttl_s: float, uses: int) -> Issued:
        self.calls.append(("token", (ttl_s, uses)))
        return Issued(token="hm1.x", join_command="hexmesh join", expires_s=ttl_s, uses=uses)

    def tokens(self) -> list[TokenView]:
        return [
            TokenView(id="ab12", uses=2, uses_left=1, expires_s=60.0, issuer="a" * 40, redeemed_by=["b" * 40])
        ]

    async def revoke_token(self, token_id: str) -> None:
        self.calls.append(("revoke", token_id))

    async def remove_node(self, name_or_id: str) -> Removed:
        self.calls.append(("remove", name_or_id))
        return Removed(id="b" * 40, name=name_or_id)

    async def replan(self, reason: str) -> None:
        self.calls.append(("replan", reason))

    async def order_plan(self, order: PlanOrder) -> None:
        self.calls.append(("order_plan", order))

    async def order(self, node: str, action: OrderAction, deadline_s: float) -> NodeStanding:
        self.calls.append(("order", (node, action, deadline_s)))
        if node == "full":
            raise NoRoom("no room", code="no_room", next_step="add some", needed_bytes=3, room_bytes=2)
        return NodeStanding(
            id="n2", name=node, availability="drained", stages=0, requests_left=0, drain_left_s=None
        )

    async def leave(self, *, forget: bool) -> None:
        self.calls.append(("leave", forget))


@cache
def shipped_codec() -> TextCodec:
    return TextCodec.load(SHIPPED)


def sampled(token_id: int, n_logprobs: int) -> SampledToken:
    """The token with made-up log-probabilities: itself first, then the ids after it."""
    if n_logprobs < 0:
        return SampledToken(token_id=token_id)
    top = [((token_id + n) % 1024, -0.5 - n) for n in range(n_logprobs)]
    return SampledToken(token_id=token_id, logprob=-0.5, top=top)


def scored(token_id: int, n_top: int) -> ScoredToken:
    """The prompt token as the second likeliest of made-up ones."""
    top = [((token_id + 1 - n) % 1024, -0.25 * (n + 1)) for n in range(n_top)]
    return ScoredToken(token_id=token_id, logprob=-0.5, rank=2, top=top)


def halves(tokens: list[int]) -> list[list[int]]:
    """As a prompt in two chunks."""
    middle = len(tokens) // 2
    return [half for half in (tokens[:middle], tokens[middle:]) if half]


@asynccontextmanager
async def serving(
    service: FakeService, **options: object
) -> AsyncIterator[tuple[HttpSurface, ClientSession]]:
    """A surface on a free loopback port and a client session with its URL as base."""
    chosen = HttpOptions(**{"port": 0, "shutdown_s": 0.2, **options})  # type: ignore[arg-type]
    async with (
        HttpSurface(service, chosen, service.telemetry) as surface,
        ClientSession(surface.url) as session,
    ):
        yield surface, session
