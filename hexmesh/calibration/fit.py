"""A device's corrections, fitted to steps: robust, bounded, and forgetting what is long ago.

    seconds = max(u R, v C) + max(u Rh, v Ch) + l launch + step + l n row

R and C are what reading and computing should take by the measured rates, in l layers and (h) in the head, and n are
the sequences in the step; u and v are the inverse factors of the rates. For a given choice of each maximum's side that
is linear, so: choose the sides, solve, and again until they stay (a piecewise linear regression). Residuals count
relative to the step's time, and those far off little (Huber). Where steps say nothing of a term, a weak pull keeps it
at what was assumed without them: launch and step cannot be told apart on one stage, and need not be.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import numpy.typing as npt

from hexmesh.calibration.factors import MOST, MOST_LAUNCH_S, MOST_ROW_S, MOST_STEP_S, Factors
from hexmesh.calibration.work import Work
from hexmesh.cluster import Device
from hexmesh.cost import STAGE_OVERHEAD_S, layer_overhead_s

Floats = npt.NDArray[np.float64]

_N_OF_CLASS = 24
"""Steps of a size class that are remembered, the last ones."""
_STALE_STEPS = 20_000
_LEAST_STEPS = 20
"""With fewer nothing is said."""
_PULL = 0.002
"""How far off, relative to a step's time, a term may be that its assumed value counts as much as one step."""
_ROW_S = 1e-4
"""What a row may well take; nothing is assumed."""
_STARTS = (0.5, 1.0, 2.0)
_ROUNDS = 30
_SWEEPS = 50
_HUBER = 1.5
"""Residuals beyond this many usual ones count less."""
_LOW = np.array([1 / MOST, 1 / MOST, 0.0, 0.0, 0.0])
_HIGH = np.array([MOST, MOST, MOST_LAUNCH_S, MOST_STEP_S, MOST_ROW_S])


@dataclass
class Fit:
    """Of one device; owned by its daemon. `device` has the measured figures."""

    device: Device
    _seen: dict[int, deque[tuple[Floats, float]]] = field(default_factory=dict)
    """By size class: R, C, Rh, Ch, l, l n and the seconds."""
    _last: dict[int, int] = field(default_factory=dict)
    _n: int = 0

    def observe(self, work: Work, seconds: float) -> None:
        """A step of that work took so long."""
        if work.n_tokens < 1 or not seconds > 0:
            return
        self._n += 1
        of_class = round(2 * np.log2(work.n_tokens))
        terms = np.array(
            [
                work.read_bytes / self.device.bytes_per_s,
                work.flops / self.device.flops_per_s,
                work.head_bytes / self.device.bytes_per_s,
                work.head_flops / self.device.flops_per_s,
                work.n_layers,
                work.n_layers * work.n_rows,
            ]
        )
        self._seen.setdefault(of_class, deque(maxlen=_N_OF_CLASS)).append((terms, seconds))
        self._last[of_class] = self._n
        for old in [one for one, last in self._last.items() if self._n - last > _STALE_STEPS]:
            del self._seen[old], self._last[old]

    def copy(self) -> Fit:
        """What is known so far, to be solved elsewhere while more is observed."""
        return Fit(
            self.device,
            {size: deque(steps, maxlen=_N_OF_CLASS) for size, steps in self._seen.items()},
            dict(self._last),
            self._n,
        )

    def factors(self) -> Factors | None:
        """What the steps say; None while they are too few."""
        steps = [step for seen in self._seen.values() for step in seen]
        if len(steps) < _LEAST_STEPS:
            return None
        terms = np.array([terms for terms, _ in steps])
        u, v, launch_s, step_s, row_s = self._solved(terms, np.array([seconds for _, seconds in steps]))
        return Factors(
            flops=float(1 / v),
            bytes=float(1 / u),
            launch_s=float(launch_s),
            step_s=float(step_s),
            row_s=float(row_s),
            n_steps=self._n,
        )

    def _solved(self, terms: Floats, seconds: Floats) -> Floats:
        """The best of several starts: which side of a maximum is chosen decides what is fitted, and the other way."""
        assumed = np.array([1.0, 1.0, layer_overhead_s(self.device.kind), STAGE_OVERHEAD_S, 0.0])
        found = [
            _settled(terms, seconds, assumed, assumed * np.array([u, v, 1.0, 1.0, 1.0]))
            for u, v in product(_STARTS, _STARTS)
        ]
        return min(found, key=lambda one: float(np.median(np.abs(_residuals(terms, seconds, one)))))


def _settled(terms: Floats, seconds: Floats, assumed: Floats, start: Floats) -> Floats:
    found, weights = start, np.ones(len(seconds))
    for _ in range(_ROUNDS):
        rows = _sides(terms, found) / seconds[:, None]
        before, found = found, _bounded(rows, weights, assumed)
        weights = _trust(_residuals(terms, seconds, found))
        if np.allclose(before, found, rtol=1e-6, atol=1e-12):
            break
    return found


def _residuals(terms: Floats, seconds: Floats, found: Floats) -> Floats:
    residuals: Floats = _sides(terms, found) @ found / seconds - 1.0
    return residuals


def _sides(terms: Floats, found: Floats) -> Floats:
    """(N, 5): what u, v, launch, step and row are multiplied with, each maximum on the side that is larger now."""
    rows = np.zeros((len(terms), 5))
    for read, computed in ((0, 1), (2, 3)):
        is_read = found[0] * terms[:, read] >= found[1] * terms[:, computed]
        rows[:, 0] += np.where(is_read, terms[:, read], 0.0)
        rows[:, 1] += np.where(is_read, 0.0, terms[:, computed])
    rows[:, 2], rows[:, 3], rows[:, 4] = terms[:, 4], 1.0, terms[:, 5]
    return rows


def _bounded(rows: Floats, weights: Floats, assumed: Floats) -> Floats:
    """Least squares of rows @ x = 1 with a weak pull to `assumed`, within bounds: one coordinate after the other."""
    pull = (_PULL / np.where(assumed > 0, assumed, _ROW_S)) ** 2
    square = (rows * weights[:, None]).T @ rows + np.diag(pull)
    right = rows.T @ weights + pull * assumed
    free = np.linalg.solve(square, right)
    found = np.clip(free, _LOW, _HIGH)
    for _ in range(_SWEEPS if (free != found).any() else 0):
        for at in range(len(found)):
            rest = square[at] @ found - square[at, at] * found[at]
            found[at] = min(max((right[at] - rest) / square[at, at], _LOW[at]), _HIGH[at])
    return np.asarray(found, dtype=np.float64)


def _trust(residuals: Floats) -> Floats:
    off = np.abs(residuals)
    usual = 1.4826 * float(np.median(off)) + 1e-9
    trust: Floats = np.minimum(1.0, np.divide(_HUBER * usual, np.maximum(off, 1e-12), dtype=np.float64))
    return trust
