"""The largest logits by chunks are those of a plain sort, whatever the vocabulary's size."""

from __future__ import annotations

import pytest
import torch

from hexmesh.runtime.likeliest import Peaks, slices, take_rows
from hexmesh.runtime.nucleus import nucleus


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 1000, 20_001])
@pytest.mark.parametrize("n", [1, 20, 256])
def test_the_likeliest_are_those_of_a_sort(vocab_size: int, n: int) -> None:
    logits = torch.randperm(3 * vocab_size, generator=torch.Generator().manual_seed(n)).float().view(3, -1)
    n = min(n, vocab_size)

    peaks = Peaks(logits)
    values, ids = peaks.likeliest(n)

    expected = logits.sort(dim=-1, descending=True)
    assert torch.equal(values, expected.values[:, :n])
    assert torch.equal(ids, expected.indices[:, :n])
    assert peaks.first().tolist() == expected.indices[:, 0].tolist()


@pytest.mark.parametrize("vocab_size", [65, 20_001])
def test_the_last_token_may_be_the_likeliest(vocab_size: int) -> None:
    logits = torch.arange(vocab_size).float()[None]

    assert Peaks(logits).first().tolist() == [vocab_size - 1]
    assert Peaks(logits).likeliest(3)[1].tolist() == [[vocab_size - 1, vocab_size - 2, vocab_size - 3]]


def test_of_equals_the_first_is_the_likeliest() -> None:
    logits = torch.zeros(2, 300)
    logits[1, [70, 71, 299]] = 1.0

    assert Peaks(logits).first().tolist() == [0, 70]


def test_slices_hold_every_row_once() -> None:
    rows = list(range(3, 40))

    portions = list(slices(rows, 2**18, torch.device("cpu")))

    assert [row for portion in portions for row in portion] == rows
    assert max(map(len, portions)) == 4


def test_rows_in_line_are_not_copied() -> None:
    logits = torch.randn(4, 10)

    assert take_rows(logits, [1, 2]).data_ptr() == logits[1].data_ptr()
    assert torch.equal(take_rows(logits, [0, 2, 3]), logits[[0, 2, 3]])


@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.9, 0.999999])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 30.0])
def test_a_nucleus_found_without_sorting_is_that_of_a_sort(top_p: float, spread: float) -> None:
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(2)) * spread
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    total = weights.double().sum(dim=-1, keepdim=True)

    kept = nucleus(weights, total, [top_p] * 3)

    falling = weights.double().sort(dim=-1, descending=True).values
    n_needed = (falling.cumsum(dim=-1) - falling < top_p * total).sum(dim=-1)
    least = falling.gather(1, n_needed[:, None] - 1)
    assert torch.equal(kept, weights.masked_fill(weights < least, 0.0))
