"""Text to tokens and back, by the model's own tokenizer files; transformers is not imported.

The text is what transformers makes of the same files: same templates, same special tokens, same decoding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from daemon.web.chat_template import ChatTemplate
from daemon.web.detokenizer import ByteStream, TextStream, TokenTexts, WindowStream, byte_alphabet
from hexmesh.errors import InvalidInput

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"
_CONTEXT_TOKENS = 6
"""How many prompt tokens the first new tokens are decoded with, where decoding looks at the left."""


class TextCodec:
    """One model's tokenizer and chat template. Immutable once loaded, but for what it keeps of tokens."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        # A tokenizer.json may carry the truncation and padding of its training run; serving wants neither.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        added: dict[int, Any] = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: str(token.content) for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._is_byte_level = type(tokenizer.decoder).__name__ == "ByteLevel"
        self._texts = {
            skips: TokenTexts(partial(self._stream_bytes, skip_special_tokens=skips))
            for skips in (True, False)
        }

    @classmethod
    def load(cls, folder: str | Path) -> TextCodec:
        """The codec of a model folder. Blocks for up to a second with large vocabularies."""
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InvalidInput(
                f"no tokenizer.json in {folder}",
                code="tokenizer_missing",
                next_step="the model folder needs a fast tokenizer",
            )
        return cls(Tokenizer.from_file(str(file)), ChatTemplate.load(folder))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of plain text, with what the tokenizer's post-processor adds unless told otherwise."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as prompt text. Raises InvalidInput without a template or if it refuses."""
        if self._template is None:
            raise InvalidInput(
                "this model has no chat template, so it cannot hold a conversation",
                code="chat_template_missing",
                next_step="use /v1/completions, or add chat_template.jinja to the model folder",
            )
        chat = [dict(message) for message in messages]
        if not self._template.knows_developer:
            chat = [m | {"role": "system"} if m.get("role") == "developer" else m for m in chat]
        return self._template.render(
            chat, add_generation_prompt=add_generation_prompt, variables=variables or {}
        )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of finished tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def stream(self, prompt: Sequence[int], *, skip_special_tokens: bool) -> TextStream:
        """A decoder for the tokens that follow `prompt`, one at a time."""
        if self._is_byte_level:
            return ByteStream(self._texts[skip_special_tokens])
        return WindowStream(
            lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens), prompt[-_CONTEXT_TOKENS:]
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for inside running text; empty for an id without a token."""
        token = self._added.get(token_id)
        if token is not None:
            return token.encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return _byte_level_bytes(token)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte.group(1), 16)])
        return str(token).replace(_METASPACE, " ").encode()

    def token_text(self, token_id: int) -> str:
        """A token for people: its text, or `bytes:\\xe2\\x82` where it is part of a character."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _stream_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes | None:
        if skip_special_tokens and token_id in self._special_ids:
            return b""
        token = self._tokenizer.id_to_token(token_id)
        return None if token is None else _byte_level_bytes(token)


def _byte_level_bytes(token: str) -> bytes:
    """As the ByteLevel decoder does: characters of its alphabet are bytes; any other makes it plain text."""
    alphabet = byte_alphabet()
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:
        return token.encode()
