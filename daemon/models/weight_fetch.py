"""Fetches chunks of tensors from several peers at once, each over a connection and a thread of its own.

A chunk counts once its SHA-256 is the manifest's. A peer that sends something else is named in the log and left alone
for a while; one that is gone, stands still or is too slow gives its chunks back to the others, and is tried again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

from daemon.models.cached_model import CachedModel
from daemon.models.niceness import be_nice
from daemon.peering.bulk import BulkSocket
from hexmesh.errors import HexmeshError, InvalidInput, Lost, NotReady, Refused
from hexmesh.ids import NodeId
from hexmesh.units import show_bytes, show_duration
from hexmesh.weights.fetch_queue import FetchQueue
from hexmesh.weights.manifest import Chunk
from hexmesh.wire.codec import BULK_ANSWERS, BULK_QUESTIONS
from hexmesh.wire.frames import Frame
from hexmesh.wire.weights import (
    ANSWER_LIMITS,
    MAX_CHUNKS,
    QUESTION_LIMITS,
    Blob,
    WantChunks,
    WantHoldings,
)

log = logging.getLogger("hexmesh.weights")
progress_log = logging.getLogger("hexmesh.progress")

MAX_PEERS = 4
"""Fetched from at once."""
STALL_S = 10.0
"""No byte for so long, and the peer's chunks go to others."""
RANGE_S = 120.0
"""A question must be answered whole by then."""
GIVE_UP_S = 600.0
"""No chunk from anybody for so long: the fetch fails."""
_QUESTION_BYTES = 8 * 1024 * 1024
_QUESTIONS_AHEAD = 2
_LEFT_ALONE_S = 60.0
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 10.0
_NOTHING_PAUSE_S = 2.0
_LONGEST_BREAK_S = 0.5
"""Between two chunks while requests run."""
_TICK_S = 0.2
_SAY_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class WeightPeer:
    """A node that may have tensors."""

    node_id: NodeId
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchProgress:
    """How far a fetch is. `trouble` says why nothing comes."""

    done_bytes: int
    total_bytes: int
    bytes_per_s: float
    peers: tuple[str, ...]
    trouble: str | None

    @property
    def left_s(self) -> float | None:
        """What it will still take at this rate."""
        return (self.total_bytes - self.done_bytes) / self.bytes_per_s if self.bytes_per_s > 0 else None

    def one_line(self) -> str:
        left = f", {show_duration(self.left_s)} left" if self.left_s is not None else ""
        where = f" from {', '.join(self.peers)}" if self.peers else ""
        why = f"; {self.trouble}" if self.trouble else ""
        return (
            f"{show_bytes(self.done_bytes)} of {show_bytes(self.total_bytes)}, "
            f"{show_bytes(self.bytes_per_s)}/s{left}{where}{why}"
        )


@dataclass(slots=True)
class _PeerState:
    is_active: bool = False
    n_failures: int = 0
    not_before_s: float = 0.0


@dataclass(slots=True)
class _Question:
    chunks: list[Chunk]
    deadline_s: float


@dataclass(slots=True, kw_only=True)
class WeightFetch:
    """One fetch of some chunks of one model; owner of its queue. `peers` gives whom to ask, the best first."""

    model_id: str
    model: CachedModel
    chunks: dict[Chunk, int]
    peers: Callable[[], Sequence[WeightPeer]]
    dial: Callable[[NodeId], Awaitable[BulkSocket]]
    on_progress: Callable[[FetchProgress], None]
    is_busy: Callable[[], bool] = lambda: False
    """Whether this node runs steps of requests: then half of the time is theirs."""
    _queue: FetchQueue = field(init=False)
    _left: Counter[int] = field(init=False)
    """Chunks that each tensor still lacks."""
    _unclaimed: set[Chunk] = field(init=False)
    """Chunks that nobody has begun to write."""
    _finisher: ThreadPoolExecutor = field(init=False)
    _lock: Lock = field(default_factory=Lock)
    _states: dict[NodeId, _PeerState] = field(default_factory=dict)
    _trouble: str | None = None
    _failure: HexmeshError | None = None
    _came_s: float = 0.0
    """When a chunk came last, on the monotonic clock."""

    def __post_init__(self) -> None:
        self._queue = FetchQueue(self.chunks)
        self._left = Counter(chunk.tensor for chunk in self.chunks)
        self._unclaimed = set(self.chunks)
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="finish-weights", initializer=be_nice)

    async def run(self) -> None:
        """Return once all chunks are on the disk. Raises NotReady for a disk that is full, Lost when nobody helps."""
        pool = ThreadPoolExecutor(MAX_PEERS, thread_name_prefix="fetch-weights", initializer=be_nice)
        speed = _Speed()
        self._came_s = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                uses: list[asyncio.Task[None]] = []
                while not self._queue.is_done and self._failure is None:
                    for peer in self._peers_to_start():
                        uses.append(group.create_task(self._use(peer, pool), name=f"fetch-from-{peer.name}"))
                    self._tell(speed)
                    await asyncio.sleep(_TICK_S)
                for use in uses:  # one may be dialling a host that hangs, or be overtaken
                    use.cancel()
                if self._failure is not None:
                    raise self._failure
        except* HexmeshError as group_error:
            raise group_error.exceptions[0] from None
        finally:
            for one in (pool, self._finisher):
                one.shutdown(wait=False, cancel_futures=True)
        self._tell(speed, is_last=True)

    # --- in the event loop ---

    def _peers_to_start(self) -> list[WeightPeer]:
        now_s = time.monotonic()
        if now_s - self._came_s > GIVE_UP_S:
            raise Lost(
                f"no weights came for {GIVE_UP_S:.0f} s: {self._trouble or 'no node answers'}",
                code="weights_unavailable",
                next_step="start a node that has the model's folder",
            )
        peers = self.peers()
        if not peers:
            self._trouble = "no other node is known"
        n_free = MAX_PEERS - sum(state.is_active for state in self._states.values())
        ready = []
        for peer in peers:
            state = self._states.setdefault(peer.node_id, _PeerState())
            if not state.is_active and state.not_before_s <= now_s:
                ready.append(peer)
        for peer in ready[:n_free]:
            self._states[peer.node_id].is_active = True
        return ready[:n_free]

    async def _use(self, peer: WeightPeer, pool: ThreadPoolExecutor) -> None:
        """Fetch from one peer until nothing is left for it or it fails; it may be started again later."""
        state = self._states[peer.node_id]
        pause_s = _NOTHING_PAUSE_S
        try:
            await self._pull_in_thread(peer, pool)
            state.n_failures = 0
        except Refused as error:
            log.warning("weights from node=%s refused reason=%s", peer.name, error.message)
            self._trouble, pause_s = error.message, _LEFT_ALONE_S
        except NotReady as error:  # of this node's disk
            self._failure = error
        except HexmeshError as error:
            state.n_failures += 1
            pause_s = min(_FIRST_PAUSE_S * 2 ** (state.n_failures - 1), _LONGEST_PAUSE_S)
            self._trouble = f"{peer.name}: {error.message}"
            log.info("weights from node=%s interrupted reason=%s", peer.name, error.message)
        finally:
            state.is_active = False
            state.not_before_s = time.monotonic() + pause_s

    async def _pull_in_thread(self, peer: WeightPeer, pool: ThreadPoolExecutor) -> None:
        sock = await self.dial(peer.node_id)
        pulling = asyncio.get_running_loop().run_in_executor(pool, self._pull, sock, peer)
        try:
            await asyncio.shield(pulling)
        except asyncio.CancelledError:
            sock.abort()
            await asyncio.wait([pulling])  # it writes into files that the next fetch may use
            pulling.exception()  # looked at: that it was cut off is this node's own doing
            raise

    def _tell(self, speed: _Speed, *, is_last: bool = False) -> None:
        now_s = time.monotonic()
        done_bytes, total_bytes = self._queue.done_bytes, self._queue.total_bytes
        active = {node for node, state in self._states.items() if state.is_active}
        now = FetchProgress(
            done_bytes=done_bytes,
            total_bytes=total_bytes,
            bytes_per_s=speed.of(done_bytes, now_s),
            peers=tuple(peer.name for peer in self.peers() if peer.node_id in active),
            trouble=None if active or is_last else self._trouble,
        )
        self.on_progress(now)
        if speed.is_time_to_say(now_s, is_last=is_last):
            progress_log.info(
                "%s weights: %s",
                "fetched" if is_last else "fetching",
                now.one_line(),
                extra={"event": "weights"},
            )

    # --- in a peer's thread ---

    def _pull(self, sock: BulkSocket, peer: WeightPeer) -> None:
        asked: deque[_Question] = deque()
        try:
            with sock:
                sock.prepare(ANSWER_LIMITS, STALL_S)
                holds = self._ask_holdings(sock)
                while self._failure is None and self._ask_ahead(sock, peer, holds, asked):
                    question = asked[0]
                    while question.chunks:
                        began_s = time.monotonic()
                        self._take_answer(sock.receive(question.deadline_s), question.chunks[0], peer, holds)
                        del question.chunks[0]
                        if self.is_busy():
                            time.sleep(min(time.monotonic() - began_s, _LONGEST_BREAK_S))
                    asked.popleft()
        finally:
            with self._lock:
                self._queue.give_back(
                    peer.node_id, [chunk for question in asked for chunk in question.chunks]
                )

    def _ask_holdings(self, sock: BulkSocket) -> set[int]:
        sock.send(BULK_QUESTIONS.frame(WantHoldings(model_id=self.model_id), limits=QUESTION_LIMITS))
        bits = read_blob(sock.receive(time.monotonic() + RANGE_S))
        n_tensors = len(self.model.manifest.tensors)
        if len(bits) != -(-n_tensors // 8):
            raise InvalidInput("an answer of the wrong length", code="bad_message")
        return {tensor for tensor in range(n_tensors) if bits[tensor // 8] >> tensor % 8 & 1}

    def _ask_ahead(
        self, sock: BulkSocket, peer: WeightPeer, holds: set[int], asked: deque[_Question]
    ) -> bool:
        """Keep some questions on their way, so that the link never idles; False when there is nothing to wait for."""
        while len(asked) < _QUESTIONS_AHEAD:
            now_s = time.monotonic()
            with self._lock:
                chunks = self._queue.take(
                    peer.node_id, holds.__contains__, _QUESTION_BYTES, MAX_CHUNKS, now_s
                )
            if not chunks:
                break
            asked.append(_Question(chunks, now_s + RANGE_S))
            question = WantChunks(
                model_id=self.model_id, chunks=[(chunk.tensor, chunk.part) for chunk in chunks]
            )
            sock.send(BULK_QUESTIONS.frame(question, limits=QUESTION_LIMITS))
        return bool(asked)

    def _take_answer(self, frame: Frame, chunk: Chunk, peer: WeightPeer, holds: set[int]) -> None:
        try:
            data = read_blob(frame)
        except Lost:
            holds.discard(chunk.tensor)
            with self._lock:
                self._queue.give_back(peer.node_id, [chunk])
            return
        tensor = self.model.manifest.tensors[chunk.tensor]
        start, stop = tensor.chunk_range(chunk.part)
        if len(data) != stop - start or not self.model.manifest.is_genuine(
            chunk, hashlib.sha256(data).digest()
        ):
            raise Refused(
                f"{peer.name} sent a damaged range: tensor {tensor.name}, bytes {start} to {stop}; "
                "`hexmesh model verify` there finds the file",
                code="corrupt_range",
            )
        self._store(chunk, data)

    def _store(self, chunk: Chunk, data: memoryview) -> None:
        with self._lock:
            if chunk not in self._unclaimed:  # another peer was faster
                return
            self._unclaimed.remove(chunk)
        self.model.write(chunk, data)
        with self._lock:
            self._left[chunk.tensor] -= 1
            is_whole = self._left[chunk.tensor] == 0
        if is_whole:  # writing it out takes long: meanwhile more may come
            self._finisher.submit(self._finish, chunk)
        else:
            self._note_done(chunk)

    def _finish(self, last: Chunk) -> None:
        try:
            self.model.finish(last.tensor)
        except HexmeshError as error:
            self._failure = error
        else:
            self._note_done(last)

    def _note_done(self, chunk: Chunk) -> None:
        with self._lock:
            self._queue.done(chunk)
            self._came_s = time.monotonic()


def read_blob(frame: Frame) -> memoryview:
    """The payload of an answer. Raises Lost where the peer says it has none."""
    answer = BULK_ANSWERS.decode(frame.header)
    if isinstance(answer, Blob):
        return frame.payload
    raise Lost(answer.reason, code="not_here")


class _Speed:
    """Rate over the last seconds, and when to say something."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._said_s = 0.0

    def of(self, done_bytes: int, now_s: float) -> float:
        self._seen.append((now_s, done_bytes))
        while len(self._seen) > 2 and now_s - self._seen[0][0] > _SAY_EVERY_S:
            self._seen.popleft()
        began_s, began_bytes = self._seen[0]
        return (done_bytes - began_bytes) / (now_s - began_s) if now_s > began_s else 0.0

    def is_time_to_say(self, now_s: float, *, is_last: bool) -> bool:
        if not is_last and now_s - self._said_s < _SAY_EVERY_S:
            return False
        self._said_s = now_s
        return True
