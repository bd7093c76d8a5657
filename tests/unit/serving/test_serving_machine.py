"""Anything that can happen to a replica's sequences and blocks, in any order, against a model that computes.

One batcher, or two that share a pool. Steps run at the stages in the order of their numbers, or come too late and are
refused; answers arrive in any order, or never; a step that was given up may run yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hexmesh.errors import Busy, InvalidInput
from hexmesh.serving.batcher import Batcher, BatchLimits, MicroBatch
from hexmesh.serving.blocks import BlockPool
from hexmesh.serving.sequence import Sequence
from hexmesh.wire.data import SampledToken
from tests.unit.serving.fake_replica import VOCABULARY, FakeStages, Order, next_token, orders_of, sequence

BASES = [[at * at % 7 for at in range(60)], [at % 3 for at in range(60)]]
"""Prompts begin like one of these."""


@dataclass
class Sent:
    """A step on its way."""

    number: int
    orders: list[Order]
    answer: list[list[SampledToken]] | None = None
    is_given_up: bool = False


@dataclass
class Replica:
    """A batcher, and its steps between here and the last stage."""

    batcher: Batcher
    sent: list[Sent] = field(default_factory=list)
    newest_run: int = 0


@dataclass
class Asked:
    """What the machine knows of a request."""

    sequence: Sequence
    prompt: list[int]
    replica: int
    emitted: list[int] = field(default_factory=list)
    end: str | None = None


class ServingMachine(RuleBasedStateMachine):
    @initialize(
        room_tokens=st.integers(48, 110),
        block_tokens=st.sampled_from([1, 3, 4, 16, 24]),
        step_tokens=st.integers(1, 24),
        max_running=st.integers(1, 6),
        n_replicas=st.integers(1, 2),
    )
    def begin(
        self, room_tokens: int, block_tokens: int, step_tokens: int, max_running: int, n_replicas: int
    ) -> None:
        self.now_s = 0.0
        n_blocks = -(-room_tokens // block_tokens)
        self.pool = BlockPool(n_blocks, block_tokens)
        self.stages = FakeStages(n_blocks, block_tokens)
        limits = BatchLimits(step_tokens=step_tokens, max_running=max_running, max_waiting=8)
        self.replicas = [Replica(Batcher(self.pool, limits, "m")) for _ in range(n_replicas)]
        self.limits = limits
        self.asked: dict[str, Asked] = {}
        self.leases: dict[str, tuple[list[int], list[int], float]] = {}
        self.n_named = 0

    # What clients do

    @rule(
        base=st.sampled_from(BASES),
        n_shared=st.integers(0, 30),
        own=st.lists(st.integers(0, VOCABULARY - 1), max_size=6),
        max_tokens=st.integers(1, 30),
        stop=st.sampled_from([frozenset(), frozenset({0})]),
        priority=st.integers(0, 2),
        patience_s=st.sampled_from([3.0, float("inf")]),
        salt=st.sampled_from(["", "", "s"]),
        reuses_prefix=st.sampled_from([True, True, True, False]),
        n_choices=st.sampled_from([1, 1, 3]),
        at=st.integers(0, 1),
    )
    def submit(
        self,
        base: list[int],
        n_shared: int,
        own: list[int],
        max_tokens: int,
        stop: frozenset[int],
        priority: int,
        patience_s: float,
        salt: str,
        reuses_prefix: bool,
        n_choices: int,
        at: int,
    ) -> None:
        prompt = base[:n_shared] + own or [1]
        at %= len(self.replicas)
        for _ in range(n_choices):
            self.n_named += 1
            wanted = sequence(
                str(self.n_named),
                prompt,
                max_tokens,
                stop=stop,
                priority=priority,
                deadline_s=self.now_s + patience_s,
                salt=salt,
            )
            wanted.reuses_prefix = reuses_prefix
            self._submit(Asked(wanted, prompt, at))

    def _submit(self, asked: Asked) -> None:
        batcher = self.replicas[asked.replica].batcher
        try:
            batcher.submit(asked.sequence, self.now_s)
        except Busy:
            assert len(batcher.waiting) >= self.limits.max_waiting
        except InvalidInput:
            assert asked.sequence.n_prompt + asked.sequence.max_tokens > (
                self.pool.n_blocks * self.pool.block_tokens
            )
        else:
            self.asked[asked.sequence.id] = asked

    @precondition(lambda self: self._open())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        asked = data.draw(st.sampled_from(self._open()))
        assert self.replicas[asked.replica].batcher.cancel(asked.sequence.id, 1)
        asked.end = "cancelled"

    @rule(seconds=st.floats(0.0, 2.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        for replica in self.replicas:
            late = replica.batcher.expire(self.now_s)
            for dropped in late:
                assert dropped.deadline_s <= self.now_s
                self._ended(self.asked[dropped.id], "expired")
        assert not any(asked.sequence.deadline_s <= self.now_s for asked in self._open())
        self.leases = {key: lease for key, lease in self.leases.items() if lease[2] > self.now_s}

    @precondition(lambda self: self._open())
    @rule(data=st.data(), n_right=st.integers(0, 4), wrong=st.integers(0, VOCABULARY - 1))
    def guess(self, data: st.DataObject, n_right: int, wrong: int) -> None:
        """Draft what may come next."""
        guessed = data.draw(st.sampled_from(self._open())).sequence
        if guessed.n_in_flight:
            return
        tokens = list(guessed.tokens)
        for _ in range(n_right):
            tokens.append(next_token(tokens))
        guessed.drafts = [*tokens[len(guessed.tokens) :], wrong]

    # What the driver does

    @rule(at=st.integers(0, 1), n_groups=st.integers(1, 4))
    def send(self, at: int, n_groups: int) -> None:
        replica = self.replicas[at % len(self.replicas)]
        if replica.batcher.n_in_flight < 6:
            self._send(replica, n_groups)

    def _send(self, replica: Replica, n_groups: int) -> bool:
        batch = replica.batcher.next_step(self.now_s, n_groups)
        if batch is None:
            return False
        self._check_rows(replica, batch)
        replica.sent.append(Sent(batch.step, orders_of(batch)))
        return True

    def _check_rows(self, replica: Replica, batch: MicroBatch) -> None:
        assert batch.step > max((sent.number for sent in replica.sent), default=0)
        assert len({row.sequence.id for row in batch.rows}) == len(batch.rows) <= self.limits.max_running
        assert batch.n_tokens <= self.limits.step_tokens * 5 // 4 + len(batch.rows) + 1
        for row in batch.rows:
            assert not row.sequence.is_over
            assert row.sequence.reuses_prefix or row.sequence.n_cached == 0
            assert row.start + row.n_tokens <= len(row.sequence.blocks) * self.pool.block_tokens
            first, last = (at // self.pool.block_tokens for at in (row.start, row.start + row.n_tokens - 1))
            for block in row.sequence.blocks[first : last + 1]:
                assert self._tables().count(block) == 1, "a shared block is written"
                assert block not in self.pool._names, "a known block is written"
                assert not any(block in blocks for blocks, _, _ in self.leases.values())

    @rule(n_steps=st.integers(1, 15), n_groups=st.integers(1, 3))
    def go_on(self, n_steps: int, n_groups: int) -> None:
        """Steps without trouble."""
        for _ in range(n_steps):
            for replica in self.replicas:
                self._send(replica, n_groups)
                self._settle(replica)

    def _settle(self, replica: Replica) -> None:
        for sent in list(replica.sent):
            if sent.answer is None:
                self._run(replica, sent)
            if sent in replica.sent:
                self._answer(replica, sent)

    @precondition(lambda self: any(replica.sent for replica in self.replicas))
    @rule(data=st.data(), is_in_order=st.booleans())
    def run(self, data: st.DataObject, is_in_order: bool) -> None:
        """A step comes to the stages, mostly the oldest; an older one than they have run is refused."""
        replica = self._some(data, lambda sent: sent.answer is None)
        if replica is not None:
            waiting = [sent for sent in replica.sent if sent.answer is None]
            sent = waiting[0] if is_in_order else data.draw(st.sampled_from(waiting))
            self._run(replica, sent)

    def _run(self, replica: Replica, sent: Sent) -> None:
        if sent.number < replica.newest_run:
            replica.sent.remove(sent)
            if not sent.is_given_up:
                replica.batcher.lose(sent.number)
            return
        replica.newest_run = sent.number
        sent.answer = self.stages.run(sent.orders)

    @precondition(lambda self: any(sent.answer for replica in self.replicas for sent in replica.sent))
    @rule(data=st.data(), is_in_order=st.booleans())
    def answer(self, data: st.DataObject, is_in_order: bool) -> None:
        replica = self._some(data, lambda sent: sent.answer is not None)
        if replica is not None:
            answered = [sent for sent in replica.sent if sent.answer is not None]
            self._answer(replica, answered[0] if is_in_order else data.draw(st.sampled_from(answered)))

    def _answer(self, replica: Replica, sent: Sent) -> None:
        replica.sent.remove(sent)
        assert sent.answer is not None
        awaited = replica.batcher.awaited(sent.number)
        assert (awaited is None) == sent.is_given_up
        assert awaited is None or awaited == [len(drawn) for drawn in sent.answer]
        for emission in replica.batcher.complete(sent.number, sent.answer, self.now_s):
            asked = self.asked[emission.sequence.id]
            assert emission.first == len(asked.emitted)
            for at, drawn in enumerate(emission.tokens):
                assert drawn.token_id == next_token(asked.prompt + asked.emitted)
                asked.emitted.append(drawn.token_id)
                is_last = at == len(emission.tokens) - 1
                assert self._is_end(asked) == (is_last and emission.finish_reason is not None)
            if emission.finish_reason is not None:
                self._ended(asked, emission.finish_reason)
                is_stop = asked.emitted[-1] in asked.sequence.stop_token_ids
                assert is_stop == (emission.finish_reason == "stop")

    def _is_end(self, asked: Asked) -> bool:
        is_stop = asked.emitted[-1] in asked.sequence.stop_token_ids
        return is_stop or len(asked.emitted) == asked.sequence.max_tokens

    @precondition(lambda self: any(replica.sent for replica in self.replicas))
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        replica = self._some(data, lambda sent: not sent.is_given_up)
        if replica is None:
            return
        sent = data.draw(st.sampled_from([sent for sent in replica.sent if not sent.is_given_up]))
        replica.batcher.lose(sent.number)
        assert replica.batcher.awaited(sent.number) is None
        sent.is_given_up = True
        if len(self.replicas) > 1:  # numbers of one driver say nothing to another: there, lost is lost
            replica.sent.remove(sent)

    @rule()
    def make_pools_anew(self) -> None:
        """The gateways get everything back, and ask again with what they have."""
        for at, replica in enumerate(self.replicas):
            held = replica.batcher.abandon()
            assert {one.id for one in held} == {
                asked.sequence.id for asked in self._open() if asked.replica == at
            }
            assert not replica.batcher.has_work
            replica.sent.clear()
        self.pool.forget_cached()
        self.stages.forget()
        self.leases = {key: (blocks, [], until_s) for key, (blocks, _, until_s) in self.leases.items()}
        for asked in self._open():
            del self.asked[asked.sequence.id]
            again = sequence(
                asked.sequence.id,
                asked.prompt,
                asked.sequence.max_tokens,
                stop=asked.sequence.stop_token_ids,
                deadline_s=asked.sequence.deadline_s,
            )
            again.tokens += asked.emitted
            asked.sequence = again
            self._submit(asked)

    # Handoffs

    @precondition(lambda self: self._open())
    @rule(data=st.data(), seconds=st.floats(0.1, 4.0))
    def lease(self, data: st.DataObject, seconds: float) -> None:
        leased = data.draw(st.sampled_from(self._open())).sequence
        blocks = leased.blocks[: leased.n_computed // self.pool.block_tokens] if leased.n_sealed else []
        if blocks and leased in self.replicas[self.asked[leased.id].replica].batcher.running:
            self.n_named += 1
            key, until_s = f"lease-{self.n_named}", self.now_s + seconds
            self.pool.lease(key, blocks, until_s)
            self.leases[key] = (list(blocks), self._contents(blocks), until_s)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), seconds=st.floats(0.1, 4.0))
    def renew(self, data: st.DataObject, seconds: float) -> None:
        key = data.draw(st.sampled_from(sorted(self.leases)))
        assert self.pool.renew(key, self.now_s + seconds)
        blocks, contents, until_s = self.leases[key]
        self.leases[key] = (blocks, contents, max(until_s, self.now_s + seconds))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.leases)))
        del self.leases[key]
        assert self.pool.end_lease(key)
        assert not self.pool.end_lease(key)
        assert not self.pool.renew(key, self.now_s + 9.0)

    # What always holds

    @invariant()
    def blocks_add_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool, tables = self.pool, self._tables()
        leased = {block for blocks, _, _ in self.leases.values() for block in blocks}
        assert pool.n_free + pool.n_used + pool.n_cached + pool.n_leased == pool.n_blocks
        assert pool.n_used == len(set(tables))
        assert pool.n_leased == len(leased - set(tables))
        assert [tables.count(block) for block in range(pool.n_blocks)] == pool._n_tables
        for blocks, contents, _ in self.leases.values():
            assert not contents or self._contents(blocks) == contents

    @invariant()
    def what_a_step_in_flight_names_is_kept_for_it(self) -> None:
        if not hasattr(self, "pool"):
            return
        for replica in self.replicas:
            for sent in replica.sent:
                for order in sent.orders:
                    assert sent.is_given_up or set(order.blocks) <= set(order.sequence.blocks)

    @invariant()
    def a_known_block_holds_what_its_name_says(self) -> None:
        if not hasattr(self, "pool"):
            return
        for replica in self.replicas:
            for held in replica.batcher.running:
                known = held.blocks[: held.n_sealed]
                assert self._contents(known) == held.tokens[: held.n_sealed * self.pool.block_tokens]

    @invariant()
    def eviction_takes_no_block_before_those_that_follow_on_it(self) -> None:
        """Among cached blocks: whoever found a block knows all those before it too."""
        if not hasattr(self, "pool"):
            return
        for replica in self.replicas:
            for held in replica.batcher.running:
                named = [block in self.pool._names for block in held.blocks]
                assert named == sorted(named, reverse=True)

    def teardown(self) -> None:
        """Let everything end."""
        if not hasattr(self, "pool"):
            return
        for key in self.leases:
            self.pool.end_lease(key)
        self.leases = {}
        n_idle = 0
        while any(replica.batcher.has_work for replica in self.replicas):
            n_idle += 1
            for replica in self.replicas:
                if self._send(replica, 2):
                    n_idle = 0
                self._settle(replica)
            assert n_idle < 3, "nothing gets on any more"
            self.blocks_add_up()
        assert not self._open()
        assert (self.pool.n_used, self.pool.n_leased) == (0, 0)

    # Helpers

    def _open(self) -> list[Asked]:
        return [asked for asked in self.asked.values() if asked.end is None]

    def _ended(self, asked: Asked, how: str) -> None:
        assert asked.end is None, "it ended before"
        asked.end = how

    def _tables(self) -> list[int]:
        return [block for asked in self.asked.values() for block in asked.sequence.blocks]

    def _contents(self, blocks: list[int]) -> list[int]:
        size = self.pool.block_tokens
        return [self.stages._slots[block * size + at] for block in blocks for at in range(size)]

    def _some(self, data: st.DataObject, has: object) -> Replica | None:
        fitting = [replica for replica in self.replicas if any(map(has, replica.sent))]  # type: ignore[arg-type]
        return data.draw(st.sampled_from(fitting)) if fitting else None


ServingMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
test_whatever_happens = ServingMachine.TestCase
