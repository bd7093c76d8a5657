"""Names of prefixes: canonical, so that they mean the same on every machine and in every version."""

from __future__ import annotations

from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from hexmesh.serving.prefix import PrefixChain, first_link

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=80)


def test_the_name_is_written_down() -> None:
    """As the module says, in other words: a change here parts the prefix caches of different versions."""
    tokens = list(range(1, 36))
    link = sha256(sha256(b"model").digest() + b"salt").digest()
    for start in (0, 16):
        link = sha256(
            link + b"".join(one.to_bytes(4, "little") for one in tokens[start : start + 16])
        ).digest()
    chain = PrefixChain(first_link("model", "salt"))
    assert chain.name(tokens, 32) == link
    rest = b"".join(one.to_bytes(4, "little") for one in tokens[32:35])
    assert chain.name(tokens, 35) == sha256(link + rest).digest()


@given(TOKENS, st.data())
def test_a_name_does_not_depend_on_what_was_named_before_or_comes_behind(
    tokens: list[int], data: st.DataObject
) -> None:
    stop = data.draw(st.integers(0, len(tokens)))
    chain = PrefixChain(first_link("model", ""))
    for before in data.draw(st.lists(st.integers(0, len(tokens)), max_size=4)):
        chain.name(tokens, before)
    assert chain.name(tokens, stop) == PrefixChain(first_link("model", "")).name(tokens[:stop], stop)


@given(TOKENS, TOKENS)
def test_different_prefixes_have_different_names(one: list[int], other: list[int]) -> None:
    first = first_link("model", "")
    names = [PrefixChain(first).name(tokens, len(tokens)) for tokens in (one, other)]
    assert (names[0] == names[1]) == (one == other)


def test_model_and_salt_cannot_be_mistaken_for_each_other() -> None:
    pairs = [("ab", ""), ("a", "b"), ("", "ab"), ("b", "a")]
    assert len({first_link(model, salt) for model, salt in pairs}) == len(pairs)
