"""A member that says anything at all: no machine raises, and none counts its terms away.

Coordination assumes members that crash and do not lie, so a liar can disturb it. What it must not do is end
another host's daemon, or leave it where only a restart helps.
"""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.membership.coordination import Coordination
from hexmesh.membership.outputs import Output, PlanEnvelope, PlanWanted, Send, StartPrepare
from hexmesh.membership.terms import MAX_TERM
from hexmesh.wire import codec
from hexmesh.wire.control import CONTROL_MESSAGE, Ask, Ballot, ControlMessage, Header
from tests.unit.membership.puppet import BOOT, ME, Puppet, cert, epoch
from tests.unit.wire.any_message import any_of

LIAR = "b"
NAMES = st.sampled_from([ME, "a", LIAR, "z", ""])
LIES: st.SearchStrategy[ControlMessage] = any_of(CONTROL_MESSAGE, words=NAMES)


def as_the_liar(lie: ControlMessage, *, is_two_way: bool) -> ControlMessage:
    """With the header that the dispatcher lets pass, and orders under the liar's own ballot."""
    header = Header(src=LIAR, boot=12, to_boot=BOOT if is_two_way else None, hears=is_two_way)
    lie = msgspec.structs.replace(lie, header=header)
    if isinstance(ballot := getattr(lie, "ballot", None), Ballot):
        own = msgspec.structs.replace(ballot, node=LIAR, boot=12)
        lie = msgspec.structs.replace(lie, ballot=own)
    return lie


def carry_out(machine: Coordination, outputs: list[Output], now_s: float) -> None:
    """What the daemon does with outputs, in short; every message must be fit to be sent."""
    while outputs:
        match outputs.pop(0):
            case Send(_, message):
                codec.encode(message)
            case PlanWanted(request_id=request_id, hosts=hosts):
                plan = PlanEnvelope(hosts=hosts, plan=b"plan", digest="d", load_estimate_s=0.0)
                outputs += machine.plan_ready(request_id, plan, now_s)
            case StartPrepare(wanted, _):
                outputs += machine.prepared_locally(wanted, now_s)
            case _:
                pass


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(LIES, st.booleans(), st.floats(0.0, 1.0)), max_size=25))
def test_no_lie_ends_the_machine(lies: list[tuple[ControlMessage, bool, float]]) -> None:
    me = Puppet(highest_term_seen=3)
    for lie, is_two_way, pause_s in lies:
        carry_out(me.machine, me.tick(pause_s), me.now_s)
        carry_out(me.machine, me.hear(as_the_liar(lie, is_two_way=is_two_way)), me.now_s)
    for _ in range(20):
        carry_out(me.machine, me.tick(0.2), me.now_s)

    assert me.machine.term <= MAX_TERM


def test_a_term_that_would_use_up_the_numbers_is_not_followed() -> None:
    me = Puppet(highest_term_seen=3)
    me.hello(LIAR)
    claim = Ballot(term=2**64 - 1, rank=0, node=LIAR, boot=12)
    header = Header(src=LIAR, boot=12, to_boot=BOOT, hears=True)
    me.hear(Ask(header=header, ballot=claim, release=None))
    me.machine.learn_cert(cert(epoch(LIAR, term=2**62 + 1)), me.now_s)

    me.wait(5.0)

    assert me.machine.is_coordinator
    assert me.machine.term == 4
