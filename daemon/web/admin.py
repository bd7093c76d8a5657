"""Routes for operators: liveness, readiness, metrics, the read verbs and those that change the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import msgspec
from aiohttp import hdrs, web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from daemon.plan_order import PlanOrder
from daemon.web.access import Handler, Route
from daemon.web.http_errors import invalid
from daemon.web.openai_models import (
    AnyBody,
    LeaveBody,
    NodeBody,
    NodeOrderBody,
    ReplanBody,
    TokenBody,
    TokenIdBody,
    parse_body,
)
from daemon.web.service import MeshService
from hexmesh import __version__
from hexmesh.wire.orders import OperatorAction


class AdminRoutes:
    """Handlers over the node itself. Reads are the same JSON as the command line's `-o json`."""

    def __init__(self, service: MeshService) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        service = self._service
        reads: dict[str, Callable[[], Any]] = {
            "status": service.status,
            "members": service.members,
            "links": service.links,
            "topology": service.topology,
            "requests": service.requests,
            "plan": service.plan,
            "planning": service.planning,
        }
        return [
            *(Route("GET", path, "open", alive) for path in ("/health", "/live", "/ping")),
            Route("GET", "/ready", "open", self.ready),
            Route("GET", "/version", "open", version),
            Route("GET", "/metrics", "open", self.metrics),
            *(Route("GET", f"/admin/{verb}", "api", _reader(read)) for verb, read in reads.items()),
            Route("GET", "/admin/models", "api", self.models),
            Route("POST", "/admin/token", "admin", self.create_token),
            Route("GET", "/admin/tokens", "admin", _reader(service.tokens)),
            Route("POST", "/admin/token/revoke", "admin", self.revoke_token),
            Route("POST", "/admin/node/remove", "admin", self.remove_node),
            Route("POST", "/admin/replan", "admin", self.replan),
            Route("POST", "/admin/plan", "admin", self.order_plan),
            Route("POST", "/admin/leave", "admin", self.leave),
            Route("GET", "/admin/node", "api", self.show_node),
            *(
                Route("POST", f"/admin/node/{action}", "admin", self._orderer(action))
                for action in get_args(OperatorAction)
            ),
        ]

    async def ready(self, request: web.Request) -> web.Response:
        """200 exactly when this peer can route a request end to end now; else the blocker."""
        readiness = self._service.readiness()
        response = _json(readiness, status=200 if readiness.ready else 503)
        if not readiness.ready:
            response.headers[hdrs.RETRY_AFTER] = "2"
        return response

    async def models(self, request: web.Request) -> web.Response:
        return _json(await self._service.models())

    async def metrics(self, request: web.Request) -> web.Response:
        return exposition(self._service.registry, accept=request.headers.get(hdrs.ACCEPT, ""))

    async def create_token(self, request: web.Request) -> web.Response:
        body = await _body_or_defaults(request, TokenBody)
        return _json(await self._service.create_token(ttl_s=body.ttl_s, uses=body.uses))

    async def revoke_token(self, request: web.Request) -> web.Response:
        body = parse_body(TokenIdBody, await request.read())
        await self._service.revoke_token(body.id)
        return _json({"revoked": body.id})

    async def remove_node(self, request: web.Request) -> web.Response:
        body = parse_body(NodeBody, await request.read())
        return _json(await self._service.remove_node(body.node))

    async def replan(self, request: web.Request) -> web.Response:
        body = await _body_or_defaults(request, ReplanBody)
        await self._service.replan(body.reason)
        return _json({"accepted": True, "reason": body.reason}, status=202)

    async def order_plan(self, request: web.Request) -> web.Response:
        try:
            order = msgspec.json.decode(await request.read(), type=PlanOrder)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise invalid(f"no order for plans: {error}", param=None) from None
        await self._service.order_plan(order)
        return _json({"accepted": True, "reason": order.reason}, status=202)

    async def show_node(self, request: web.Request) -> web.Response:
        node = request.query.get("node")
        if not node:
            raise invalid("?node= takes a node's name or id", param="node")
        return _json(await self._service.order(node, "show", 0.0))

    def _orderer(self, action: OperatorAction) -> Handler:
        async def handler(request: web.Request) -> web.Response:
            body = parse_body(NodeOrderBody, await request.read())
            return _json(await self._service.order(body.node, action, body.deadline_s))

        return handler

    async def leave(self, request: web.Request) -> web.Response:
        body = await _body_or_defaults(request, LeaveBody)
        await self._service.leave(forget=body.forget)
        return _json({"leaving": True, "forget": body.forget}, status=202)


async def alive(request: web.Request) -> web.Response:
    return _json({"status": "ok"})


async def version(request: web.Request) -> web.Response:
    return _json({"version": __version__})


def exposition(registry: CollectorRegistry, *, accept: str) -> web.Response:
    """The registry in the text format that the scraper asks for."""
    encode, content_type = choose_encoder(accept)
    return web.Response(body=encode(registry), headers={hdrs.CONTENT_TYPE: content_type})


def _reader(read: Callable[[], Any]) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return _json(read())

    return handler


async def _body_or_defaults(request: web.Request, shape: type[AnyBody]) -> AnyBody:
    """An absent body means the defaults."""
    return parse_body(shape, await request.read() or b"{}")


def _json(value: object, *, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")
