"""Every instruction set's products and small operations, beside float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from hexmesh import native

gemm = native.load("gemm")
if gemm is None:
    pytest.skip("the C kernels are not built", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Of one rounding, as a share of the magnitudes that are summed up."""


@pytest.fixture(params=gemm.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    gemm.use(request.param)
    yield request.param
    gemm.use(gemm.instruction_sets()[0])


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    n_threads: int = 1,
) -> torch.Tensor:
    y = torch.full((len(x), len(w)), -777.0, dtype=x.dtype)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (w, bias, residual)]
    is_bf16 = x.dtype == torch.bfloat16
    gemm.linear(is_bf16, n_threads, len(x), x.shape[1], x.data_ptr(), *addresses, y.data_ptr(), len(w))
    return y


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_those_of_float64(dtype: torch.dtype) -> None:
    """Sizes about every border: of tiles, of registers, of blocks along k, of panels of tokens."""
    sizes = [
        *itertools.product((1, 2, 3, 6, 7, 13), (1, 15, 16, 33, 100), (1, 3, 4, 5, 17)),
        (1, 1700, 9),
        (5, 1700, 9),
        (97, 33, 6),
        (98, 1600, 130),
        (770, 33, 6),
    ]
    for n_tokens, k, n_outputs in sizes:
        x, w = random(n_tokens, k, dtype=dtype, seed=1), random(n_outputs, k, dtype=dtype, seed=2)
        bias = random(n_outputs, dtype=dtype, seed=3)
        residual = random(n_tokens, n_outputs, dtype=dtype, seed=4)
        for with_bias, with_residual in ((None, None), (bias, None), (None, residual), (bias, residual)):
            exact = x.double() @ w.double().T
            summed = x.double().abs() @ w.double().abs().T
            for more in (with_bias, with_residual):
                exact = exact if more is None else exact + more.double()
                summed = summed if more is None else summed + more.double().abs()

            got = linear(x, w, with_bias, with_residual)

            assert ((got.double() - exact).abs() <= 2.1 * ROUNDING[dtype] * summed).all(), (
                n_tokens,
                k,
                n_outputs,
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [768, 2048])
def test_a_token_does_not_depend_on_neighbours_or_threads(dtype: torch.dtype, k: int) -> None:
    x, w = random(101, k, dtype=dtype), random(262, k, dtype=dtype, seed=1)

    alone = torch.cat([linear(x[i : i + 1].clone(), w) for i in range(len(x))])

    for n_tokens, n_threads in ((2, 1), (5, 2), (32, 1), (101, 3)):
        assert torch.equal(linear(x[:n_tokens].clone(), w, n_threads=n_threads), alone[:n_tokens])


def test_subnormals_count_for_nothing_or_for_what_they_are() -> None:
    """What torch's own products do with them depends on the processor, too."""
    tiny = torch.tensor([[1], [0x7F]], dtype=torch.int16).view(torch.bfloat16)
    x, w = tiny.repeat(1, 40), torch.cat([tiny.repeat(1, 40), torch.full((3, 40), 2.0).bfloat16()])
    exact = x.double() @ w.double().T

    got = linear(x, w)

    assert ((got.double() - exact).abs() <= 40 * 2 * 2.0**-126).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_stays_where_it_is(dtype: torch.dtype) -> None:
    x, w = random(7, 70, dtype=dtype), random(9, 70, dtype=dtype, seed=1)
    x[2, 69], w[5, 3], w[8, 68] = float("nan"), float("nan"), float("inf")

    got = linear(x, w)

    bad = torch.zeros(7, 9, dtype=torch.bool)
    bad[2], bad[:, 5] = True, True
    assert torch.equal(got.isnan(), bad)
    assert torch.equal(got.isinf()[:, 8], ~bad[:, 8])


@pytest.mark.parametrize("end", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_round_and_scale_in_their_order(dtype: torch.dtype, end: int) -> None:
    for width in (1, 7, 16, 40, 768):
        x, weight = random(3, width, dtype=dtype), random(width, dtype=dtype, seed=1)
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
        expected = (
            weight * scaled.to(dtype),
            (weight.float() * scaled).to(dtype),
            (scaled * (1 + weight.float())).to(dtype),
        )[end]
        got = torch.empty_like(x)

        gemm.rms_norm(
            dtype == torch.bfloat16, 3, width, x.data_ptr(), got.data_ptr(), weight.data_ptr(), end, 1e-5
        )

        assert torch.allclose(got.double(), expected.double(), rtol=2 * ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_products(dtype: torch.dtype, kind: int) -> None:
    """The product into the gate spans what exp can answer and beyond."""
    n_tokens, width, inner = 5, 20, 37
    x = random(n_tokens, width, dtype=dtype)
    x[0], x[1], x[2] = 1e4, -1e4, 0.0
    gate, up, down = (
        random(*shape, dtype=dtype, seed=2) for shape in ((inner, width),) * 2 + ((width, inner),)
    )
    biases = [random(size, dtype=dtype, seed=3) for size in (inner, inner, width)]
    got = torch.empty(n_tokens, width, dtype=dtype)

    gemm.gated(
        dtype == torch.bfloat16,
        2,
        n_tokens,
        width,
        x.data_ptr(),
        inner,
        kind,
        *(t.data_ptr() for pair in zip((gate, up, down), biases, strict=True) for t in pair),
        got.data_ptr(),
    )

    g = F.linear(x.double(), gate.double(), biases[0].double())
    activated = F.silu(g) if kind == 0 else F.gelu(g, approximate="tanh")
    inside = activated * F.linear(x.double(), up.double(), biases[1].double())
    expected = F.linear(inside, down.double(), biases[2].double())
    summed = inside.abs() @ down.double().abs().T + 1
    assert ((got.double() - expected).abs() <= 4 * ROUNDING[dtype] * summed).all()


@pytest.mark.parametrize("dim", [2, 24, 40, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_comes_before_attention(dtype: torch.dtype, dim: int) -> None:
    n_tokens, width, n_heads, n_kv_heads = 3, 18, 4, 2
    x, norm = random(n_tokens, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    w = [random(heads * dim, width, dtype=dtype, seed=heads) for heads in (n_heads, n_kv_heads, n_kv_heads)]
    cos, sin = random(n_tokens, dim, dtype=dtype, seed=5), random(n_tokens, dim, dtype=dtype, seed=6)
    out = [torch.empty(n_tokens, heads, dim, dtype=dtype) for heads in (n_heads, n_kv_heads, n_kv_heads)]

    gemm.before_attention(
        dtype == torch.bfloat16,
        1,
        n_tokens,
        *(tensor.data_ptr() for tensor in (x, *out, cos, sin)),
        width,
        n_heads,
        n_kv_heads,
        dim,
        norm.data_ptr(),
        0,
        *(address for weight in w for address in (weight.data_ptr(), 0)),
        1e-6,
    )

    exact = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6) * norm.double()
    for index, (got, weight) in enumerate(zip(out, w, strict=True)):
        expected = (exact @ weight.double().T).view(n_tokens, -1, dim)
        if index < 2:
            turned = torch.cat([-expected[..., dim // 2 :], expected[..., : dim // 2]], dim=-1)
            expected = expected * cos.double()[:, None] + turned * sin.double()[:, None]
        largest = float((exact.abs() @ weight.double().abs().T).max())
        assert torch.allclose(got.double(), expected, rtol=0, atol=4 * ROUNDING[dtype] * largest)


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(TypeError):
        gemm.linear(1, 2, 3)
    with pytest.raises(TypeError):
        gemm.rms_norm()
    with pytest.raises(ValueError, match="no instruction set"):
        gemm.use("abacus")
