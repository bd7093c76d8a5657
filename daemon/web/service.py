"""What the HTTP surface needs from a node: the seam between `daemon.web.http` and the rest of the daemon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec
from prometheus_client import CollectorRegistry

from daemon.plan_order import PlanOrder
from daemon.views import (
    CachedModelView,
    Issued,
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
from hexmesh.wire.data import FinishReason, SampledToken, SamplingParams, ScoredToken
from hexmesh.wire.orders import NodeStanding, OrderAction


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One sequence to generate. `sequence` is unique for request id and choice."""

    request_id: str
    sequence: str
    prompt: list[int]
    max_tokens: int
    stop_token_ids: list[int]
    sampling: SamplingParams
    timeout_s: float
    min_tokens: int = 0
    n_prompt_logprobs: int = -1
    """0 or more: score the prompt too, naming as many of the likeliest tokens at each position."""
    priority: int = 0
    """Lower comes first."""


class GenerationPart(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """New tokens, or scores of the prompt, which come before any token; the last part carries the finish reason."""

    tokens: list[SampledToken]
    finish_reason: FinishReason | None
    n_cached: int = 0
    """Prompt tokens whose KV was found in the cache, told with the first tokens."""
    scores: list[ScoredToken] = []
    """Of the prompt's tokens after the first, in order."""


class TokenSink(Protocol):
    """Takes what one sequence brings, at once: whoever calls has many others to serve.

    A part with a finish reason is the last call, and so is `fail`. Neither may raise.
    """

    def take(self, part: GenerationPart) -> None: ...

    def fail(self, error: Exception) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The mesh's model as the HTTP surface shows it. Tokenizer files lie in `folder`."""

    name: str
    root: str
    folder: str
    created_s: int
    max_model_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]

    def with_context(self, max_model_tokens: int) -> ServedModel:
        """The same model with room for another context length."""
        return replace(self, max_model_tokens=max_model_tokens)


class MeshService(Protocol):
    """A running node, seen from its HTTP surface."""

    @property
    def model(self) -> ServedModel:
        """Raises NotReady while this node does not know its mesh's model yet."""
        ...

    @property
    def registry(self) -> CollectorRegistry: ...

    def readiness(self) -> Readiness: ...

    def generate(self, request: GenerationRequest, sink: TokenSink) -> Callable[[], None]:
        """Start a sequence; what is returned ends it early, and does nothing after its end.

        Raises NotReady or Busy when it cannot start; fails later with those, Lost or TimedOut, and with Closed
        after `cancel`. A token of `stop_token_ids` that ends the sequence is the last token of the last part.
        """
        ...

    def cancel(self, request_id: str) -> bool:
        """Cancel all sequences of a request; False when there is none of that id here."""
        ...

    def status(self) -> StatusView: ...

    def members(self) -> list[MemberView]: ...

    def links(self) -> list[LinkView]: ...

    def topology(self) -> TopologyView: ...

    def requests(self) -> list[RequestView]: ...

    def plan(self) -> PlanView: ...

    def planning(self) -> PlanningView: ...

    async def models(self) -> list[CachedModelView]: ...

    async def create_token(self, *, ttl_s: float, uses: int) -> Issued: ...

    def tokens(self) -> list[TokenView]: ...

    async def revoke_token(self, token_id: str) -> None: ...

    async def remove_node(self, name_or_id: str) -> Removed:
        """Cast a node out of the mesh for good."""
        ...

    async def replan(self, reason: str) -> None: ...

    async def order_plan(self, order: PlanOrder) -> None:
        """Plan for what an operator wants, or carry out the plan given. Raises InvalidInput or Refused."""
        ...

    async def order(self, node: str, action: OrderAction, deadline_s: float) -> NodeStanding:
        """Have the node of that name or id carry out an operator's order, or show where it stands.

        Raises InvalidInput, Refused, Lost or TimedOut.
        """
        ...

    async def leave(self, *, forget: bool) -> None:
        """Begin a clean leave; the process ends soon after."""
        ...
