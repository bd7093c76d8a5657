"""The command line's client: a stream that its daemon broke off is not taken for a whole one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from daemon.terminal.client import Client
from hexmesh.errors import Lost

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LINE = b'6\r\n"one"\n\r\n'


@contextmanager
def answering(*pieces: bytes) -> Iterator[Client]:
    """A server that sends exactly this to one request and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                asked = b""
                while not asked.endswith(b"{}"):  # what is left unread would turn the end into a reset
                    asked += connection.recv(65536)
                for piece in pieces:
                    connection.sendall(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        yield Client(url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join(timeout=5)


def test_a_whole_stream_ends_quietly() -> None:
    with answering(HEAD, LINE, b"0\r\n\r\n") as client:
        assert list(client.stream("/generate", {})) == [b'"one"']


@pytest.mark.parametrize("torn", [b"", b"6\r\n", b'6\r\n"t'])
def test_a_stream_without_its_last_chunk_is_lost(torn: bytes) -> None:
    with answering(HEAD, LINE, torn) as client, pytest.raises(Lost, match="broke"):
        list(client.stream("/generate", {}))
