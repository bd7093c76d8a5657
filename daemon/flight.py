"""One sequence under way at the gateway: what was asked, where it runs, what the client has of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from daemon.web.service import GenerationRequest, TokenSink
from hexmesh.wire.control import Epoch


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request can go now: a replica of the committed epoch and the node that drives it."""

    epoch: Epoch
    replica: str
    driver: str
    nodes: frozenset[str]
    """Every node that holds a stage of the replica."""


@dataclass(slots=True, eq=False)
class Flight:
    """Owned by the gateway that it entered at. Without a route it waits for one."""

    key: str
    """The sequence's name on the wire: two peers may be given the same request id at the same time."""
    request: GenerationRequest
    sink: TokenSink
    started_s: float
    deadline_s: float
    attempt: int = 0
    sent_s: float = 0.0
    """When the present attempt was sent to its driver."""
    has_token: bool = False
    """Whether the present attempt has brought a token."""
    n_missed: int = 0
    """Lists of its driver in a row, the last ones, that lacked it."""
    emitted: list[int] = field(default_factory=list)
    n_scored: int = 0
    """Tokens of the prompt whose scores the client has."""
    route: Route | None = None
    failed: set[tuple[Epoch, str]] = field(default_factory=set)
    """Replicas that an attempt failed on: others come first."""
    full: set[tuple[Epoch, str]] = field(default_factory=set)
    """Those of them that had no place in their queue."""

    @property
    def n_to_score(self) -> int:
        """Tokens of the prompt whose scores are wanted in all."""
        return len(self.request.prompt) - 1 if self.request.n_prompt_logprobs >= 0 else 0

    @property
    def n_tokens(self) -> int:
        """What its KV takes when it starts now."""
        return len(self.request.prompt) + len(self.emitted)
