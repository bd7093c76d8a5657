"""A mesh in one process with fake stages: real gateways, drivers and stage hosts, messages over the event loop.

A fake stage "computes" by storing the token ids it is given in its KV blocks and drawing the next token from a
hash of everything that the sequence's blocks hold. So an answer is right only if every block, position and
replay was right, whatever the cut into stages.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from array import array
from collections import deque
from collections.abc import AsyncIterator, Iterable, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from daemon.compute.workers import StepCallback
from daemon.epochs import Epochs
from daemon.flight import Route
from daemon.gateway import Gateway
from daemon.mesh_state import sent_by
from daemon.models.node_weights import NodeWeights
from daemon.pipeline import ReplicaDriver
from daemon.reporting import tell_holding
from daemon.stages import ModelFiles, StageHost
from daemon.web.service import GenerationPart, GenerationRequest
from hexmesh.errors import Closed, Lost, NotReady
from hexmesh.membership.outputs import Accepted, Admission, Refused
from hexmesh.plan import Plan, Replica, Stage, encode_plan
from hexmesh.serving.batcher import BatchLimits
from hexmesh.serving.carry_over import carried_over
from hexmesh.serving.router import choose_pair, load_of
from hexmesh.serving.turns import Turns
from hexmesh.wire.control import Ballot, Cert, Epoch
from hexmesh.wire.data import (
    Generate,
    GenerateCancel,
    Generated,
    GenerateFailed,
    Holding,
    PromptScored,
    ReplicaIdle,
    ReplicaStats,
    Row,
    SampledToken,
    SamplingParams,
    ScoredToken,
    Scoring,
    Step,
    StepRefused,
    StepResult,
)
from hexmesh.wire.worker import LoadStage, RunStep, StageLoaded, StepDone

VOCABULARY = 50_000
BLOCK_TOKENS = 4


def next_token(tokens: list[int]) -> int:
    """What the fake model says after `tokens`."""
    digest = hashlib.sha256(array("q", tokens).tobytes()).digest()
    return int.from_bytes(digest[:4], "big") % VOCABULARY


def answer_to(prompt: list[int], n_tokens: int) -> list[int]:
    """The fake model's answer, computed without any mesh."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def scores_of(scoring: Scoring) -> list[ScoredToken]:
    """The fake model's scores: a token's log-probability is its negative."""
    return [ScoredToken(token_id=token, logprob=float(-token), rank=1) for token in scoring.followers]


class FakeWorker:
    """Stands in for a worker process; `hold` keeps its steps from ending, `die` fails them."""

    def __init__(self) -> None:
        self.is_dead = False
        self.pid = 0
        self.killed_because = ""
        self.may_run = asyncio.Event()
        self.may_run.set()
        self.n_steps = 0
        self.defers_pools = False
        """Whether there is no room for a second pool."""
        self._steps: deque[tuple[RunStep, bytes, StepCallback]] = deque()
        self._running: asyncio.Task[None] | None = None
        self._pool_names: dict[str, str] = {}
        self._pools: dict[str, dict[tuple[int, int], int]] = {}

    async def load(self, order: LoadStage) -> StageLoaded:
        self._pool_names[order.stage] = order.pool
        self._pools.setdefault(order.pool, {})
        return StageLoaded(
            stage=order.stage,
            load_s=0.0,
            weight_bytes=0,
            pool_bytes=0,
            pool_deferred=self.defers_pools and order.pool == order.stage,
            n_layers_reused=0,
        )

    def drop(self, stage: str) -> None:
        pool = self._pool_names.pop(stage, None)
        if pool is not None and pool not in self._pool_names.values():
            del self._pools[pool]

    @property
    def n_pools(self) -> int:
        return len(self._pools)

    def kill(self, reason: str) -> None:
        """Fails the steps that hang, as the end of a real worker does."""
        self.killed_because = reason
        self.may_run.set()

    def run_step(self, order: RunStep, payload: bytes, on_end: StepCallback) -> None:
        self._steps.append((order, payload, on_end))
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run_steps())

    async def _run_steps(self) -> None:
        while self._steps:
            order, payload, on_end = self._steps.popleft()
            try:
                done = await self._compute(order, payload)
            except (Closed, Lost) as error:
                on_end(error, memoryview(b""))
            else:
                on_end(done, memoryview(bytes(payload)))
        self._running = None

    async def _compute(self, order: RunStep, payload: bytes) -> StepDone:
        is_held = not self.may_run.is_set()
        await self.may_run.wait()
        if is_held and self.killed_because:
            raise Lost(f"worker 0 was killed: {self.killed_because}")
        await asyncio.sleep(0)
        if self.is_dead:
            raise Lost("the fake worker is dead")
        if order.stage not in self._pool_names:
            raise Closed(f"stage {order.stage} was dropped")
        self.n_steps += 1
        pool = self._pools[self._pool_names[order.stage]]
        tokens = array("q", bytes(payload))
        sampled = []
        scored = [scores_of(row.scoring) for row in order.rows if row.scoring is not None]
        for row in order.rows:
            answer = self._run_row(pool, row, [tokens.pop(0) for _ in range(row.n_tokens)])
            sampled += [answer] if answer else []
        return StepDone(
            stage=order.stage, step=order.step, compute_s=0.001, waited_s=0.0, sampled=sampled, scored=scored
        )

    def _run_row(self, pool: dict[tuple[int, int], int], row: Row, tokens: list[int]) -> list[SampledToken]:
        for position, token in enumerate(tokens, start=row.start):
            pool[(row.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS)] = token
        if row.sample is None:
            return []
        n_seen = row.start + row.n_tokens
        seen = [pool[(row.blocks[at // BLOCK_TOKENS], at % BLOCK_TOKENS)] for at in range(n_seen)]
        return [SampledToken(token_id=next_token(seen))]


class WholeModel:
    """Of `NodeWeights`: the model is in a folder here."""

    is_whole = True

    def release(self, stage: str) -> None:
        pass


@dataclass
class FakeNode:
    """One node's parts, wired as the daemon wires them."""

    id: str
    mesh: FakeMesh
    worker: FakeWorker = field(default_factory=FakeWorker)
    is_cut: bool = False
    hears_not: str | None = None
    broken: set[tuple[Epoch, str]] = field(default_factory=set)
    lie: Any = field(default_factory=lambda: lambda message: message)
    """What becomes of each message that this node sends."""

    def __post_init__(self) -> None:
        self.turns = Turns(self.mesh.rng)
        self.gateway = Gateway(
            courier=self,
            router=lambda: self,
            on_recovered=self.mesh.note_recovery,
            is_heard=self.is_heard,
        )
        self.stages = StageHost(
            courier=self,
            group=self.mesh.group,
            files=ModelFiles("", ""),
            weights=cast(NodeWeights, WholeModel()),
            budgets={0: 0},
            worker_of=self.find_worker,
            admit=self.admit,
            on_broken=self.mesh.note_broken,
            is_heard=self.is_heard,
            on_timed=lambda stage, rows, seconds: None,
        )
        self.epochs = Epochs(
            courier=self,
            group=self.mesh.group,
            stages=self.stages,
            limits=BatchLimits(step_tokens=16),
            vocab_size=VOCABULARY,
            on_loaded=lambda _: None,
            on_load_failed=lambda _, reason: self.mesh.note_broken(None, reason),
            on_drained=lambda epoch: self.epochs.release(epoch, "drained"),
            on_broken=self.mesh.note_broken,
            on_step=lambda _: None,
            is_heard=self.is_heard,
        )
        self.mesh.watches.append(self.mesh.group.create_task(self.stages.watch.run()))

    def is_heard(self, node: str) -> bool:
        return not self.is_cut and not self.mesh.nodes[node].is_cut and node != self.hears_not

    async def find_worker(self, device: int) -> Any:
        return self.worker

    @property
    def node_id(self) -> str:
        return self.id

    def send(self, to: str, message: msgspec.Struct, payload: Any = b"", *, channel: str = "data") -> bool:
        return self.mesh.deliver(self, to, self.lie(message), payload)

    def route(self, n_tokens: int, avoid: Set[tuple[Epoch, str]], *, may_wait: bool) -> Route | None:
        held = self.epochs.committed
        if held is None:
            return None
        gone = {node.id for node in self.mesh.nodes.values() if node.is_cut}
        sent = sent_by(self.gateway, held.epoch, {})
        pair = choose_pair(
            held.plan,
            turns=self.turns,
            loads={name: load_of(None, 0.0, BLOCK_TOKENS, one) for name, one in sent.items()},
            n_tokens=n_tokens,
            may_wait=may_wait,
            lost_nodes=gone,
            avoid={replica for epoch, replica in avoid | self.broken if epoch == held.epoch},
            here=self.id,
            rng=self.mesh.rng,
        )
        if pair is None:
            return None
        replica = pair.entry
        nodes = frozenset(stage.node for stage in replica.stages)
        return Route(held.epoch, replica.id, replica.driver, nodes)

    def refusal(self) -> NotReady:
        return self.mesh.refusal

    def tell_holding(self) -> None:
        """As each daemon does about once a second."""
        tell_holding(self, self.epochs.drivers())

    def admit(self, step: Step) -> Admission:
        if step.cert is not None:
            self.commit(step.epoch, step.cert)
        held = [self.epochs.committed, self.epochs.draining]
        is_ours = any(epoch is not None and epoch.epoch == step.epoch for epoch in held)
        return Accepted() if is_ours else Refused("another epoch", None)

    def commit(self, epoch: Epoch, cert: Cert) -> None:
        if epoch in self.epochs_here():
            return
        before = self.epochs.committed
        self.epochs.commit(epoch, cert, 0.0)
        committed = self.epochs.committed
        if before is not None and committed is not None:
            carried = carried_over(before.plan, committed.plan)
            self.gateway.carried_over(before.epoch, committed.epoch, carried)

    def epochs_here(self) -> list[Epoch]:
        return [held.epoch for held in (self.epochs.committed, self.epochs.draining) if held is not None]

    def receive(self, src: str, message: msgspec.Struct, payload: Any) -> None:
        match message:
            case Step():
                self.stages.on_step(message, payload)
            case StepResult() | StepRefused() | GenerateCancel() | Generate():
                self._to_driver(src, message)
            case Generated():
                self.gateway.on_tokens(src, message)
            case PromptScored():
                self.gateway.on_scores(src, message)
            case GenerateFailed():
                self.gateway.on_failed(src, message)
            case Holding():
                self.gateway.on_holding(src, message)
            case ReplicaIdle():
                self.epochs.on_idle(message)
            case ReplicaStats():
                if message.is_broken:
                    self.broken.add((message.epoch, message.replica))
                self.epochs.on_stats(message)
            case _:
                raise AssertionError(message)

    def _to_driver(self, src: str, message: Any) -> None:
        if isinstance(message, GenerateCancel):
            for driver in self.epochs.drivers():
                driver.cancel(message)
            return
        driver = self.epochs.driver(message.epoch, message.replica)
        if driver is None:
            if isinstance(message, Generate):
                failed = GenerateFailed(
                    sequence=message.sequence, attempt=message.attempt, reason="another epoch", retry=True
                )
                self.send(src, failed)
        elif isinstance(message, Generate):
            driver.submit(src, message)
        elif isinstance(message, StepResult):
            driver.on_result(message)
        else:
            driver.on_refused(message)

    def driver(self) -> ReplicaDriver:
        """The one driver of the committed epoch here."""
        assert self.epochs.committed is not None
        (driver,) = self.epochs.committed.drivers.values()
        return driver


class FakeMesh:
    """Owner of the nodes and of what travels between them."""

    def __init__(self, names: str, group: asyncio.TaskGroup) -> None:
        self.group = group
        self.n_recovered = 0
        self.rng = random.Random(0)
        self.refusal: NotReady = NotReady("no plan")
        self.broken: list[str] = []
        self.is_broken = asyncio.Event()
        self.lose: Any = lambda message: False
        self.n_plans = 0
        self.watches: list[asyncio.Task[Any]] = []
        self.nodes = {name: FakeNode(name, self) for name in names}

    def note_recovery(self) -> None:
        self.n_recovered += 1

    def note_broken(self, epoch: Epoch | None, reason: str) -> None:
        self.broken.append(reason)
        self.is_broken.set()

    def deliver(self, src: FakeNode, to: str, message: msgspec.Struct, payload: Any) -> bool:
        dst = self.nodes[to]
        if src.is_cut or dst.is_cut:
            return src is dst
        if self.lose(message):
            return True
        if src is dst and isinstance(message, Step | StepResult):  # as the daemon does
            dst.receive(src.id, message, payload)
        else:
            asyncio.get_running_loop().call_soon(dst.receive, src.id, message, payload)
        return True

    async def commit(self, cut: str, *, kv_blocks: int = 64) -> None:
        """Plan eight layers evenly over the nodes of `cut`, load and commit everywhere that is alive.

        Several replicas are separated by blanks: "ab cd".
        """
        async for _ in self.commit_one_by_one(cut, "".join(self.nodes), kv_blocks=kv_blocks):
            pass

    async def commit_one_by_one(self, cut: str, order: str, *, kv_blocks: int = 64) -> AsyncIterator[str]:
        """The same, node by node in that order unless a certificate comes first; gives each node's name."""
        self.n_plans += 1
        epoch = Epoch(ballot=Ballot(term=1, rank=0, node="a", boot=1), n=self.n_plans)
        plan = encode_plan(even_plan(cut.split(), kv_blocks, hosts=self.nodes))
        alive = [self.nodes[name] for name in order if not self.nodes[name].is_cut]
        for node in alive:
            node.epochs.prepare(epoch, plan)
        for node in alive:
            loading = node.epochs._held[epoch].loading
            assert loading is not None
            await loading
        cert = Cert(epoch=epoch, digest="", signature=b"")
        for node in alive:
            node.commit(epoch, cert)
            node.gateway.routes_changed()
            yield node.id

    def cut(self, name: str) -> None:
        """The node falls silent, and nobody is told: it is only not heard any more."""
        self.nodes[name].is_cut = True

    def kill(self, name: str) -> None:
        """The node falls silent, and everyone notices."""
        self.nodes[name].is_cut = True
        for node in self.nodes.values():
            if not node.is_cut:
                node.epochs.node_lost(name, "it was killed")
                node.gateway.node_lost(name, "it was killed")

    async def ask(
        self, at: str, prompt: list[int], n_tokens: int, *, name: str = "r", timeout_s: float = 20.0
    ) -> list[int]:
        """All tokens of an answer, asked for at node `at`."""
        return [token async for token in self.stream(at, prompt, n_tokens, name=name, timeout_s=timeout_s)]

    async def stream(
        self, at: str, prompt: list[int], n_tokens: int, *, name: str = "r", timeout_s: float = 20.0
    ) -> AsyncIterator[int]:
        request = GenerationRequest(
            request_id=name,
            sequence=name,
            prompt=prompt,
            max_tokens=n_tokens,
            stop_token_ids=[],
            sampling=SamplingParams(),
            timeout_s=timeout_s,
        )
        sink = QueueSink()
        stop = self.nodes[at].gateway.generate(request, sink)
        try:
            while (part := await sink.next()) is not None:
                for token in part.tokens:
                    yield token.token_id
        finally:
            stop()


class QueueSink:
    """One sequence's parts, for a test to wait for."""

    def __init__(self) -> None:
        self._parts: asyncio.Queue[GenerationPart | Exception] = asyncio.Queue()
        self._is_over = False

    def take(self, part: GenerationPart) -> None:
        self._parts.put_nowait(part)

    def fail(self, error: Exception) -> None:
        self._parts.put_nowait(error)

    async def next(self) -> GenerationPart | None:
        """The next part; None after the last one. Raises what the sequence failed with."""
        if self._is_over:
            return None
        part = await self._parts.get()
        if isinstance(part, Exception):
            raise part
        self._is_over = part.finish_reason is not None
        return part


def even_plan(cuts: list[str], kv_blocks: int, hosts: Iterable[str]) -> Plan:
    """A replica for each cut: eight layers, as evenly as they go over the named nodes."""
    return Plan(
        model_id="m",
        model_name="m",
        n_layers=8,
        dtype="float32",
        max_model_tokens=256,
        hosts=dict.fromkeys(hosts, 1),
        replicas=tuple(even_replica(f"r{at}", cut, kv_blocks) for at, cut in enumerate(cuts)),
    )


def even_replica(name: str, cut: str, kv_blocks: int) -> Replica:
    stages = tuple(
        Stage(
            node=node,
            devices=(0,),
            start=8 * index // len(cut),
            stop=8 * (index + 1) // len(cut),
            kv_blocks=kv_blocks,
            needed_bytes=0,
            room_bytes=0,
            predicted_step_s=0.0,
        )
        for index, node in enumerate(cut)
    )
    return Replica(
        id=name,
        role="mixed",
        stages=stages,
        block_tokens=BLOCK_TOKENS,
        predicted_tokens_per_s=1.0,
        predicted_batch=1,
    )


@asynccontextmanager
async def fake_mesh(names: str) -> AsyncIterator[FakeMesh]:
    """A mesh whose tasks all end with the block."""
    async with asyncio.TaskGroup() as group:
        mesh = FakeMesh(names, group)
        yield mesh
        for node in mesh.nodes.values():
            node.epochs.close("the test is over")
        for watch in mesh.watches:
            watch.cancel()
