"""What operators tell nodes through any peer: take nothing new, move what you hold away, be used again."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from hexmesh.cluster import Availability

OperatorAction = Literal["cordon", "drain", "uncordon"]
OrderAction = OperatorAction | Literal["show"]
_Text = Annotated[str, msgspec.Meta(max_length=2000)]


class NodeStanding(msgspec.Struct, frozen=True, kw_only=True):
    """What a node says of its own use. A drained node without stages and requests is empty."""

    id: _Text
    name: _Text
    availability: Availability
    stages: int
    """Stages that the present plan gives it."""
    requests_left: int
    """Requests in the epoch that drains here; 0 without one."""
    drain_left_s: float | None
    """When they are handed over to the present plan at the latest; None when nothing drains here."""
    blocker: _Text | None = None
    """Why the mesh has no plan without it."""


class NodeOrder(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Carry out `action` on the receiver; answered by a NodeReply of the same number."""

    order: int
    action: OrderAction
    deadline_s: float = 0.0
    """For a drain: what runs longer is handed over then."""


class OrderFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why an order was not carried out; with bytes, because there is no other room for its stages."""

    code: _Text
    message: _Text
    next_step: _Text
    needed_bytes: int | None = None
    room_bytes: int | None = None


class NodeReply(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The node's standing after the order, or why it was refused."""

    order: int
    standing: NodeStanding | None
    failure: OrderFailure | None = None


ORDER_MESSAGE = NodeOrder | NodeReply
