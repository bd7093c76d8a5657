from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from hexmesh.wire.control import LEAST_BALLOT, Ballot, Cert, CertMessage, ControlMessage, Epoch, Header

BALLOTS = st.builds(
    Ballot,
    term=st.integers(1, 3),
    rank=st.integers(-1, 1),
    node=st.sampled_from("ab"),
    boot=st.integers(1, 2**63 - 1),
)
EPOCHS = st.builds(Epoch, ballot=BALLOTS, n=st.integers(1, 3))


def as_tuple(ballot: Ballot) -> tuple[int, int, str, int]:
    return (ballot.term, ballot.rank, ballot.node, ballot.boot)


@given(BALLOTS, BALLOTS)
def test_ballots_are_ordered_as_tuples(left: Ballot, right: Ballot) -> None:
    assert (left < right) == (as_tuple(left) < as_tuple(right))
    assert (left == right) == (as_tuple(left) == as_tuple(right))
    assert left > LEAST_BALLOT


@given(EPOCHS, EPOCHS)
def test_epochs_are_ordered_by_ballot_then_count(left: Epoch, right: Epoch) -> None:
    assert (left < right) == ((as_tuple(left.ballot), left.n) < (as_tuple(right.ballot), right.n))


@given(EPOCHS)
def test_messages_survive_the_wire(epoch: Epoch) -> None:
    header = Header(src="a", boot=2**63 - 1, to_boot=None, hears=False)
    message = CertMessage(header=header, cert=Cert(epoch=epoch, digest="d", signature=b"\x00s"))
    wire = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(wire, type=ControlMessage) == message
