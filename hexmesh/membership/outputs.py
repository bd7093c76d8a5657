"""What the coordination machine asks its driver to do, and what the driver hands in."""

from __future__ import annotations

from dataclasses import dataclass, field

from hexmesh.wire.control import Ballot, Cert, ControlMessage, Epoch


@dataclass(frozen=True, slots=True)
class Send:
    """Deliver `message` to node `to`; it may be lost, the next beat repairs that."""

    to: str
    message: ControlMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanWanted:
    """Plan for exactly `hosts` and answer with `plan_ready(request_id, ...)`; an older request is void."""

    request_id: int
    hosts: dict[str, int]
    reason: str
    excluded: dict[str, str]
    """Leased hosts that must not be used, and why."""


@dataclass(frozen=True, slots=True)
class StartPrepare:
    """Load your part of `plan` in the background, then call `prepared_locally` or `prepare_failed`."""

    epoch: Epoch
    plan: bytes


@dataclass(frozen=True, slots=True)
class DropPrepared:
    """Stop loading `epoch`, or free what was loaded for it alone."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Committed:
    """New sequences go to `epoch` from now on; `draining` is what known sequences may still use."""

    epoch: Epoch
    cert: Cert
    draining: Epoch | None


@dataclass(frozen=True, slots=True)
class ReleaseDraining:
    """Free `epoch`. Forced: its sequences have not ended and must be replayed in the committed one."""

    epoch: Epoch
    is_forced: bool


@dataclass(frozen=True, slots=True)
class BecameCoordinator:
    ballot: Ballot
    why: str


@dataclass(frozen=True, slots=True)
class LostCoordinator:
    """Void any planning in flight: this host no longer coordinates."""

    reason: str


@dataclass(frozen=True, slots=True)
class CoordinatorChanged:
    """Whom this host is leased to; None while its lease has expired."""

    node: str | None


@dataclass(frozen=True, slots=True)
class HostJoined:
    """The coordinator got the lease of `node`."""

    node: str
    boot: int


@dataclass(frozen=True, slots=True)
class HostLost:
    """The coordinator gave up the lease of `node`, or put it in quarantine."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class PlanImpossible:
    """The planner found nothing for `hosts`; it is asked again when that set changes."""

    hosts: dict[str, int]
    reason: str


@dataclass(frozen=True, slots=True)
class PersistTerm:
    """Write down the highest term seen, when convenient: it only saves a round of outbidding."""

    term: int


@dataclass(frozen=True, slots=True)
class LeaveComplete:
    """After `leave()`: no live plan needs this host any more; it may stop once its sequences ended."""

    reason: str


Output = (
    Send
    | PlanWanted
    | StartPrepare
    | DropPrepared
    | Committed
    | ReleaseDraining
    | BecameCoordinator
    | LostCoordinator
    | CoordinatorChanged
    | HostJoined
    | HostLost
    | PlanImpossible
    | PersistTerm
    | LeaveComplete
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEnvelope:
    """An encoded plan as coordination sees it; `hosts` must be those of the request."""

    plan: bytes
    digest: str
    hosts: dict[str, int]
    idle: frozenset[str] = frozenset()
    """Hosts without a part in it: the plan stays good when they go."""
    load_estimate_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Accepted:
    """The step may run in its epoch. Carry out `outputs` first: the Open may have committed it."""

    outputs: list[Output] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Refused:
    """Answer Refuse with `cert`, the certificate of what is committed here, if anything."""

    reason: str
    cert: Cert | None
    outputs: list[Output] = field(default_factory=list)


Admission = Accepted | Refused
