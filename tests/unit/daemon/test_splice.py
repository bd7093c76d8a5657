"""Two connections joined: every byte and every end passes, and nothing piles up or starves."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from daemon.peering import splice
from daemon.peering.splice import BUFFER_BYTES, Splice

KERNEL_BYTES = 4 * 2**20
"""More than four socket buffers hold."""


@dataclass
class Ends:
    """The outer ends of two socket pairs whose inner ends are joined."""

    one: socket.socket
    other: socket.socket
    splice: Splice
    ended: list[Splice]


@contextmanager
def joined(**options: object) -> Iterator[Ends]:
    one, inner_one = socket.socketpair()
    other, inner_other = socket.socketpair()
    for sock in (one, inner_one, other, inner_other):
        sock.setblocking(False)
    ended: list[Splice] = []
    made = Splice(inner_one, inner_other, ended.append, **options)  # type: ignore[arg-type]
    try:
        yield Ends(one, other, made, ended)
    finally:
        made.close()
        one.close()
        other.close()


async def receive(sock: socket.socket, n_bytes: int) -> bytes:
    received = b""
    async with asyncio.timeout(10):
        while len(received) < n_bytes:
            chunk = await asyncio.get_running_loop().sock_recv(sock, n_bytes - len(received))
            assert chunk, "it ended early"
            received += chunk
    return received


async def test_bytes_pass_both_ways_after_what_was_there_before() -> None:
    loop = asyncio.get_running_loop()
    there, back = random.Random(1).randbytes(3_000_001), random.Random(2).randbytes(2_000_001)
    with joined(to_one=b"hello one", to_other=b"hello other") as ends:
        answers = await asyncio.gather(
            receive(ends.other, 11 + len(there)),
            receive(ends.one, 9 + len(back)),
            loop.sock_sendall(ends.one, there),
            loop.sock_sendall(ends.other, back),
        )
        assert answers[0] == b"hello other" + there
        assert answers[1] == b"hello one" + back
        assert ends.splice.n_bytes == 20 + len(there) + len(back)


async def test_an_end_of_one_side_is_passed_on_and_the_other_may_still_speak() -> None:
    loop = asyncio.get_running_loop()
    with joined() as ends:
        await loop.sock_sendall(ends.one, b"last words")
        ends.one.shutdown(socket.SHUT_WR)
        assert await receive(ends.other, 10) == b"last words"
        assert await loop.sock_recv(ends.other, 1) == b""
        await loop.sock_sendall(ends.other, b"answer")
        assert await receive(ends.one, 6) == b"answer"
        assert ends.ended == []
        ends.other.shutdown(socket.SHUT_WR)
        assert await loop.sock_recv(ends.one, 1) == b""
        await asyncio.sleep(0)
        assert ends.ended == [ends.splice]


async def test_one_that_does_not_read_stops_the_one_that_writes() -> None:
    with joined() as ends:
        n_sent = 0
        for _ in range(100):
            await asyncio.sleep(0)
            try:
                n_sent += ends.one.send(bytes(2**20))
            except BlockingIOError:
                continue
        assert BUFFER_BYTES < n_sent < KERNEL_BYTES
        assert len(await receive(ends.other, n_sent)) == n_sent


async def test_a_circuit_under_load_leaves_turns_to_another() -> None:
    loop = asyncio.get_running_loop()
    with joined() as greedy, joined() as small:
        pouring = asyncio.create_task(loop.sock_sendall(greedy.one, bytes(64 * 2**20)))
        draining = asyncio.create_task(receive(greedy.other, 64 * 2**20))
        for n in range(20):
            await loop.sock_sendall(small.one, bytes([n]))
            assert await receive(small.other, 1) == bytes([n])
        assert not draining.done(), "the load was over too soon to tell"
        for task in (pouring, draining):
            task.cancel()
        await asyncio.wait((pouring, draining))


async def test_what_is_silent_for_long_is_ended_and_what_speaks_is_not() -> None:
    loop = asyncio.get_running_loop()
    with joined(idle_s=0.2) as silent, joined(idle_s=0.2) as speaking:
        started_s = loop.time()
        while not silent.ended:
            assert loop.time() - started_s < 10
            await loop.sock_sendall(speaking.one, b"x")
            await receive(speaking.other, 1)
            await asyncio.sleep(0.02)
        assert speaking.ended == []
        assert await loop.sock_recv(silent.one, 1) == b""


async def test_one_that_hangs_on_after_the_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splice, "LINGER_S", 0.05)
    with joined() as ends:
        ends.one.close()
        deadline_s = asyncio.get_running_loop().time() + 10
        while not ends.ended:
            assert asyncio.get_running_loop().time() < deadline_s
            await asyncio.sleep(0.01)
