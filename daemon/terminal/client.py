"""The command line's way to a daemon: plain HTTP from the standard library, so that a verb starts at once.

Failures come as the error of `hexmesh.errors` that fits the HTTP status, with the daemon's own words.
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from daemon.config import HTTP_PORT, default_state_dir, read_secret
from daemon.runfile import ADMIN_KEY_FILE, read_run
from hexmesh.errors import Busy, HexmeshError, Internal, InvalidInput, Lost, NotReady, Refused, TimedOut

READ_TIMEOUT_S = 10.0
TOKEN_TIMEOUT_S = 300.0
"""Longest silence between two pieces of a streamed answer."""


@dataclass(frozen=True, slots=True)
class Client:
    """Speaks to one daemon. Every request is a connection of its own."""

    url: str
    api_key: str | None = field(default=None, repr=False)

    def get(
        self,
        path: str,
        *,
        key: str | None = None,
        also_ok: tuple[int, ...] = (),
        timeout_s: float = READ_TIMEOUT_S,
    ) -> bytes:
        """The body of `path`; a status in `also_ok` counts as an answer too. `key` replaces the API key."""
        with self._open("GET", path, None, key or self.api_key, timeout_s) as response:
            return self._whole(response, also_ok)

    def get_json(self, path: str, *, also_ok: tuple[int, ...] = (), timeout_s: float = READ_TIMEOUT_S) -> Any:
        """The JSON of `path`."""
        return self._decoded(self.get(path, also_ok=also_ok, timeout_s=timeout_s))

    def post(
        self, path: str, body: object, *, key: str | None = None, timeout_s: float = READ_TIMEOUT_S
    ) -> bytes:
        """The body of the answer to `body` as JSON; `key` is sent instead of the API key."""
        with self._open("POST", path, body, key or self.api_key, timeout_s) as response:
            return self._whole(response, ())

    def stream(self, path: str, body: object) -> Generator[bytes]:
        """The lines of the answer as they come, but blank ones. Closing the generator cancels the request."""
        with self._open("POST", path, body, self.api_key, TOKEN_TIMEOUT_S) as response:
            if response.status != 200:
                self._whole(response, ())
            try:
                for line in response:
                    if stripped := line.strip():
                        yield stripped
            except TimeoutError:
                raise TimedOut(f"{self.url} sent nothing for {TOKEN_TIMEOUT_S:.0f} s") from None
            except (OSError, http.client.HTTPException) as error:
                raise Lost(f"the connection to {self.url} broke: {_reason(error)}") from None
            if response.chunk_left == 0:  # torn between two chunks, which http.client takes for the end
                raise Lost(f"the connection to {self.url} broke: the answer has no end")

    @contextmanager
    def _open(
        self, method: str, path: str, body: object, key: str | None, timeout_s: float
    ) -> Iterator[http.client.HTTPResponse]:
        headers = {"Accept": "application/json"}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        if key:
            headers["Authorization"] = f"Bearer {key}"
        with closing(self._connection(timeout_s)) as connection:
            try:
                connection.request(method, path, body=data, headers=headers)
                response = connection.getresponse()
            except TimeoutError:
                raise TimedOut(f"{self.url} did not answer within {timeout_s:.0f} s") from None
            except ConnectionRefusedError:
                raise no_daemon(self.url) from None
            except (OSError, http.client.HTTPException) as error:
                raise Lost(
                    f"{self.url} cannot be reached: {_reason(error)}", next_step="check --url"
                ) from None
            yield response

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname or "", parts.port, timeout=timeout_s)

    def _whole(self, response: http.client.HTTPResponse, also_ok: tuple[int, ...]) -> bytes:
        try:
            body = response.read()
        except TimeoutError:
            raise TimedOut(f"{self.url} stopped in the middle of its answer") from None
        except (OSError, http.client.HTTPException) as error:
            raise Lost(f"the connection to {self.url} broke: {_reason(error)}") from None
        if 200 <= response.status < 300 or response.status in also_ok:
            return body
        raise error_of(response.status, body)

    def _decoded(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except ValueError:
            raise Lost(
                f"{self.url} answered something else than JSON", next_step="is it a hexmesh daemon?"
            ) from None


def client_for(url: str | None, state_dir: Path | None, api_key: str | None) -> Client:
    """A client of the daemon at `url`, or of the local one. Raises InvalidInput for what is no URL."""
    return Client(url=checked_url(url) if url else find_local_url(state_dir), api_key=api_key)


def find_local_url(state_dir: Path | None) -> str:
    """Where the local daemon says it listens, else where it would by default."""
    run = read_run(state_dir or default_state_dir(os.environ))
    return run.http_url if run else f"http://127.0.0.1:{HTTP_PORT}"


def read_admin_key(state_dir: Path | None) -> str:
    """The key that lets this user change the mesh. Raises Refused when it cannot be read."""
    path = (state_dir or default_state_dir(os.environ)) / ADMIN_KEY_FILE
    try:
        return read_secret(path, what="the admin key")
    except InvalidInput as error:
        raise Refused(
            error.message,
            code="no_admin_key",
            next_step="run this as the daemon's user, with its --state-dir",
        ) from None


def checked_url(url: str) -> str:
    """`url` without a trailing slash; HOST:PORT alone means http. Raises InvalidInput."""
    whole = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(whole)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise InvalidInput(f"--url {url!r} is not a URL", next_step="write one such as http://127.0.0.1:7700")
    return whole.rstrip("/")


def no_daemon(url: str) -> Lost:
    """The failure that nothing listens at `url`."""
    return Lost(
        f"no daemon answers at {url}",
        code="no_daemon",
        next_step="start one with `hexmesh join`, or name another with --url",
    )


def error_of(status: int, body: bytes) -> HexmeshError:
    """The failure that a daemon reported: in its words, sorted by the HTTP status."""
    said = _said(body)
    message = str(said.get("message") or f"the daemon answered HTTP {status}")
    code, next_step = str(said.get("code") or ""), str(said.get("next_step") or "")
    kind = _ERROR_OF_STATUS.get(status, HexmeshError)
    return kind(message, code=code, next_step=next_step)


def error_of_event(event: dict[str, Any]) -> HexmeshError:
    """The failure in a line of a stream; there the error's type stands for the HTTP status."""
    error = event["error"]
    kind = error.get("type") if isinstance(error, dict) else None
    return error_of(_STATUS_OF_TYPE.get(str(kind), 502), json.dumps(event).encode())


_ERROR_OF_STATUS: dict[int, type[HexmeshError]] = {
    400: InvalidInput,
    401: Refused,
    403: Refused,
    408: TimedOut,
    409: Refused,
    413: InvalidInput,
    422: InvalidInput,
    429: Busy,
    500: Internal,
    502: Lost,
    503: NotReady,
    504: TimedOut,
}
_STATUS_OF_TYPE = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "rate_limit_error": 429,
    "server_error": 500,
    "upstream_error": 502,
    "service_unavailable": 503,
    "timeout": 504,
}


def _said(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError:
        return {}
    if not isinstance(document, dict):
        return {}
    for name in ("error", "blocker"):
        inner = document.get(name)
        if isinstance(inner, dict):
            return inner
        if isinstance(inner, str):
            return {"message": inner}
    return document


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
