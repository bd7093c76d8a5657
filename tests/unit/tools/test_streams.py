"""What the benches' client counts, however the bytes are cut on their way."""

from __future__ import annotations

import pytest

from tools.bench.streams import Stream

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LINES = [
    b'{"text":"a","token_id":7,"index":0}\n',
    b'{"text":"","token_id":11,"index":1}\n{"text":"bc","token_id":12,"index":2}\n',
    b'{"text":"d","token_id":null,"index":2}\n',
    b'{"finish_reason":"length","usage":{"completion_tokens":3}}\n',
]


def chunked(pieces: list[bytes]) -> bytes:
    return HEAD + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("n_bytes", [1, 2, 3, 7, 40, 10_000])
def test_tokens_are_counted_once_wherever_the_pieces_are_cut(n_bytes: int) -> None:
    data, stream = chunked(LINES), Stream(sent_s=0.0)
    for start in range(0, len(data), n_bytes):
        assert not stream.is_over
        stream.take(data[start : start + n_bytes], now_s=float(start))
    assert stream.is_over
    assert len(stream.times_s) == 3
    assert stream.token_ids == [7, 11, 12]


def test_a_token_has_the_time_of_its_own_piece() -> None:
    stream = Stream(sent_s=1.0)
    stream.take(HEAD, 1.5)
    stream.take(b"24\r\n" + LINES[0], 2.0)
    stream.take(b"\r\n49\r\n" + LINES[1], 2.5)
    assert stream.times_s == [2.0, 2.5, 2.5]
    assert stream.first_token_s == 1.0
    assert stream.gaps_s == [0.5, 0.0]


def test_an_answer_that_ends_too_early_is_told() -> None:
    stream = Stream(sent_s=0.0)
    stream.take(HEAD + b"24\r\n" + LINES[0], 1.0)
    stream.take(b"", 2.0)
    assert stream.is_over
    with pytest.raises(SystemExit, match="broke after 1 tokens"):
        stream.events()
