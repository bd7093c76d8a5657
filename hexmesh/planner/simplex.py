"""The textbook primal simplex on a dense tableau: for the few dozen rows of `balance`, ten times quicker than a call of
a solver. Dantzig's rule; Bland's after many pivots, which cannot cycle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

_EPSILON = 1e-11
"""Below it a number is taken for 0: entries should be around 1."""
_PIVOTS_PER_ROW = 10
"""After so many Bland's rule takes over."""


@dataclass(frozen=True, slots=True)
class Optimum:
    """Values of the variables and prices of the rows."""

    values: Vector
    prices: Vector
    worth: float


def maximise(worth: Vector, rows: Matrix, room: Vector) -> Optimum:
    """The most of `worth` x with `rows` x <= `room` and x >= 0; room must not be negative, nor the worth unbounded."""
    n_rows, n = rows.shape
    tableau = np.zeros((n_rows + 1, n + n_rows + 1))
    tableau[:n_rows, :n], tableau[:n_rows, n:-1], tableau[:n_rows, -1] = rows, np.eye(n_rows), room
    tableau[-1, :n] = -worth
    basis = np.arange(n, n + n_rows)
    n_pivots = 0
    while (entering := _entering(tableau[-1, :-1], n_pivots > _PIVOTS_PER_ROW * n_rows)) is not None:
        column = tableau[:, entering].copy()
        leaving = _leaving(column[:-1], tableau[:-1, -1], basis)
        pivot = tableau[leaving] / column[leaving]
        tableau -= np.outer(column, pivot)
        tableau[leaving] = pivot
        basis[leaving] = entering
        n_pivots += 1
    values = np.zeros(n + n_rows)
    values[basis] = tableau[:-1, -1]
    return Optimum(values[:n], tableau[-1, n:-1], float(tableau[-1, -1]))


def _entering(reduced: Vector, by_bland: bool) -> int | None:
    """The column that gains most, or the first that gains; None at the optimum."""
    at = int(np.argmax(reduced < -_EPSILON)) if by_bland else int(np.argmin(reduced))
    return at if reduced[at] < -_EPSILON else None


def _leaving(column: Vector, left: Vector, basis: npt.NDArray[np.intp]) -> int:
    """The row that runs out first; of several the one of the lowest variable."""
    ratios = np.full(len(left), np.inf)
    np.divide(left, column, out=ratios, where=column > _EPSILON)
    least = ratios.min()
    assert np.isfinite(least), "unbounded"
    tied = np.flatnonzero(ratios <= least)
    return int(tied[np.argmin(basis[tied])])
