"""Corrections are found again from steps of a device that is not as fast as it was measured."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from hexmesh.calibration import Factors, Fit, applied, work_of
from hexmesh.calibration.work import Work
from hexmesh.cluster import Device, Fabric, Node
from hexmesh.model_spec import model_spec_from_config
from hexmesh.roofline import Group, Roofline

SPEC = model_spec_from_config(
    {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    }
)
MEASURED = Device(index=0, kind="cpu", name="cpu", budget_bytes=2**34, flops_per_s=1e12, bytes_per_s=2e10)
TRUE = Factors(flops=0.6, bytes=0.8, launch_s=1.5e-4, step_s=3e-3, row_s=2e-4, n_steps=0)


@dataclass(frozen=True)
class Row:
    start: int
    n_tokens: int
    sample: object | None = None


def decode(n: int, context: int) -> list[Row]:
    return [Row(context - 1, 1, object()) for _ in range(n)]


def seconds_of(work: Work, true: Factors) -> float:
    beta, phi = MEASURED.bytes_per_s * true.bytes, MEASURED.flops_per_s * true.flops
    layers_s = max(work.read_bytes / beta, work.flops / phi)
    head_s = max(work.head_bytes / beta, work.head_flops / phi)
    overhead_s = work.n_layers * (true.launch_s + work.n_rows * true.row_s) + true.step_s
    return layers_s + head_s + overhead_s


def steps(rng: random.Random, n: int) -> list[Work]:
    """Small and large decode batches, and chunks of prompts, on the last half of the layers."""
    made = []
    for _ in range(n):
        rows = decode(rng.choice((1, 2, 8, 32)), rng.randrange(50, 1500))
        if rng.random() < 0.4:
            rows.append(Row(rng.randrange(0, 512), rng.choice((64, 128, 224))))
        made.append(work_of(SPEC, "float32", 11, 22, rows))
    return made


def fitted(true: Factors, seed: int, *, noise: float = 0.0, outliers: float = 0.0, n: int = 400) -> Factors:
    rng, fit = random.Random(seed), Fit(MEASURED)
    for work in steps(rng, n):
        seconds = seconds_of(work, true) * rng.lognormvariate(0.0, noise)
        fit.observe(work, seconds * (8.0 if rng.random() < outliers else 1.0))
    found = fit.factors()
    assert found is not None
    return found


def worst_error(found: Factors, true: Factors, seed: int) -> float:
    """Over other steps than those that were fitted."""
    return max(
        abs(seconds_of(work, found) / seconds_of(work, true) - 1) for work in steps(random.Random(seed), 200)
    )


@pytest.mark.parametrize("seed", range(5))
def test_without_noise_the_true_figures_come_back(seed: int) -> None:
    found = fitted(TRUE, seed)
    assert found.flops == pytest.approx(0.6, rel=0.02)
    assert found.bytes == pytest.approx(0.8, rel=0.02)
    assert 11 * found.launch_s + found.step_s == pytest.approx(11 * 1.5e-4 + 3e-3, rel=0.2)
    assert found.row_s == pytest.approx(2e-4, rel=0.01)
    assert worst_error(found, TRUE, seed + 100) < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_interruptions_hardly_matter(seed: int) -> None:
    """Every step is 10 % off, every tenth took eight times as long because something else ran."""
    found = fitted(TRUE, seed, noise=0.1, outliers=0.1)
    assert worst_error(found, TRUE, seed + 100) < 0.1
    assert worst_error(Factors(flops=1, bytes=1, launch_s=4e-5, step_s=8e-4, n_steps=0), TRUE, 0) > 0.3


def test_what_no_step_shows_stays_as_measured() -> None:
    """Only single tokens: nothing tells how fast the device computes."""
    fit = Fit(MEASURED)
    for context in range(100, 200):
        work = work_of(SPEC, "float32", 11, 22, decode(1, context))
        fit.observe(work, seconds_of(work, TRUE))
    found = fit.factors()
    assert found is not None
    assert found.flops == pytest.approx(1.0, rel=0.01)
    assert found.bytes == pytest.approx(0.8, rel=0.25)


def test_what_changed_is_followed() -> None:
    rng, fit, slower = (
        random.Random(1),
        Fit(MEASURED),
        Factors(flops=0.3, bytes=0.4, launch_s=0, step_s=0, n_steps=0),
    )
    for true in (TRUE, slower):
        for work in steps(rng, 600):
            fit.observe(work, seconds_of(work, true))
    found = fit.factors()
    assert found is not None
    assert worst_error(found, slower, 5) < 0.05


def test_figures_stay_within_bounds_and_few_steps_say_nothing() -> None:
    fit = Fit(MEASURED)
    assert fit.factors() is None
    for work in steps(random.Random(0), 200):
        fit.observe(work, 1e-7)
        fit.observe(work, float("nan"))
    found = fit.factors()
    assert found is not None
    assert (found.flops, found.bytes) == (8.0, 8.0)
    assert found.launch_s == found.step_s == found.row_s == 0.0


def test_work_is_what_the_roofline_counts() -> None:
    """Of decoding alone and of a whole prompt."""
    group = Group(device=MEASURED, fabric=None, tp=1, launch_s=0.0)
    model, (layer,) = Roofline(SPEC, "float32"), set(SPEC.layers)

    def layers_s(work: Work) -> float:
        return max(work.read_bytes / MEASURED.bytes_per_s, work.flops / MEASURED.flops_per_s)

    decoding = work_of(SPEC, "float32", 0, 11, decode(8, 700))
    assert layers_s(decoding) == pytest.approx(11 * model.decode_layer_s(group, layer, 8, 700))
    assert (decoding.head_bytes, decoding.head_flops) == (0.0, 0.0)
    prompt = work_of(SPEC, "float32", 0, 11, [Row(0, 512)])
    assert layers_s(prompt) == pytest.approx(11 * model.prefill_layer_s(group, layer, 512))


def test_a_node_gets_its_devices_factors() -> None:
    fabric = Fabric(kind="pcie4", bytes_per_s=1e10, step_s=1e-5)
    node = Node(id="n", name="n", site="s", devices=(MEASURED,), fabric=fabric)
    assert applied(node, {}) == node
    corrected = applied(node, {0: TRUE})
    assert corrected.devices[0].flops_per_s == pytest.approx(6e11)
    assert corrected.devices[0].bytes_per_s == pytest.approx(1.6e10)
    assert (corrected.launch_s, corrected.step_s, corrected.devices[0].row_s) == (1.5e-4, 3e-3, 2e-4)


def test_factors_differ_by_a_share() -> None:
    near = replace(TRUE, flops=0.63)
    assert TRUE.differs(None, 0.1)
    assert not near.differs(TRUE, 0.1)
    assert near.differs(TRUE, 0.01)
    assert replace(TRUE, row_s=3e-4).differs(TRUE, 0.1)
