"""Join tokens: short text out and in, and a ledger that lets each token in as often as it was made for."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hexmesh.errors import HexmeshError, InvalidInput
from hexmesh.identity.tokens import (
    KEEP_DEAD_S,
    TokenLedger,
    TokenRefused,
    format_token,
    make_token,
    parse_token,
)
from hexmesh.ids import NodeId

ISSUER = NodeId("0123456789abcdef0123456789abcdef01234567")
TOKEN = make_token("10.0.0.1:7701", bytes(range(32)), ISSUER, b"s" * 20)
TEXT = format_token(TOKEN)
SECRET = b"secret-secret-secret"
A, B, C = (NodeId(digit * 40) for digit in "abc")

hosts = st.sampled_from(["10.0.0.1", "[fd00::1]", "node.example"])
addresses = st.builds(lambda host, port: f"{host}:{port}", hosts, st.integers(1, 65535))


@given(addresses, st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=40))
def test_text_round_trip(address: str, root_sha256: bytes, secret: bytes) -> None:
    token = make_token(address, root_sha256, ISSUER, secret)
    text = format_token(token)

    assert parse_token(f"  {text}\n") == token
    assert token.issuer_id == ISSUER
    assert text.startswith("hm1_")
    assert len(text) < 200


@given(st.integers(0, len(TEXT) - 1), st.sampled_from("Aaz09_-"))
def test_a_miscopied_token_is_noticed(at: int, letter: str) -> None:
    copied = TEXT[:at] + letter + TEXT[at + 1 :]
    if copied == TEXT:
        return

    with contextlib.suppress(InvalidInput):
        assert parse_token(copied) == TOKEN  # the last digit has unused bits


@given(st.integers(0, len(TEXT) - 1))
def test_a_cut_token_is_noticed(length: int) -> None:
    with pytest.raises(InvalidInput):
        parse_token(TEXT[:length])


@given(st.text(max_size=60))
def test_nonsense_is_no_token(text: str) -> None:
    for candidate in (text, "hm1_" + text):
        with pytest.raises(InvalidInput, match="not a join token"):
            parse_token(candidate)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not begin with hm1_"),
        ("hm2_abc", "does not begin with hm1_"),
        ("hm1_a b", "characters that no token has"),
        (TEXT[:-3], "checksum is wrong|cut or changed"),
    ],
)
def test_what_is_wrong_is_said(text: str, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason) as refusal:
        parse_token(text)
    assert "hexmesh token create" in refusal.value.next_step
    assert refusal.value.code == "token_unreadable"
    assert not text or text not in refusal.value.one_line()


@pytest.mark.parametrize(
    ("address", "root", "issuer", "secret"),
    [
        ("nowhere", bytes(32), ISSUER, bytes(20)),
        (":1", bytes(32), ISSUER, bytes(20)),
        ("h:0", bytes(32), ISSUER, bytes(20)),
        ("h:1", bytes(31), ISSUER, bytes(20)),
        ("h:1", bytes(32), NodeId("abc"), bytes(20)),
        ("h:1", bytes(32), ISSUER, bytes(15)),
    ],
)
def test_bad_parts(address: str, root: bytes, issuer: NodeId, secret: bytes) -> None:
    with pytest.raises(InvalidInput):
        make_token(address, root, issuer, secret)


def test_no_secret_is_shown_or_kept() -> None:
    ledger = TokenLedger().mint(SECRET, now_unix_s=0, ttl_s=10, uses=1)

    assert "ssss" not in repr(TOKEN)
    assert SECRET not in msgspec.msgpack.encode(ledger)
    assert SECRET.decode() not in repr(ledger)


def refused(ledger: TokenLedger, secret: bytes, node: NodeId, now_unix_s: float) -> str:
    with pytest.raises(TokenRefused) as refusal:
        ledger.redeem(secret, node, now_unix_s=now_unix_s)
    assert refusal.value.code == refusal.value.fault
    assert "hexmesh token create" in refusal.value.next_step
    return refusal.value.fault


def test_a_token_is_spent_by_its_uses() -> None:
    ledger = TokenLedger().mint(SECRET, now_unix_s=100, ttl_s=10, uses=2)
    once = ledger.redeem(SECRET, A, now_unix_s=101)
    twice = once.redeem(SECRET, B, now_unix_s=102)

    assert [one.records[0].uses_left for one in (ledger, once, twice)] == [2, 1, 0]
    assert refused(twice, SECRET, C, 103) == "token_spent"
    assert twice.redeem(SECRET, A, now_unix_s=103) == twice, "an answer that was lost may be asked for again"
    assert [len(one.live(103)) for one in (ledger, once, twice)] == [1, 1, 0]


def test_each_refusal_has_its_name() -> None:
    ledger = TokenLedger().mint(SECRET, now_unix_s=100, ttl_s=10, uses=1)
    token_id = ledger.records[0].token_id

    assert refused(ledger, b"x" * 20, A, 101) == "token_unknown"
    assert refused(ledger, b"", A, 101) == "token_unknown"
    assert refused(ledger, SECRET, A, 110) == "token_expired"
    assert refused(ledger.revoke(token_id), SECRET, A, 101) == "token_spent"
    assert ledger.redeem(SECRET, A, now_unix_s=109.9).records[0].redeemed_by == (A,)
    with pytest.raises(InvalidInput, match="no token"):
        ledger.revoke("nope")


def test_dead_tokens_are_forgotten_in_time() -> None:
    ledger = TokenLedger().mint(SECRET, now_unix_s=0, ttl_s=10, uses=1)
    soon = ledger.mint(b"y" * 20, now_unix_s=KEEP_DEAD_S, ttl_s=10, uses=1)
    late = soon.mint(b"z" * 20, now_unix_s=KEEP_DEAD_S + 11, ttl_s=10, uses=1)

    assert [len(one.records) for one in (ledger, soon, late)] == [1, 2, 2]


@pytest.mark.parametrize(
    ("secret", "ttl_s", "uses"),
    [
        (b"short", 10, 1),
        (SECRET, 0, 1),
        (SECRET, -1, 1),
        (SECRET, float("inf"), 1),
        (SECRET, float("nan"), 1),
        (SECRET, 10, 0),
    ],
)
def test_bad_mint(secret: bytes, ttl_s: float, uses: int) -> None:
    with pytest.raises(InvalidInput):
        TokenLedger().mint(secret, now_unix_s=0, ttl_s=ttl_s, uses=uses)


def test_the_ledger_survives_its_file() -> None:
    ledger = TokenLedger().mint(SECRET, now_unix_s=0, ttl_s=10, uses=3).redeem(SECRET, A, now_unix_s=1)

    assert msgspec.json.decode(msgspec.json.encode(ledger), type=TokenLedger) == ledger


class LedgerMachine(RuleBasedStateMachine):
    """However tokens are minted and redeemed, none lets in more nodes than it was made for, nor too late."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = TokenLedger()
        self.now_unix_s = 0.0
        self.made: dict[bytes, tuple[float, int]] = {}
        self.entered: dict[bytes, set[NodeId]] = {}

    @rule(ttl_s=st.floats(1, 50), uses=st.integers(1, 3))
    def mint(self, ttl_s: float, uses: int) -> None:
        secret = len(self.made).to_bytes(16, "big")
        self.ledger = self.ledger.mint(secret, now_unix_s=self.now_unix_s, ttl_s=ttl_s, uses=uses)
        self.made[secret] = (self.now_unix_s + ttl_s, uses)
        self.entered[secret] = set()

    @rule(pass_s=st.floats(0, 30))
    def wait(self, pass_s: float) -> None:
        self.now_unix_s += pass_s

    @precondition(lambda self: self.made)
    @rule(data=st.data(), node=st.sampled_from([A, B, C, NodeId("d" * 40)]))
    def redeem(self, data: st.DataObject, node: NodeId) -> None:
        secret = data.draw(st.sampled_from(sorted(self.made)))
        expires_unix_s, uses = self.made[secret]
        has_room = node in self.entered[secret] or len(self.entered[secret]) < uses
        try:
            self.ledger = self.ledger.redeem(secret, node, now_unix_s=self.now_unix_s)
        except HexmeshError:
            assert self.now_unix_s >= expires_unix_s or not has_room
        else:
            assert self.now_unix_s < expires_unix_s
            assert has_room
            self.entered[secret].add(node)

    @invariant()
    def nobody_too_many(self) -> None:
        for secret, (_, uses) in self.made.items():
            assert len(self.entered[secret]) <= uses


TestLedgerMachine = LedgerMachine.TestCase
