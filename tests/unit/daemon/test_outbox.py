"""The queue of one connection: bounded in bytes, first in first out, small frames joined."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.peering.outbox import Outbox, OutboxRules

REFUSES = OutboxRules(limit_bytes=100, drops_oldest=False)
DROPS = OutboxRules(limit_bytes=100, drops_oldest=True)

frames = st.lists(st.binary(min_size=1, max_size=60), max_size=30)


def drained(outbox: Outbox) -> bytes:
    taken = b""
    while parts := outbox.take():
        taken += b"".join(bytes(part) for part in parts)
    return taken


@given(frames)
def test_what_has_no_room_is_refused_and_the_rest_stays_in_order(data: list[bytes]) -> None:
    outbox = Outbox(REFUSES)
    taken = [frame for frame in data if outbox.put([frame], 0.0)]

    assert outbox.n_bytes == sum(map(len, taken)) <= 100
    assert drained(outbox) == b"".join(taken)
    assert (outbox.n_bytes, len(outbox)) == (0, 0)


@given(frames)
def test_or_the_oldest_make_room(data: list[bytes]) -> None:
    outbox = Outbox(DROPS)
    assert all(outbox.put([frame], 0.0) for frame in data)

    n_kept = len(outbox)
    kept = data[len(data) - n_kept :]
    assert outbox.n_bytes == sum(map(len, kept)) <= 100
    assert outbox.n_dropped == len(data) - n_kept
    if n_kept < len(data):
        assert outbox.n_bytes + len(data[-n_kept - 1]) > 100
    assert drained(outbox) == b"".join(kept)


@pytest.mark.parametrize("rules", [REFUSES, DROPS])
def test_a_frame_over_the_limit_fits_an_empty_queue(rules: OutboxRules) -> None:
    outbox = Outbox(rules)

    assert outbox.put([b"h", bytes(1000)], 0.0)
    assert outbox.put([b"small"], 0.0) == rules.drops_oldest


def test_a_large_payload_is_not_copied_and_small_frames_are_joined() -> None:
    outbox = Outbox(OutboxRules(limit_bytes=10**9, drops_oldest=False))
    payload = bytearray(1_000_000)
    outbox.put([b"a"], 0.0)
    outbox.put([b"b", b"c"], 0.0)
    outbox.put([b"head", payload], 0.0)
    outbox.put([b"d"], 0.0)

    assert outbox.take() == [b"abc"]
    head, large = outbox.take()
    assert head == b"head"
    assert large is payload
    assert outbox.take() == [b"d"]
    assert outbox.take() == []


def test_what_waited_too_long_is_dropped() -> None:
    outbox = Outbox(DROPS)
    for time_s in range(5):
        outbox.put([b"%d" % time_s], float(time_s))
    outbox.drop_older_than(3.0)

    assert drained(outbox) == b"34"
    assert outbox.n_dropped == 3


def test_clear() -> None:
    outbox = Outbox(DROPS)
    outbox.put([b"a"], 0.0)
    outbox.put([b"b"], 0.0)

    assert outbox.clear() == 2
    assert (outbox.take(), outbox.n_bytes) == ([], 0)
