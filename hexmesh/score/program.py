"""Linear and integer programs put together row by row, with rows that have names."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_matrix, vstack

_INFEASIBLE = 2
"""What linprog calls it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Values and prices of a linear program."""

    values: NDArray[np.float64]
    worth: float
    limits: Mapping[Hashable, float]
    """What one more of each limit is worth, in units of the limit; zeros left out."""
    caps: Mapping[int, float]
    """The same of variables' bounds, in shares of them."""
    balances: Mapping[Hashable, float]
    """What one unit brought into the balance is worth."""
    losses: NDArray[np.float64]
    """What one unit of each variable that is 0 would cost."""


@dataclass(kw_only=True)
class Program:
    """Variables from 0 up, to be made worth as much as can be."""

    worth: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)
    integers: list[int] = field(default_factory=list)
    limits: dict[Hashable, int] = field(default_factory=dict)
    """Rows that stay below 1, or below the gate's value."""
    balances: dict[Hashable, int] = field(default_factory=dict)
    """Rows that come to 0."""
    _gates: dict[int, int] = field(default_factory=dict)
    _demands: set[int] = field(default_factory=set)
    _uses: list[tuple[int, int, float]] = field(default_factory=list)
    _terms: list[tuple[int, int, float]] = field(default_factory=list)

    def variable(self, worth: float = 0.0, most: float = math.inf, *, is_integer: bool = False) -> int:
        """A new one's number."""
        self.worth.append(worth)
        self.most.append(most)
        at = len(self.worth) - 1
        if is_integer:
            self.integers.append(at)
        return at

    def use(self, limit: Hashable, at: int, amount: float, available: float, gate: int | None = None) -> None:
        """A unit of the variable takes so much of what is available: once, or for each unit of the gate."""
        if available <= 0 < amount:
            self.most[at] = 0.0
        elif math.isfinite(available):
            row = self.limits.setdefault(limit, len(self.limits))
            self._uses.append((row, at, amount / available))
            if gate is not None and row not in self._gates:
                self._gates[row] = gate
                self._uses.append((row, gate, -1.0))

    def demand(self, key: Hashable, at: int, share: float) -> None:
        """The variable's unit gives that share of what must be there."""
        row = self.limits.setdefault(key, len(self.limits))
        self._demands.add(row)
        self._uses.append((row, at, -share))

    def balance(self, key: Hashable, at: int, sign: float) -> None:
        """The variable's term in a row that comes to 0."""
        self._terms.append((self.balances.setdefault(key, len(self.balances)), at, sign))

    def solve(self) -> Solution | None:
        """As a linear program, whatever should be an integer; None if the demands cannot be met."""
        if not self.worth:
            return Solution(
                values=np.zeros(0), worth=0.0, limits={}, caps={}, balances={}, losses=np.zeros(0)
            )
        most = np.array(self.most)
        found = linprog(
            -np.array(self.worth),
            A_ub=self._limit_rows,
            b_ub=self._room,
            A_eq=self._balance_rows,
            b_eq=np.zeros(len(self.balances)),
            bounds=np.column_stack([np.zeros(len(most)), most]),
            method="highs",
        )
        if found.status == _INFEASIBLE:
            return None
        assert found.success, found.message
        capped = np.nonzero(found.upper.marginals)[0]
        return Solution(
            values=np.maximum(found.x, 0.0),
            worth=-float(found.fun),
            limits=_prices(self.limits, -found.ineqlin.marginals),
            caps={int(at): float(-found.upper.marginals[at] * most[at]) for at in capped},
            balances=_prices(self.balances, found.eqlin.marginals),
            losses=found.lower.marginals,
        )

    def solve_integers(self, *, gap: float, max_nodes: int, limit_s: float) -> NDArray[np.float64] | None:
        """The best found with integers as integers; None if none was found. Cut off by nodes, and by time only late."""
        found = self._branch_and_bound(gap, max_nodes, limit_s)
        return None if found.x is None else np.maximum(found.x, 0.0)

    def most_of_integers(self, *, gap: float, max_nodes: int, limit_s: float) -> float:
        """What no solution with integers as integers is worth more than; minus infinity if there is none."""
        found = self._branch_and_bound(gap, max_nodes, limit_s)
        return -math.inf if found.mip_dual_bound is None else -float(found.mip_dual_bound)

    def _branch_and_bound(self, gap: float, max_nodes: int, limit_s: float) -> OptimizeResult:
        n_limits, n_balances = len(self.limits), len(self.balances)
        is_integer = np.zeros(len(self.worth))
        is_integer[self.integers] = 1
        lower = np.concatenate([np.full(n_limits, -np.inf), np.zeros(n_balances)])
        upper = np.concatenate([self._room, np.zeros(n_balances)])
        rows = vstack([self._limit_rows, self._balance_rows], format="csr")
        return milp(
            -np.array(self.worth),
            integrality=is_integer,
            bounds=Bounds(0.0, np.array(self.most)),
            constraints=[LinearConstraint(rows, lower, upper)],
            options={"mip_rel_gap": gap, "node_limit": max_nodes, "time_limit": limit_s},
        )

    @property
    def _room(self) -> NDArray[np.float64]:
        room = np.ones(len(self.limits))
        room[list(self._gates)] = 0.0
        room[list(self._demands)] = -1.0
        return room

    @property
    def _limit_rows(self) -> csr_matrix:
        return _matrix(self._uses, len(self.limits), len(self.worth))

    @property
    def _balance_rows(self) -> csr_matrix:
        return _matrix(self._terms, len(self.balances), len(self.worth))


def _matrix(entries: Sequence[tuple[int, int, float]], n_rows: int, n: int) -> csr_matrix:
    rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
    return csr_matrix((values, (rows, columns)), shape=(n_rows, n))


def _prices(keys: Mapping[Hashable, int], prices: NDArray[np.float64]) -> dict[Hashable, float]:
    return {key: float(price) for key, price in zip(keys, prices, strict=True) if price != 0.0}
