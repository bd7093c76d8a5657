"""Names for prefixes: a chain of hashes, one link per 16 tokens, the same in every replica whatever its blocks.

link(0) stands for (model id, salt), link(i) for link(i - 1) and the i-th 16 tokens. A prefix of n tokens is named
by link(n // 16) where n is a multiple of 16, else by that link hashed with the n % 16 tokens behind it. So a block
of any size has a name: that of the prefix which ends where the block ends. SHA-256, because a name that two prefixes
shared would hand one request's keys and values to another.
"""

from __future__ import annotations

import sys
from array import array
from hashlib import sha256

LINK_TOKENS = 16
_TOKEN_BYTES = 4
_LINK_BYTES = LINK_TOKENS * _TOKEN_BYTES


def first_link(model_id: str, salt: str) -> bytes:
    """What every prefix of this model and salt begins from; salts keep tenants' prefixes apart."""
    return sha256(sha256(model_id.encode()).digest() + salt.encode()).digest()


class PrefixChain:
    """The links of one growing list of tokens, each computed once. Tokens that were named must not change."""

    __slots__ = ("_links",)

    def __init__(self, first: bytes) -> None:
        self._links = [first]

    def name(self, tokens: list[int], stop: int) -> bytes:
        """The name of tokens[:stop]."""
        n_links = stop // LINK_TOKENS
        if n_links >= len(self._links):
            self._extend(tokens, n_links)
        link = self._links[n_links]
        if stop == n_links * LINK_TOKENS:
            return link
        return sha256(link + _token_bytes(tokens[n_links * LINK_TOKENS : stop])).digest()

    def _extend(self, tokens: list[int], n_links: int) -> None:
        start = len(self._links) - 1
        data = _token_bytes(tokens[start * LINK_TOKENS : n_links * LINK_TOKENS])
        link = self._links[-1]
        for at in range(0, len(data), _LINK_BYTES):
            link = sha256(link + data[at : at + _LINK_BYTES]).digest()
            self._links.append(link)


def _token_bytes(tokens: list[int]) -> bytes:
    """Little-endian, four bytes each, on every machine."""
    words = array("I", tokens)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
