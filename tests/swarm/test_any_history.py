"""Hypothesis writes the history of 2 to 4 hosts: I1 to I7 at every event, I8 after healing."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.swarm.schedule import heal, is_whole, time_to_whole
from tests.swarm.world import Habits, Weather, World

HOST = st.integers(0, 3)


class AnyHistory(RuleBasedStateMachine):
    @initialize(n_hosts=st.integers(2, 4), seed=st.integers(0, 1000))
    def start(self, n_hosts: int, seed: int) -> None:
        self.world = World(seed, n_hosts, Habits(request_every_s=0.2))
        self.world.boot_all()

    def name(self, number: int) -> str:
        return f"h{number % len(self.world.hosts)}"

    @rule(length_s=st.sampled_from([0.05, 0.3, 1.0, 2.5, 4.0]))
    def wait(self, length_s: float) -> None:
        self.world.run_until(self.world.now_s + length_s)

    @rule(host=HOST)
    def crash(self, host: int) -> None:
        self.world.crash(self.name(host))

    @rule(host=HOST, keep_disk=st.booleans())
    def boot(self, host: int, keep_disk: bool) -> None:
        self.world.boot(self.name(host), keep_disk=keep_disk)

    @rule(src=HOST, dst=HOST)
    def cut_one_way(self, src: int, dst: int) -> None:
        self.world.cut.add((self.name(src), self.name(dst)))

    @rule(host=HOST, length_s=st.sampled_from([0.5, 3.0]))
    def pause(self, host: int, length_s: float) -> None:
        self.world.pause(self.name(host), length_s)

    @rule()
    def mend_links(self) -> None:
        self.world.cut.clear()

    @rule(loss=st.sampled_from([0.0, 0.2]), duplication=st.sampled_from([0.0, 0.2]))
    def change_weather(self, loss: float, duplication: float) -> None:
        self.world.weather = Weather(loss=loss, duplication=duplication)

    @rule(host=HOST)
    def replan(self, host: int) -> None:
        self.world.call(self.world.hosts[self.name(host)], lambda m, t: m.replan("operator", t))

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        heal(self.world)
        assert time_to_whole(self.world, 15.0, 1.0) is not None
        assert is_whole(self.world)


AnyHistory.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestAnyHistory = AnyHistory.TestCase
