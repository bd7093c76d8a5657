"""Which peer fetches what: everything once, nothing lost with a peer, and slow peers overtaken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hexmesh.weights.fetch_queue import SLOW_S, FetchQueue
from hexmesh.weights.manifest import Chunk

CHUNKS = {Chunk(tensor, part): 4 for tensor in range(4) for part in range(2)}


def everything(tensor: int) -> bool:
    return True


def test_peers_share_the_work_in_order() -> None:
    queue = FetchQueue(CHUNKS)
    first = queue.take("a", everything, max_bytes=12, max_chunks=64, now_s=0.0)
    second = queue.take("b", everything, max_bytes=100, max_chunks=4, now_s=0.0)
    assert first == [Chunk(0, 0), Chunk(0, 1), Chunk(1, 0)]
    assert second == [Chunk(1, 1), Chunk(2, 0), Chunk(2, 1), Chunk(3, 0)]


def test_a_chunk_larger_than_asked_for_comes_alone() -> None:
    queue = FetchQueue(CHUNKS)
    assert queue.take("a", everything, max_bytes=1, max_chunks=64, now_s=0.0) == [Chunk(0, 0)]


def test_a_peer_is_asked_for_what_it_holds() -> None:
    queue = FetchQueue(CHUNKS)
    assert queue.take("a", {2}.__contains__, 100, 64, 0.0) == [Chunk(2, 0), Chunk(2, 1)]
    assert queue.take("a", {2}.__contains__, 100, 64, 0.0) == []


def test_what_a_lost_peer_owed_goes_to_the_next_one_first() -> None:
    queue = FetchQueue(CHUNKS)
    owed = queue.take("a", everything, 8, 64, 0.0)
    queue.done(owed[0])
    queue.give_back("a", owed)
    assert queue.take("b", everything, 8, 64, 0.0) == [Chunk(0, 1), Chunk(1, 0)]


def test_at_the_end_a_slow_peer_is_overtaken_once() -> None:
    queue = FetchQueue({Chunk(0, 0): 4})
    queue.take("slow", everything, 100, 64, 0.0)
    assert queue.take("quick", everything, 100, 64, SLOW_S - 0.1) == []
    assert queue.take("slow", everything, 100, 64, SLOW_S) == []
    assert queue.take("quick", everything, 100, 64, SLOW_S) == [Chunk(0, 0)]
    assert queue.take("third", everything, 100, 64, SLOW_S + 0.1) == []
    assert queue.done(Chunk(0, 0))
    assert not queue.done(Chunk(0, 0))
    queue.give_back("slow", [Chunk(0, 0)])
    assert (queue.is_done, queue.done_bytes) == (True, 4)


@given(st.data())
def test_whatever_peers_do_every_chunk_is_done_once(data: st.DataObject) -> None:
    queue = FetchQueue(CHUNKS)
    owed: dict[str, list[Chunk]] = {"a": [], "b": [], "c": []}
    holders = {"a": {0, 1}, "b": {1, 2, 3}, "c": {0, 3}}
    done: list[Chunk] = []
    now_s = 0.0
    for _ in range(200):
        if queue.is_done:
            break
        peer = data.draw(st.sampled_from(sorted(owed)))
        now_s += data.draw(st.sampled_from([0.0, 0.1, SLOW_S]))
        match data.draw(st.sampled_from(["take", "bring", "bring", "lose"])):
            case "take":
                taken = queue.take(peer, holders[peer].__contains__, 8, 64, now_s)
                assert all(chunk.tensor in holders[peer] for chunk in taken)
                assert not set(taken) & set(done)
                owed[peer] += taken
            case "bring" if owed[peer]:
                chunk = owed[peer].pop(0)
                if queue.done(chunk):
                    done.append(chunk)
            case "lose":
                queue.give_back(peer, owed[peer])
                owed[peer] = []
            case _:
                pass
    for peer, chunks in owed.items():
        queue.give_back(peer, chunks)
    for peer in owed:
        while taken := queue.take(peer, holders[peer].__contains__, 8, 64, now_s):
            done += [chunk for chunk in taken if queue.done(chunk)]
    assert sorted(done) == sorted(CHUNKS)
    assert (queue.is_done, queue.done_bytes) == (True, queue.total_bytes)
