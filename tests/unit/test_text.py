"""Text and tokens: equal to transformers on the same files, whole characters, stop strings never shown."""

from __future__ import annotations

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import hexmesh
from daemon.web.detokenizer import AnswerText, StopScanner
from daemon.web.text import TextCodec
from hexmesh.errors import InvalidInput
from hexmesh.wire.data import SampledToken

SHIPPED = Path(hexmesh.__file__).parent / "assets" / "model"
TEXTS = (
    "Hello, world! The mesh has 12 nodes.",
    "Grüße aus Köln, 日本語も少し, and 🦊🇩🇪 too.",
    "  leading and trailing  \n\n tabs\tand\r\nlines ",
    "",
)
CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}"""
LLAMA_LIKE = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = date_string is defined and date_string or "no date" %}
    {%- set loop_messages = messages %}
{%- endif %}
<<SYS>>{{ system_message }}<</SYS>>
{%- set ns = namespace(turn=0) %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (ns.turn % 2 == 0) and message['role'] != 'tool' %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set ns.turn = ns.turn + 1 %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}{{- call.function | tojson(indent=2) }}{%- endfor %}
    {%- elif message['role'] == 'assistant' %}
        {%- generation %}{{- ' ' + message['content'] + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- endif %}
    {%- if loop.last %}{%- break %}{%- endif %}
{%- endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{%- endif %}"""
CHAT = [
    {"role": "user", "content": "What is <b>a mesh</b>? & é"},
    {"role": "assistant", "content": "A net.", "reasoning": "short"},
    {"role": "user", "content": "Thanks "},
]
TOOL_CHAT = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
    },
]


@pytest.fixture(scope="module")
def shipped() -> TextCodec:
    return TextCodec.load(SHIPPED)


@pytest.fixture(scope="module")
def shipped_reference() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama-2-like tokenizer: words begin with U+2581, unknown characters are byte tokens."""
    corpus = ["the mesh of nodes", "hello world", "nodes and the hello mesh"] * 3
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
        ),
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        entry for entry in content["added_tokens"] if not entry["content"].startswith("<0x")
    ]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHATML
    )
    wrapped.save_pretrained(folder)
    return folder


def streamed(codec: TextCodec, token_ids: list[int], *, prompt: list[int], skip: bool = True) -> list[str]:
    stream = codec.stream(prompt, skip_special_tokens=skip)
    return [*(stream.push(token_id) for token_id in token_ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_equals_transformers(shipped: TextCodec, shipped_reference: Any, text: str) -> None:
    assert shipped.encode(text) == shipped_reference(text)["input_ids"]
    plain = shipped_reference(text, add_special_tokens=False)["input_ids"]
    assert shipped.encode(text, add_special_tokens=False) == plain


def test_truncation_and_padding_of_the_training_run_do_not_apply(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert TextCodec.load(tmp_path).encode("mesh " * 50) == TextCodec.load(SHIPPED).encode("mesh " * 50)


def test_a_folder_without_a_fast_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no tokenizer\.json in"):
        TextCodec.load(tmp_path)


@pytest.mark.parametrize("where", ["jinja file", "config", "list in config"])
@pytest.mark.parametrize(
    ("source", "chat", "variables"),
    [
        (CHATML, CHAT, {}),
        (LLAMA_LIKE, CHAT, {}),
        (LLAMA_LIKE, [{"role": "system", "content": " be brief "}, *CHAT], {"enable_thinking": False}),
        (LLAMA_LIKE, TOOL_CHAT, {"date_string": "today"}),
        ("{{ messages | tojson }}{{ strftime_now('%Y') }}{{ pad_token }}{{ unknown }}", CHAT, {}),
    ],
)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_rendering_equals_transformers(
    tmp_path: Path,
    where: str,
    source: str,
    chat: list[dict[str, Any]],
    variables: dict[str, Any],
    add_generation_prompt: bool,
) -> None:
    shutil.copytree(SHIPPED, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = "the other one"
    if where == "jinja file":
        (tmp_path / "chat_template.jinja").write_text(source)
    elif where == "config":
        config["chat_template"] = source
    else:
        config["chat_template"] = [{"name": "rag", "template": "no"}, {"name": "default", "template": source}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    expected = PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
    )
    actual = TextCodec.load(tmp_path).render_chat(
        chat, add_generation_prompt=add_generation_prompt, variables=variables
    )
    assert actual == expected


def test_the_shipped_chat_encodes_like_transformers(shipped: TextCodec, shipped_reference: Any) -> None:
    expected = shipped_reference.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert shipped.encode(shipped.render_chat(CHAT), add_special_tokens=False) == expected


def test_the_developer_role_is_system_for_templates_that_do_not_know_it(shipped: TextCodec) -> None:
    assert shipped.render_chat([{"role": "developer", "content": "be brief"}]) == shipped.render_chat(
        [{"role": "system", "content": "be brief"}]
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "refuses these messages"),
    ],
)
def test_templates_cannot_leave_their_sandbox(tmp_path: Path, source: str, message: str) -> None:
    shutil.copy(SHIPPED / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(InvalidInput, match=message):
        TextCodec.load(tmp_path).render_chat(CHAT)


def test_a_model_without_a_template_says_what_to_use_instead(tmp_path: Path) -> None:
    shutil.copy(SHIPPED / "tokenizer.json", tmp_path)
    with pytest.raises(InvalidInput, match="no chat template") as caught:
        TextCodec.load(tmp_path).render_chat(CHAT)
    assert "/v1/completions" in caught.value.next_step


def test_template_variables_may_not_replace_the_messages(shipped: TextCodec) -> None:
    with pytest.raises(InvalidInput, match="may not set 'messages'"):
        shipped.render_chat(CHAT, variables={"messages": []})


@pytest.mark.parametrize("skip", [True, False])
def test_streams_of_random_tokens_equal_the_whole_decoding(
    shipped: TextCodec, shipped_reference: Any, skip: bool
) -> None:
    rng = random.Random(7)
    for _ in range(200):
        token_ids = [rng.randrange(1024) for _ in range(rng.randrange(1, 30))]
        expected = shipped_reference.decode(token_ids, skip_special_tokens=skip)
        assert "".join(streamed(shipped, token_ids, prompt=[], skip=skip)) == expected
        assert shipped.decode(token_ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_cut_in_two(shipped: TextCodec, text: str) -> None:
    parts = streamed(shipped, shipped.encode(text), prompt=[])
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_added_tokens_decode_as_themselves(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    tokenizer.add_tokens(["née here", AddedToken("日本", special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec.load(tmp_path)
    token_ids = codec.encode("so née here 日本 it is")
    assert "".join(streamed(codec, token_ids, prompt=[])) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("text", ["hello mesh", "Grüße 日本語 🦊!", "the nodes  and"])
def test_word_begin_tokenizers_stream_what_they_decode(sentencepiece_like: Path, text: str) -> None:
    codec = TextCodec.load(sentencepiece_like)
    reference = PreTrainedTokenizerFast.from_pretrained(sentencepiece_like)
    token_ids = codec.encode(text)
    assert token_ids == reference(text)["input_ids"]
    parts = streamed(codec, token_ids, prompt=[])
    assert "".join(parts) == reference.decode(token_ids, skip_special_tokens=True) == text
    assert not any("\ufffd" in part for part in parts)


def test_word_begin_tokenizers_keep_the_space_after_the_prompt(sentencepiece_like: Path) -> None:
    codec = TextCodec.load(sentencepiece_like)
    prompt, answer = codec.encode("hello"), codec.encode("mesh", add_special_tokens=False)
    assert "".join(streamed(codec, answer, prompt=prompt)) == " mesh"


def test_bytes_that_are_no_text_come_out_at_the_end(sentencepiece_like: Path) -> None:
    codec = TextCodec.load(sentencepiece_like)
    half = [codec.encode("日", add_special_tokens=False)[-3]]
    assert streamed(codec, half, prompt=[]) == ["", "\ufffd"]
    assert "".join(streamed(codec, half * 40, prompt=[])) == "\ufffd" * 40


def test_tokens_are_shown_with_their_bytes(shipped: TextCodec, sentencepiece_like: Path) -> None:
    fox = shipped.encode("🦊", add_special_tokens=False)
    assert b"".join(map(shipped.token_bytes, fox)) == "🦊".encode()
    assert shipped.token_text(fox[0]).startswith("bytes:\\xf0")
    (bos,) = shipped.encode("")
    assert shipped.token_text(bos) == "<|bos|>"
    assert shipped.token_bytes(10**6) == b""
    word = TextCodec.load(sentencepiece_like)
    ids = word.encode("hello ü", add_special_tokens=False)
    assert b"".join(map(word.token_bytes, ids)) == " hello ü".encode()


def scan(stop: list[str], pushes: list[str], *, include: bool = False) -> tuple[list[str], str | None]:
    scanner = StopScanner(stop, include=include)
    shown = []
    for text in pushes:
        shown.append(scanner.push(text))
        if scanner.matched is not None:
            return shown, scanner.matched
    return [*shown, scanner.finish()], None


def test_the_start_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    assert scan(["###"], ["a#", "#", "b", "##"]) == (["a", "", "##b", "", "##"], None)


def test_text_is_cut_before_the_stop_string_or_after_it() -> None:
    assert scan(["\n\nQ:"], ["one\n", "\nQ", ": two"]) == (["one", "", ""], "\n\nQ:")
    assert scan(["\n\nQ:"], ["one\n", "\nQ", ": two"], include=True) == (["one", "", "\n\nQ:"], "\n\nQ:")


def test_the_stop_string_that_is_complete_first_counts() -> None:
    assert scan(["abcd", "bc"], ["xabcd"]) == (["xa"], "bc")


@settings(deadline=None, max_examples=200)
@given(
    text=st.text("ab#", max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    stop=st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_how_text_is_cut_into_pushes_changes_nothing(
    text: str, cuts: list[int], stop: list[str], include: bool
) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pushes = [text[a:b] for a, b in pairwise(bounds)]
    shown, matched = scan(stop, pushes, include=include)

    ends = [(end, -len(s), s) for end in range(len(text) + 1) for s in stop if text[:end].endswith(s)]
    if not ends:
        assert ("".join(shown), matched) == (text, None)
    else:
        end, negative_length, expected = min(ends)
        kept = text[:end] if include else text[: end + negative_length]
        assert ("".join(shown), matched) == (kept, expected)


@settings(deadline=None, max_examples=200)
@given(
    text=st.text("ab#", max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=6),
    stop=st.lists(st.text("ab#", min_size=1, max_size=4), min_size=1, max_size=3),
    n_exempt=st.integers(0, 20),
)
def test_a_stop_string_counts_where_it_ends_after_what_may_not_stop(
    text: str, cuts: list[int], stop: list[str], n_exempt: int
) -> None:
    n_exempt = min(n_exempt, len(text))
    bounds = sorted({0, n_exempt, *(min(cut, len(text)) for cut in cuts), len(text)})
    scanner = StopScanner(stop, include=False)
    shown = ""
    for a, b in pairwise(bounds):
        if scanner.matched is None:
            shown += scanner.push(text[a:b], may_match=b > n_exempt)
    shown += scanner.finish() if scanner.matched is None else ""

    ends = [
        (end, -len(s)) for end in range(n_exempt + 1, len(text) + 1) for s in stop if text[:end].endswith(s)
    ]
    end, negative_length = min(ends, default=(len(text), 0))
    assert shown == text[: end + negative_length]
    assert (scanner.matched is None) == (not ends)


def test_the_prompt_is_echoed_with_its_tokens_and_stops_nothing(shipped: TextCodec) -> None:
    prompt = [SampledToken(token_id=token_id) for token_id in shipped.encode("one stop")]
    answer = AnswerText(shipped.stream([], skip_special_tokens=True), StopScanner(["stop"], include=False))

    shown = answer.echo(prompt)
    for token_id in shipped.encode(" and stop", add_special_tokens=False):
        if answer.matched_stop is None:
            shown += answer.push(SampledToken(token_id=token_id))

    assert (shown, answer.matched_stop) == ("one stop and ", "stop")
    placed = answer.take_placed(is_last=True)
    assert [one.token for one in placed[: len(prompt)]] == prompt
    assert [shown[one.text_offset :][:3] for one in placed if one.text_offset in (0, 8)][-1] == " an"


def answer_of(codec: TextCodec, text: str, stop: list[str]) -> tuple[str, list[tuple[str, int]]]:
    """Text and placed tokens of an answer."""
    answer = AnswerText(codec.stream([], skip_special_tokens=True), StopScanner(stop, include=False))
    shown, placed = "", []
    for token_id in codec.encode(text, add_special_tokens=False):
        shown += answer.push(SampledToken(token_id=token_id))
        placed += answer.take_placed(is_last=False)
        if answer.matched_stop is not None:
            break
    shown += answer.finish()
    placed += answer.take_placed(is_last=True)
    return shown, [(codec.token_text(one.token.token_id), one.text_offset) for one in placed]


def test_tokens_are_placed_at_their_first_character(shipped: TextCodec) -> None:
    shown, placed = answer_of(shipped, "the mesh 42 is", [])
    assert shown == "the mesh 42 is"
    assert [text for text, _ in placed] == [shipped.token_text(i) for i in shipped.encode(shown)[1:]]
    assert all(shown[offset:].startswith(text) for text, offset in placed)


def test_tokens_past_the_cut_are_not_placed(shipped: TextCodec) -> None:
    shown, placed = answer_of(shipped, "1234567", ["45"])
    assert (shown, placed) == ("123", [("1", 0), ("2", 1), ("3", 2)])
    assert answer_of(shipped, "1234567", ["12"]) == ("", [])


def test_a_half_character_and_a_half_stop_string_come_out_at_the_end(shipped: TextCodec) -> None:
    answer = AnswerText(shipped.stream([], skip_special_tokens=True), StopScanner(["!!"], include=False))
    tokens = [
        *shipped.encode("ok!", add_special_tokens=False),
        shipped.encode("🦊", add_special_tokens=False)[0],
    ]
    shown = "".join(answer.push(SampledToken(token_id=token_id)) for token_id in tokens)
    assert (shown, answer.finish()) == ("ok", "!\ufffd")
    assert len(answer.take_placed(is_last=True)) == len(tokens)


def test_the_shipped_tokenizer_takes_the_exact_path() -> None:
    """If this changes, the tests above that are meant for byte-level tokenizers lose their meaning."""
    assert type(Tokenizer.from_file(str(SHIPPED / "tokenizer.json")).decoder) is decoders.ByteLevel
