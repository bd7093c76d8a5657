"""The HTTP surface of a node: routes, keys, request ids, and every failure as OpenAI's error object.

`HttpSurface` serves while it is entered. It decides nothing about the mesh: all it knows comes from a
`MeshService`.

Request ids: each response carries X-Request-Id, the client's own or a fresh one. A generation request without
a seed draws with the seed that its request id stands for (`completer.seed_of`): the same id again, within ten
minutes or later, on any peer, uses the same seed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable
from types import TracebackType

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from daemon.runfile import local_http_url
from daemon.web.access import ARRIVED_S, REQUEST_ID, Access, Doorkeeper, Handler, HttpOptions
from daemon.web.admin import AdminRoutes
from daemon.web.capped_runner import CappedRunner
from daemon.web.completer import Completer
from daemon.web.generate_route import GenerateRoute
from daemon.web.http_errors import HttpFailure, error_response, from_http_exception, internal_error, invalid
from daemon.web.openai import OpenAiRoutes
from daemon.web.service import MeshService
from daemon.web.telemetry import Telemetry
from hexmesh.errors import HexmeshError, InvalidInput, NotReady
from hexmesh.ids import new_request_id

log = logging.getLogger("hexmesh.http")

REQUEST_ID_HEADER = "X-Request-Id"
_REQUEST_ID_PATTERN = re.compile(r"[!-~]{1,128}")
_CORS_HEADERS = {
    hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST, OPTIONS",
    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: "Authorization, Content-Type, X-Request-Id, *",
    hdrs.ACCESS_CONTROL_MAX_AGE: "600",
}


class HttpSurface:
    """A node's HTTP server; entered means listening. Owns its sockets and the requests under way on them."""

    def __init__(
        self,
        service: MeshService,
        options: HttpOptions,
        telemetry: Telemetry,
    ) -> None:
        """`telemetry` takes the requests' figures; /metrics shows `service.registry`, normally its own."""
        self._options = options
        self._doorkeeper = Doorkeeper(options)
        self._rng = random.SystemRandom()
        completer = Completer(service, telemetry, options)
        routes = (
            *OpenAiRoutes(completer).routes(),
            *GenerateRoute(completer).routes(),
            *AdminRoutes(service).routes(),
        )
        app = web.Application(
            middlewares=[self._name_request, self._answer_failures, self._check_source],
            client_max_size=options.max_body_bytes,
        )
        app.on_response_prepare.append(self._add_headers)
        for route in routes:
            add = {"GET": app.router.add_get, "POST": app.router.add_post}[route.method]
            add(_any_slashes(route.path), self._guarded(route.access, route.handler))
        # A client that goes away must cancel its handler, which closes the sequences it waits for.
        self._runner = CappedRunner(
            app,
            max_connections=options.max_connections,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=options.shutdown_s,
            keepalive_timeout=options.idle_s,
            logger=_protocol_log(),
        )

    @property
    def port(self) -> int:
        """The port that is listened on; known once entered."""
        return int(self._runner.addresses[0][1])

    @property
    def url(self) -> str:
        """A URL by which this machine reaches the surface."""
        return local_http_url(self._options.host, self.port)

    async def __aenter__(self) -> HttpSurface:
        """Raises NotReady when the port is taken and InvalidInput when the address is not this machine's."""
        await self._runner.setup()
        try:
            await web.TCPSite(
                self._runner, self._options.host, self._options.port, backlog=self._options.max_connections
            ).start()
        except OSError as error:
            await self._runner.cleanup()
            raise _bind_failure(error, self._options) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    @web.middleware
    async def _name_request(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get(REQUEST_ID_HEADER)
        usable = given if given is not None and _REQUEST_ID_PATTERN.fullmatch(given) else None
        request[REQUEST_ID] = usable or new_request_id(self._rng)
        request[ARRIVED_S] = time.perf_counter()
        if given is not None and usable is None:
            return error_response(
                invalid(
                    f"{REQUEST_ID_HEADER} takes 1 to 128 visible ASCII characters", param=REQUEST_ID_HEADER
                )
            )
        with self._runner.serving(request):
            return await handler(request)

    @web.middleware
    async def _answer_failures(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except HexmeshError as error:
            return error_response(error)
        except web.HTTPException as error:
            return error_response(from_http_exception(error, method=request.method, path=request.path))
        except ConnectionError:
            # The client is gone; what we return goes nowhere.
            return web.Response(status=499)
        except Exception:
            # The process edge: whatever it is, the client gets an error object and the log gets the trace.
            log.exception("request failed request=%s path=%s", request[REQUEST_ID], request.rel_url.raw_path)
            return error_response(internal_error())

    @web.middleware
    async def _check_source(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._doorkeeper.check_source(request)
        if request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers:
            return web.Response(status=204, headers=_CORS_HEADERS)
        return await handler(request)

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers[REQUEST_ID_HEADER] = request[REQUEST_ID]
        response.headers[hdrs.SERVER] = "hexmesh"
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and self._doorkeeper.allows_origin(origin, request.headers.get(hdrs.HOST, "")):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = f"{REQUEST_ID_HEADER}, {hdrs.RETRY_AFTER}"
            response.headers.add(hdrs.VARY, hdrs.ORIGIN)

    def _guarded(
        self, access: Access, handler: Handler
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def guarded(request: web.Request) -> web.StreamResponse:
            self._doorkeeper.check_key(request, access)
            if request.method == hdrs.METH_POST:
                await self._receive_body(request)
            return await handler(request)

        return guarded

    async def _receive_body(self, request: web.Request) -> None:
        """Have the whole body here, for `request.read()`. One that trickles in holds a connection no longer."""
        try:
            async with asyncio.timeout(self._options.body_s):
                await request.read()
        except TimeoutError:
            raise HttpFailure(
                408,
                f"the request body did not arrive within {self._options.body_s:.0f} s",
                code="body_too_slow",
                headers={hdrs.CONNECTION: "close"},
            ) from None


def _protocol_log() -> logging.Logger:
    """What aiohttp logs to, without a traceback for each line of garbage that a stranger sends."""
    logger = logging.getLogger("hexmesh.http.protocol")
    if not logger.filters:
        logger.addFilter(
            lambda record: not isinstance((record.exc_info or (None, None))[1], HttpProcessingError)
        )
    return logger


def _any_slashes(path: str) -> str:
    """A route pattern that also takes doubled and trailing slashes, which clients make from base URLs."""
    first, *others = path.strip("/").split("/")
    tail = "".join(f"{{slashes{n}:/+}}{step}" for n, step in enumerate(others, 1))
    return f"/{{slashes0:/*}}{first}{tail}{{slashes:/*}}"


def _bind_failure(error: OSError, options: HttpOptions) -> HexmeshError:
    where = f"{options.host}:{options.port}"
    match error.errno:
        case errno.EADDRINUSE:
            return NotReady(
                f"HTTP port {where} is in use",
                code="port_in_use",
                next_step="stop the other process, or give --http-port another port (0 picks a free one)",
            )
        case errno.EACCES | errno.EPERM:
            return InvalidInput(
                f"HTTP port {where} needs privileges", next_step="give --http-port a port from 1024 up"
            )
        case _:
            return InvalidInput(
                f"HTTP cannot listen on {where}: {error.strerror or error}",
                next_step="give --http-listen an address of this machine",
            )
