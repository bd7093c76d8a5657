"""A node as its HTTP surface sees it: `daemon.web.service.MeshService` on the node's parts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from daemon.gateway import Gateway
from daemon.mesh_state import MeshState
from daemon.mesh_views import MeshViews
from daemon.models.node_weights import NodeWeights
from daemon.orders import NodeOrders
from daemon.plan_order import PlanOrder
from daemon.trust.desk import TrustDesk
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
from daemon.web.service import GenerationRequest, ServedModel, TokenSink
from hexmesh.wire.orders import NodeStanding, OrderAction


class NodeService:
    """Delegates; decides nothing."""

    def __init__(
        self,
        *,
        model: ServedModel,
        state: MeshState,
        views: MeshViews,
        weights: NodeWeights,
        gateway: Gateway,
        trust: TrustDesk,
        orders: NodeOrders,
        registry: CollectorRegistry,
        ask_to_leave: Callable[[bool], None],
    ) -> None:
        self._model = model
        self._state = state
        self._views = views
        self._weights = weights
        self._gateway = gateway
        self._trust = trust
        self._orders = orders
        self._registry = registry
        self._ask_to_leave = ask_to_leave

    @property
    def model(self) -> ServedModel:
        """The mesh's model; its context is what every replica's KV pool can hold, so that any can replay it."""
        plan = self._state.plan_now()
        if plan is None:
            return self._model
        room_tokens = min(replica.kv_blocks * replica.block_tokens for replica in plan.replicas)
        return self._model.with_context(min(self._model.max_model_tokens, room_tokens))

    @property
    def registry(self) -> CollectorRegistry:
        return self._registry

    def readiness(self) -> Readiness:
        return self._state.readiness()

    def generate(self, request: GenerationRequest, sink: TokenSink) -> Callable[[], None]:
        if self._state.is_leaving:
            raise self._state.refusal()
        return self._gateway.generate(request, sink)

    def cancel(self, request_id: str) -> bool:
        return self._gateway.cancel(request_id)

    def status(self) -> StatusView:
        return self._views.status()

    def members(self) -> list[MemberView]:
        return self._views.members()

    def links(self) -> list[LinkView]:
        return self._views.link_views()

    def topology(self) -> TopologyView:
        return self._views.topology()

    def requests(self) -> list[RequestView]:
        return self._views.requests()

    def plan(self) -> PlanView:
        return self._views.plan()

    def planning(self) -> PlanningView:
        return self._views.planning()

    async def models(self) -> list[CachedModelView]:
        return await asyncio.to_thread(self._weights.models)

    async def create_token(self, *, ttl_s: float, uses: int) -> Issued:
        return await asyncio.to_thread(self._trust.admission.create_token, ttl_s=ttl_s, uses=uses)

    def tokens(self) -> list[TokenView]:
        return self._trust.admission.tokens()

    async def revoke_token(self, token_id: str) -> None:
        await asyncio.to_thread(self._trust.admission.revoke_token, token_id)

    async def remove_node(self, name_or_id: str) -> Removed:
        return await self._trust.remove(name_or_id)

    async def replan(self, reason: str) -> None:
        self._state.coordination.replan(reason)

    async def order_plan(self, order: PlanOrder) -> None:
        self._state.coordination.obey(order)

    async def order(self, node: str, action: OrderAction, deadline_s: float) -> NodeStanding:
        return await self._orders.give(node, action, deadline_s)

    async def leave(self, *, forget: bool) -> None:
        self._ask_to_leave(forget)
