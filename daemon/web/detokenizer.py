"""Text out of tokens as they come: whole characters only, and nothing that a stop string may take back.

`TextStream` turns tokens into text; `StopScanner` holds back what may be the start of a stop string;
`AnswerText` puts them together for one answer and keeps the log-probabilities in step with the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from hexmesh.wire.data import SampledToken

_REPLACEMENT = "\ufffd"
_MOST_HELD_TOKENS = 8
"""A character has at most four bytes, so tokens held longer than this do not wait for one any more."""


class TextStream(Protocol):
    """Decodes one sequence's tokens. The texts of all pushes and of the finish make the sequence's text."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class ByteStream:
    """For byte-level tokenizers: every token is bytes, and UTF-8 says where characters end. O(1) a token."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """For all other tokenizers: decodes a short window twice, without and with the new token.

    The window starts at the tokens that gave the last text (at first: the end of the prompt), because
    decoders treat a first token unlike the following ones. Text that ends in U+FFFD waits for the rest of its
    character.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(context)
        self._n_shown = len(context)
        """The window's first tokens whose text is out already."""

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._new_text()
        is_held = text.endswith(_REPLACEMENT) and len(self._window) - self._n_shown < _MOST_HELD_TOKENS
        if not text or is_held:
            return ""
        self._window = self._window[self._n_shown :]
        self._n_shown = len(self._window)
        return text

    def finish(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        shown = self._decode(self._window[: self._n_shown])
        return self._decode(self._window)[len(shown) :]


class StopScanner:
    """Passes text on up to the first stop string; keeps back a tail that could become one.

    Of several stop strings the one that is complete first counts, so how text is cut into pushes changes
    nothing.
    """

    def __init__(self, stop: Sequence[str], *, include: bool) -> None:
        assert all(stop), "an empty stop string would stop everywhere"
        self._stop = tuple(stop)
        self._include = include
        self._held = ""
        self._n_exempt = 0
        """The held text's first characters, which may not end a stop string."""
        self.matched: str | None = None

    def push(self, text: str, *, may_match: bool = True) -> str:
        """The text that may be shown now. Once `matched` is set there is no more.

        Text that may not match yet ends no stop string, though one may begin in it.
        """
        assert self.matched is None, "push after a match"
        self._held += text
        if not may_match:
            self._n_exempt = len(self._held)
        matches = [(at + len(s), at, s) for s in self._stop if (at := self._find(s)) >= 0]
        if matches:
            end, start, self.matched = min(matches)
            shown, self._held = self._held[: end if self._include else start], ""
            return shown
        n_shown = len(self._held) - self._n_risky()
        shown, self._held = self._held[:n_shown], self._held[n_shown:]
        self._n_exempt = max(0, self._n_exempt - n_shown)
        return shown

    def _find(self, stop: str) -> int:
        """Where that stop string begins first, if it ends after the text that may not match; else -1."""
        return self._held.find(stop, max(0, self._n_exempt - len(stop) + 1))

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        shown, self._held = self._held, ""
        return shown

    def _n_risky(self) -> int:
        """Length of the longest tail that is a proper start of some stop string."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        tails = range(longest, 0, -1)
        return next((n for n in tails if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """A token and the position of its first character in the answer's text."""

    token: SampledToken
    text_offset: int


class AnswerText:
    """The text of one answer while it grows."""

    def __init__(self, stream: TextStream, scanner: StopScanner) -> None:
        self._stream = stream
        self._scanner = scanner
        self._n_decoded = 0
        self._n_shown = 0
        self._placed: list[PlacedToken] = []

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._scanner.matched

    def echo(self, prompt: Sequence[SampledToken]) -> str:
        """The prompt's text, as the answer's beginning; stop strings are not looked for in it."""
        text = ""
        for token in prompt:
            self._placed.append(PlacedToken(token, self._n_decoded + len(text)))
            text += self._stream.push(token.token_id)
        self._n_decoded += len(text)
        self._n_shown += len(text)
        return text

    def push(self, token: SampledToken, *, may_stop: bool = True) -> str:
        """Text that is settled now that `token` came; may be empty."""
        self._placed.append(PlacedToken(token, self._n_decoded))
        return self._show(self._stream.push(token.token_id), may_stop=may_stop)

    def finish(self) -> str:
        """The rest of the text after the last token."""
        if self._scanner.matched is not None:
            return ""
        shown = self._show(self._stream.finish())
        if self._scanner.matched is None:
            rest = self._scanner.finish()
            self._n_shown += len(rest)
            shown += rest
        return shown

    def take_placed(self, *, is_last: bool) -> list[PlacedToken]:
        """Tokens whose text has begun to show, each once; those past a stop string's cut never come."""
        keep_all = is_last and self._scanner.matched is None
        n_ready = sum(keep_all or placed.text_offset < self._n_shown for placed in self._placed)
        ready, self._placed = self._placed[:n_ready], self._placed[n_ready:]
        return ready

    def _show(self, decoded: str, *, may_stop: bool = True) -> str:
        self._n_decoded += len(decoded)
        shown = self._scanner.push(decoded, may_match=may_stop)
        self._n_shown += len(shown)
        return shown


@cache
def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE vocabularies write the 256 bytes (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
