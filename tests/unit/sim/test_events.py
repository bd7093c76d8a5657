"""The order in which things happen."""

from __future__ import annotations

import math

from hexmesh.sim.events import Events


def test_things_happen_by_time_and_then_as_they_were_planned() -> None:
    events, seen = Events(), list[tuple[float, str]]()

    def note(what: str) -> None:
        seen.append((events.now_s, what))

    def plan_more() -> None:
        note("plan")
        events.at(0.0, note, "for the past")
        events.at(2.0, note, "last")

    events.at(2.0, note, "second")
    events.at(1.0, plan_more)
    events.at(1.0, note, "with it")
    assert events.next_s == 1.0
    events.run_while(lambda: True)
    assert seen == [(1.0, "plan"), (1.0, "with it"), (1.0, "for the past"), (2.0, "second"), (2.0, "last")]
    assert events.next_s == math.inf
    assert events.n_run == 5


def test_nothing_more_happens_than_is_wanted() -> None:
    events, seen = Events(), list[float]()
    for at in range(10):
        events.at(float(at), lambda: seen.append(events.now_s))
    events.run_while(lambda: len(seen) < 3)
    assert seen == [0.0, 1.0, 2.0]


def test_looks_come_between_events_and_are_none() -> None:
    events, looks = Events(), list[float]()

    def look() -> float:
        looks.append(events.now_s)
        return events.now_s + 0.4

    events.at(1.0, lambda: None)
    events.watch(look)
    assert events.next_s == 1.0
    events.run_while(lambda: True)
    assert looks == [0.0, 0.4, 0.8]
    assert events.now_s == 1.0
