"""Least squares of the score's own formulas against the measurements, on the logarithm of predicted over measured.

Three fits, each given the ones before it: devices (prefill, decode and launch of every measured class, and the one
context that the decode tables do not tell), links (rate and step), and what a serving framework adds to a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from hexmesh.catalogue import DeviceEfficiency, LinkEfficiency, device_named, link_named
from hexmesh.catalogue.efficiency import POOLED, EfficiencyFile
from hexmesh.cluster import Device, Fabric
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.roofline import Group, Roofline, all_reduce_s
from tools.efficiency.measured import Point, points

LLAMA_2_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
_NO_COST = Fabric(kind="none", bytes_per_s=math.inf, step_s=0.0)
"""Operators were timed alone, without their all-reduce."""
_DEVICE_KINDS = ("linear", "prompt", "decode")
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A measurement and what the fitted formulas say of it."""

    point: Point
    seconds: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.point.seconds


@dataclass(frozen=True, slots=True)
class Fit:
    """Factors, and what they make of every measurement."""

    factors: EfficiencyFile
    context_tokens: float
    """The context that the decode tables seem to have been made with."""
    predictions: tuple[Prediction, ...]


def spec() -> ModelSpec:
    """The model of all the measurements."""
    return model_spec_from_config(LLAMA_2_70B)


def fit() -> Fit:
    """All factors from all measurements."""
    devices, context_tokens, of_devices = _fit_devices([p for p in points() if p.kind in _DEVICE_KINDS])
    links, of_links = _fit_links([p for p in points() if p.kind in ("all_reduce", "send")])
    without = EfficiencyFile(device=devices, link=links, framework_step_s=0.0)
    requests = [p for p in points() if p.kind in ("prefill", "token")]
    bare = np.array([request_s(without, point) for point in requests])
    (framework_s,) = _least_squares(
        lambda x: np.log((bare + x[0]) / _seconds(requests)), [5e-3], [0.0], [1.0]
    )
    of_requests = [
        Prediction(point, seconds + framework_s) for point, seconds in zip(requests, bare, strict=True)
    ]
    return Fit(
        factors=EfficiencyFile(device=devices, link=links, framework_step_s=framework_s),
        context_tokens=context_tokens,
        predictions=(*of_devices, *of_links, *of_requests),
    )


def effective(name: str, factors: EfficiencyFile) -> tuple[Device, Fabric, float]:
    """A catalogue device in float16, the fabric that comes with it and its launch, all with these factors."""
    entry, link = device_named(name), link_named(device_named(name).link)
    row, link_row = factors.device[entry.efficiency_class], factors.link[link.efficiency_class]
    fabric = Fabric(kind=link.name, bytes_per_s=link.peak_bytes_per_s * link_row.rate, step_s=link_row.step_s)
    return _device(name, row.prefill, row.decode), fabric, row.launch_s


def request_s(factors: EfficiencyFile, point: Point) -> float:
    """A whole prompt, or one token after it, for one request alone."""
    device, fabric, launch_s = effective(point.device, factors)
    group = Group(device=device, fabric=fabric, tp=point.tp, launch_s=launch_s)
    model = Roofline(spec(), "float16")
    layer = model.spec.layers[0]
    one = (
        model.prefill_layer_s(group, layer, point.amount)
        if point.kind == "prefill"
        else model.decode_layer_s(group, layer, 1, point.amount)
    )
    return model.spec.n_layers * one + model.head_s(group, 1) + factors.framework_step_s


def _device(name: str, prefill: float, decode: float) -> Device:
    entry = device_named(name)
    return Device(
        index=0,
        kind=entry.kind,
        name=entry.name,
        budget_bytes=entry.memory_bytes,
        flops_per_s=entry.peak_flops_per_s["float16"] * prefill,
        bytes_per_s=entry.peak_bytes_per_s * decode,
    )


def _fit_devices(
    measured: Sequence[Point],
) -> tuple[dict[str, DeviceEfficiency], float, list[Prediction]]:
    classes = sorted({_class(point) for point in measured})
    with_launch = sorted({_class(point) for point in measured if point.tp > 1})
    n = len(classes)

    def rows(x: Sequence[float]) -> dict[str, tuple[float, float, float]]:
        launch = dict(zip(with_launch, x[2 * n :], strict=False))
        mean = sum(launch.values()) / len(launch)
        return {name: (x[i], x[n + i], launch.get(name, mean)) for i, name in enumerate(classes)}

    def predict(x: Sequence[float]) -> Floats:
        table = rows(x)
        return np.array([_step_s(point, *table[_class(point)], context_tokens=x[-1]) for point in measured])

    start = [0.7] * n + [0.75] * n + [2e-5] * len(with_launch) + [1000.0]
    high = [1.0] * (2 * n) + [1e-3] * len(with_launch) + [8192.0]
    found = _least_squares(
        lambda x: np.log(predict(x) / _seconds(measured)),
        start,
        [0.01] * (2 * n) + [0.0] * (len(start) - 2 * n),
        high,
    )
    predictions = [Prediction(p, float(s)) for p, s in zip(measured, predict(found), strict=True)]
    table = {
        name: DeviceEfficiency(
            prefill=prefill,
            decode=decode,
            launch_s=launch_s,
            points=len(own := [one for one in predictions if _class(one.point) == name]),
            rms=_rms(own),
        )
        for name, (prefill, decode, launch_s) in rows(found).items()
    }
    pooled = DeviceEfficiency(
        prefill=_geometric_mean(row.prefill for row in table.values()),
        decode=_geometric_mean(row.decode for row in table.values()),
        launch_s=next(launch for name, (_, _, launch) in rows(found).items() if name not in with_launch),
        points=0,
        rms=0.0,
    )
    return {**table, POOLED: pooled}, float(found[-1]), predictions


def _step_s(point: Point, prefill: float, decode: float, launch_s: float, *, context_tokens: float) -> float:
    group = Group(
        device=_device(point.device, prefill, decode), fabric=_NO_COST, tp=point.tp, launch_s=launch_s
    )
    model = Roofline(spec(), "float16")
    layer = model.spec.layers[0]
    if point.kind == "prompt":
        return model.prefill_layer_s(group, layer, point.amount)
    return model.decode_layer_s(group, layer, point.amount, context_tokens if point.kind == "decode" else 0)


def _fit_links(measured: Sequence[Point]) -> tuple[dict[str, LinkEfficiency], list[Prediction]]:
    """Links with all-reduces by two parameters; where only a send was timed, its rate and the others' mean step."""
    by_class: dict[str, list[Point]] = {}
    for point in measured:
        by_class.setdefault(_link_class(point), []).append(point)
    table, predictions = dict[str, LinkEfficiency](), list[Prediction]()
    for name, own in by_class.items():
        reduces = [point for point in own if point.kind == "all_reduce"]
        if not reduces:
            continue
        x = _least_squares(partial(_reduce_residuals, reduces), [0.7, 3.0], [0.01, 0.01], [1.0, 100.0])
        found = [Prediction(point, _reduce_s(point, x)) for point in reduces]
        table[name] = LinkEfficiency(rate=x[0], step_s=x[1] * 1e-6, points=len(found), rms=_rms(found))
        predictions += found
    pooled = LinkEfficiency(
        rate=_geometric_mean(row.rate for row in table.values()),
        step_s=_geometric_mean(row.step_s for row in table.values()),
        points=0,
        rms=0.0,
    )
    for name, own in by_class.items():
        if name not in table:
            rate = _geometric_mean(
                (p.amount / p.seconds) / link_named(device_named(p.device).link).peak_bytes_per_s for p in own
            )
            table[name] = LinkEfficiency(rate=rate, step_s=pooled.step_s, points=len(own), rms=0.0)
    return {**table, POOLED: pooled}, predictions


def _reduce_residuals(reduces: Sequence[Point], x: Sequence[float]) -> Floats:
    return np.log(np.array([_reduce_s(point, x) for point in reduces]) / _seconds(reduces))


def _reduce_s(point: Point, x: Sequence[float]) -> float:
    peak = link_named(device_named(point.device).link).peak_bytes_per_s
    return all_reduce_s(Fabric(kind="", bytes_per_s=peak * x[0], step_s=x[1] * 1e-6), point.tp, point.amount)


def _class(point: Point) -> str:
    return device_named(point.device).efficiency_class


def _link_class(point: Point) -> str:
    return link_named(device_named(point.device).link).efficiency_class


def _seconds(measured: Iterable[Point]) -> Floats:
    return np.array([point.seconds for point in measured])


def _least_squares(
    residuals: Callable[[Sequence[float]], Floats], start: list[float], low: list[float], high: list[float]
) -> list[float]:
    scale = [max(abs(value), 1e-6) for value in start]
    found = least_squares(
        residuals, start, bounds=(low, high), x_scale=scale, xtol=1e-12, ftol=1e-12, gtol=1e-12
    )
    assert found.success, found.message
    return [float(value) for value in found.x]


def _rms(predictions: Sequence[Prediction]) -> float:
    return math.sqrt(sum((one.ratio - 1) ** 2 for one in predictions) / len(predictions))


def _geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def factors_by_name(factors: EfficiencyFile) -> Mapping[str, DeviceEfficiency | LinkEfficiency]:
    """All rows, links after devices."""
    return {**factors.device, **{f"link {name}": row for name, row in factors.link.items()}}
