"""How long a host that comes and goes is left out of plans."""

from __future__ import annotations

import pytest

from hexmesh.membership.flaps import Flaps


def flaps_of(*losses: tuple[float, int]) -> Flaps:
    """Losses of host "a": (time, boot)."""
    flaps = Flaps(window_s=60.0, first_s=5.0, longest_s=60.0)
    for at_s, boot in losses:
        flaps.note_loss("a", boot, at_s)
    return flaps


def out_until_s(flaps: Flaps, boot: int, from_s: float) -> float:
    """The first second, from `from_s` on, at which the host may be used."""
    return next(time_s for time_s in (from_s + i for i in range(200)) if not flaps.reason("a", boot, time_s))


def test_one_loss_is_spared() -> None:
    assert flaps_of((0.0, 1)).reason("a", 1, 0.0) is None


@pytest.mark.parametrize(("n_losses", "length_s"), [(2, 5), (3, 10), (4, 20), (5, 40)])
def test_every_further_loss_doubles_the_time(n_losses: int, length_s: float) -> None:
    flaps = flaps_of(*((float(i), 1) for i in range(n_losses)))
    last_s = float(n_losses - 1)
    assert out_until_s(flaps, 1, last_s) == last_s + length_s


def test_the_time_is_bounded_and_what_is_old_does_not_count() -> None:
    flaps = flaps_of(*((6.0 * i, 1) for i in range(100)))
    last_s = 6.0 * 99
    assert last_s + 20 < out_until_s(flaps, 1, last_s) <= last_s + 60


def test_losses_far_apart_are_spared() -> None:
    flaps = flaps_of((0.0, 1), (61.0, 1), (122.0, 1))
    assert flaps.reason("a", 1, 122.0) is None


def test_restarts_are_spared_three_times() -> None:
    """Each loss was of another boot than the one that is back."""
    assert flaps_of((0.0, 1), (10.0, 2), (20.0, 3)).reason("a", 4, 20.0) is None
    assert flaps_of((0.0, 1), (10.0, 2), (20.0, 3), (30.0, 4)).reason("a", 5, 30.0) is not None


def test_a_restart_after_one_flap_is_spared() -> None:
    assert flaps_of((0.0, 1), (5.0, 2)).reason("a", 2, 5.0) is None


def test_others_are_not_touched_and_the_reason_says_what_to_do() -> None:
    flaps = flaps_of((0.0, 1), (1.0, 1))
    assert flaps.reason("b", 1, 1.0) is None
    reason = flaps.reason("a", 1, 1.0)
    assert reason is not None
    assert reason.startswith("lost 2 times within 60 s, so left out for up to 5 s; check the link")
