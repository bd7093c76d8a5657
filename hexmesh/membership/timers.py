"""The clocks of coordination. They decide how fast things happen, never whether they are safe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timers:
    """All in seconds. The lease must outlast four beats and the RTT."""

    hello_s: float = 0.5
    hear_s: float = 1.6
    beat_s: float = 0.4
    lease_s: float = 2.0
    drop_s: float = 1.6
    ask_s: float = 0.3
    stand_min_s: float = 0.1
    slot_s: float = 0.15
    jitter_s: float = 0.5
    patience_s: float = 1.2
    settle_loss_s: float = 0.2
    settle_join_s: float = 0.7
    settle_max_s: float = 2.5
    yield_s: float = 0.3
    token_s: float = 3.0
    refused_lease_s: float = 0.3
    """What is left of a lease once the holder's connection was reset and redialling was refused."""
    prep_timeout_s: float = 60.0
    """The least time to get ready; a plan's load estimate times three if that is more."""
    prep_restart_s: float = 5.0
    """A newcomer makes a prepare younger than this start over; an older one is finished first."""
    plan_deadline_s: float = 120.0
    """A planner silent for so long makes its coordinator hand over."""
    quarantine_s: float = 60.0
    """Doubled with every further failure of the same boot, up to sixteenfold."""
    flap_window_s: float = 60.0
    """Losses of one host within this add up: see `flaps`."""
    flap_s: float = 5.0
    """How long a host that comes and goes is left out first; doubled up to `flap_max_s`."""
    flap_max_s: float = 60.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                raise ValueError(f"timer {name} must be above 0, got {getattr(self, name)}")
        if self.lease_s < 2 * self.beat_s:
            raise ValueError(f"lease_s {self.lease_s} is under two beats of {self.beat_s} s")

    def prep_limit_s(self, load_estimate_s: float) -> float:
        """How long the hosts of a plan may take to get ready."""
        return max(self.prep_timeout_s, 3 * load_estimate_s)
