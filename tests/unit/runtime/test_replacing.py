"""Which modules the C kernels may stand for, and which are left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hexmesh.runtime import native_modules
from hexmesh.runtime.native_modules import NativeGatedMlp, NativeLayer, NativeLinear, NativeRmsNorm
from hexmesh.runtime.replacing import replace_inner_modules
from hexmesh.wire.data import Row
from tests.golden.test_stages import load_stages
from tests.golden.tiny_models import save_tiny_model

CPU = torch.device("cpu")

if not native_modules.serves(torch.float32, CPU):
    pytest.skip("the C kernels are not built", allow_module_level=True)


class Gated(nn.Module):
    """As most models have it; `sign` other than one is something that no kernel computes."""

    def __init__(self, sign: float = 1.0, *, is_gelu: bool = False) -> None:
        super().__init__()
        self.last = nn.Linear(48, 24)  # in an order and with names of its own
        self.one = nn.Linear(24, 48)
        self.other = nn.Linear(24, 48)
        self.sign = sign
        self.is_gelu = is_gelu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.other(x)
        gate = F.gelu(gate, approximate="tanh") if self.is_gelu else F.silu(gate)
        return self.last(gate * self.one(x) * self.sign)  # type: ignore[no-any-return]


class Norm(nn.Module):
    """`shift` other than zero is something that no kernel computes."""

    def __init__(self, shift: float = 0.0, *, is_by_one_plus: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40))
        self.eps = 1e-5
        self.shift = shift
        self.is_by_one_plus = is_by_one_plus

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * (self.weight + 1 if self.is_by_one_plus else self.weight) + self.shift


class Picky(nn.Module):
    """Cannot be tried with one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return (self.a, self.b, self.c)[expert](x)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


@pytest.mark.parametrize("is_gelu", [False, True])
def test_gated_products_are_found_whatever_their_names(is_gelu: bool) -> None:
    module, x = Gated(is_gelu=is_gelu), torch.randn(2, 24)
    with torch.inference_mode():
        expected = module(x)
        replaced = replace_inner_modules(module)
        assert isinstance(replaced, NativeGatedMlp)
        assert replaced.gated.kind == int(is_gelu)
        assert torch.allclose(replaced(x), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_by_one_plus", [False, True])
def test_norms_are_found(is_by_one_plus: bool) -> None:
    module, x = Norm(is_by_one_plus=is_by_one_plus), torch.randn(2, 3, 40)
    replaced = replace_inner_modules(module)

    assert isinstance(replaced, NativeRmsNorm)
    with torch.inference_mode():
        assert torch.allclose(replaced(x), module(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "module",
    [Gated(sign=1.01), Norm(shift=0.01), Picky(), nn.LayerNorm(40, bias=False), nn.GELU()],
    ids=lambda module: type(module).__name__,
)
def test_what_fails_the_check_is_left_alone(module: nn.Module) -> None:
    assert replace_inner_modules(module) is module


def test_linears_keep_their_weights() -> None:
    module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2, bias=False))
    weights = [module[0].weight, module[1].weight]

    replace_inner_modules(module)

    assert all(isinstance(child, NativeLinear) for child in module)
    assert all(child.weight is weight for child, weight in zip(module, weights, strict=True))


def test_modules_that_are_to_be_kept_stay() -> None:
    module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    kept = module[1]

    replace_inner_modules(module, {id(kept)})

    assert isinstance(module[0], NativeLinear)
    assert module[1] is kept


@pytest.mark.parametrize(
    ("model_type", "n_replaced"),
    [("llama", 5), ("gemma", 5), ("granite", 0), ("smollm3", 3), ("gpt_neox", 0)],
)
def test_layers_are_replaced_where_they_are_proven(model_type: str, n_replaced: int, tmp_path: Path) -> None:
    """Granite scales its residuals; two layers of smollm3 go without rotary positions."""
    save_tiny_model(model_type, tmp_path)

    [stage] = load_stages(tmp_path, [0, 5])

    assert sum(isinstance(module, NativeLayer) for module in stage.splice.model.modules()) == n_replaced


def test_a_long_step_gives_what_short_ones_give(tmp_path: Path) -> None:
    """The kernels take a step of many tokens in pieces."""
    save_tiny_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    [first, _] = load_stages(tmp_path, [0, 2, 5])
    tokens = torch.randint(50, (470,))

    def run(start: int, stop: int) -> torch.Tensor:
        row = Row(start=start, n_tokens=stop - start, blocks=list(range(60)))
        hidden = first.run([row], tokens[start:stop]).hidden
        assert hidden is not None
        return hidden

    whole = run(0, 470)
    parts = torch.cat([run(start, min(470, start + 50)) for start in range(0, 470, 50)])

    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-5)
