"""Who may call which route of the HTTP surface: keys, hosts, origins."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, assert_never
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from daemon.web.http_errors import HttpFailure
from hexmesh.errors import InvalidInput

Access = Literal["open", "api", "admin"]
"""open: anyone; api: an API key, if there are any, or the admin key; admin: the admin key, always."""

REQUEST_ID = web.RequestKey("id", str)
"""The request's name: the client's X-Request-Id or a fresh one."""
ARRIVED_S = web.RequestKey("arrived_s", float)
"""When the request arrived, on the performance counter."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One method and path of the surface, who may call it, and what answers."""

    method: Literal["GET", "POST"]
    path: str
    access: Access
    handler: Handler


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """How the HTTP surface listens, whom it serves and how long it waits."""

    host: str = "127.0.0.1"
    port: int = 7700
    """0 picks a free one."""
    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    """None: the routes that change the mesh refuse everyone."""
    is_open: bool = False
    """--no-auth: serve other hosts without keys."""
    cors_origins: tuple[str, ...] = ()
    """Web origins that may call from a browser without keys, beside this host's own."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names, beside loopback ones and addresses, that reach a keyless loopback surface."""
    max_body_bytes: int = 8 * 2**20
    timeout_s: float = 600.0
    """Longest life of one generation request."""
    keep_alive_s: float = 5.0
    """Longest silence on an event stream before a comment is sent."""
    write_timeout_s: float = 30.0
    """How long a client may stop reading its answer before it counts as gone."""
    idle_s: float = 20.0
    """How long a connection may take to send a request's head; also how long it is kept between requests."""
    body_s: float = 30.0
    """How long a request's body may take to arrive."""
    max_connections: int = 2048
    """Room for what replicas take and for those that are told to come back later."""
    shutdown_s: float = 3.0
    """How long closing waits for answers under way."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise InvalidInput(f"--http-port {self.port} is not a port", next_step="give 0 to 65535")
        if not (self.api_keys or self.is_open or is_loopback(self.host)):
            raise InvalidInput(
                f"--http-listen {self.host} would serve other hosts without a key",
                next_step="give --api-key-file F, or --no-auth to serve everyone",
            )


def read_api_keys(path: Path) -> tuple[str, ...]:
    """One key a line; blank lines and lines that start with # do not count. Raises InvalidInput."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"--api-key-file {path} cannot be read: {error}") from error
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise InvalidInput(f"--api-key-file {path} holds no key", next_step="write one key a line")
    if bad := next((n for n, key in enumerate(keys, 1) if not key.isascii() or " " in key), None):
        raise InvalidInput(f"key {bad} of --api-key-file {path} has characters that no HTTP header can carry")
    return keys


class Doorkeeper:
    """Judges requests by the options. Keys are compared by digest in constant time."""

    def __init__(self, options: HttpOptions) -> None:
        self._options = options
        self._api_digests = [_digest(key) for key in options.api_keys]
        self._admin_digest = None if options.admin_key is None else _digest(options.admin_key)
        self._checks_hosts = is_loopback(options.host) and not options.api_keys

    def check_key(self, request: web.Request, access: Access) -> None:
        """Raises HttpFailure 401 or 403 unless the request may have this access."""
        match access:
            case "open":
                return
            case "api":
                if self._api_digests:
                    self._check_bearer(
                        request, [*self._api_digests, *self._admin_digests()], wrong_status=401
                    )
            case "admin":
                if self._admin_digest is None:
                    raise HttpFailure(403, "this node has no admin key", code="no_admin_key")
                self._check_bearer(request, self._admin_digests(), wrong_status=403)
            case _:
                assert_never(access)

    def check_source(self, request: web.Request) -> None:
        """Refuses what a web page may send behind its user's back: foreign Host names and Origins.

        A surface with API keys needs neither check: pages cannot know the key, and no cookies count.
        """
        if self._checks_hosts and not self._is_own_host(request.headers.get(hdrs.HOST, "")):
            raise HttpFailure(
                403,
                "this surface is for this machine only and was addressed by a foreign Host name",
                code="host_not_allowed",
                next_step="use http://127.0.0.1, or allow the name in the daemon's options",
            )
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and not self.allows_origin(origin, request.headers.get(hdrs.HOST, "")):
            raise HttpFailure(
                403,
                f"web pages of {origin[:100]} may not call this node without an API key",
                code="origin_not_allowed",
            )

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether pages of `origin` may call and read answers."""
        if (
            self._options.api_keys
            or "*" in self._options.cors_origins
            or origin in self._options.cors_origins
        ):
            return True
        _, _, source = origin.partition("://")
        return source == host or is_loopback(_host_name(source))

    def _admin_digests(self) -> list[bytes]:
        return [] if self._admin_digest is None else [self._admin_digest]

    def _check_bearer(self, request: web.Request, digests: list[bytes], *, wrong_status: int) -> None:
        scheme, _, key = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise HttpFailure(
                401,
                "no key given",
                code="missing_api_key",
                next_step="send Authorization: Bearer <key>",
                headers={hdrs.WWW_AUTHENTICATE: "Bearer"},
            )
        given = _digest(key.strip())
        if not any([hmac.compare_digest(given, digest) for digest in digests]):
            raise HttpFailure(wrong_status, "this key is not valid here", code="invalid_api_key")

    def _is_own_host(self, host: str) -> bool:
        name = _host_name(host)
        return not name or _is_address(name) or is_loopback(name) or name in self._options.allowed_hosts


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def _host_name(host_and_port: str) -> str:
    try:
        return urlsplit(f"//{host_and_port}").hostname or ""
    except ValueError:
        return "invalid."


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
