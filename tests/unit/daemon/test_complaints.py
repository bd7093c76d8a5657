"""Complaints: each once a minute, few about one party, few in all."""

from __future__ import annotations

from daemon.complaints import MAX_OF_ONE, MAX_SAID, SAY_AGAIN_S, Complaints


def test_the_same_is_said_once_a_minute() -> None:
    complaints = Complaints()

    said = [
        complaints.is_news("a", "noise", now_s)
        for now_s in (0.0, 1.0, SAY_AGAIN_S - 1, SAY_AGAIN_S, SAY_AGAIN_S + 1)
    ]

    assert said == [True, False, False, True, False]


def test_one_party_with_new_nonsense_every_time_is_not_heard_for_long() -> None:
    complaints = Complaints()

    said = [complaints.is_news("a", f"noise {n}", 0.0) for n in range(1000)]

    assert sum(said) == MAX_OF_ONE
    assert complaints.is_news("b", "noise", 0.0)


def test_all_together_are_bounded() -> None:
    complaints = Complaints()

    assert sum(complaints.is_news(f"node {n}", "noise", 0.0) for n in range(1000)) == MAX_SAID
