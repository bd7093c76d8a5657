"""Chat templates of model repositories, rendered as transformers renders them, in a sandbox.

A template comes from whoever published the model and may be hostile, so it sees plain JSON values only and
runs in jinja2's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hexmesh.errors import InvalidInput

_SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled template with the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidInput(
                f"the model's chat template does not compile: {error}",
                code="chat_template_invalid",
                next_step="use /v1/completions, or repair chat_template.jinja",
            ) from error
        self._special_tokens = dict(special_tokens)
        self.knows_developer = "developer" in source

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder, or None when it has none (base models)."""
        config = _read_json(folder / "tokenizer_config.json")
        source = _template_source(folder, config)
        return None if source is None else cls(source, _special_tokens(folder, config))

    def render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        """The prompt's text. Raises InvalidInput when the template refuses the conversation."""
        for name in variables:
            if name in _OURS:
                raise InvalidInput(f"chat_template_kwargs may not set {name!r}", code="invalid_value")
        chat = [_plain_message(message) for message in messages]
        try:
            return self._template.render(
                messages=chat,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **variables},
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            RecursionError,
        ) as error:
            # A template is a program: on messages that it does not foresee it may raise what Python raises.
            raise InvalidInput(
                f"the model's chat template refuses these messages: {error}", code="chat_template_refused"
            ) from error


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers prepares it: nulls dropped, reasoning under the names that templates read."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[field] for field in _REASONING_FIELDS if field in plain), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json, whose value is text or a list of named templates."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    match config.get("chat_template"):
        case str() as source:
            return source
        case list() as named:
            by_name = {entry["name"]: entry["template"] for entry in named}
            default = by_name.get("default")
            return default if isinstance(default, str) else None
        case _:
            return None


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    listed = _read_json(folder / "special_tokens_map.json") | dict(config)
    tokens = {name: _token_text(listed.get(name)) for name in _SPECIAL_TOKEN_NAMES}
    return {name: text for name, text in tokens.items() if text is not None}


def _token_text(entry: object) -> str | None:
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    value = json.loads(file.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks assistant tokens for training; when serving, its body is just text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace(), refusing the underscore names through which sandboxes have been left."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.TemplateError(f"a chat template may not set {name!r} on a namespace")
        super().__setitem__(name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML characters, which would change prompts."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
