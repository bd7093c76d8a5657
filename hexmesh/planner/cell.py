"""What a partition with its roles may serve at most, when the layouts of some teams are chosen and those of others not.

Two bounds, the lesser counts. Without shared wires, for any price w of a prompt and 1 - w of an output

    rate <= sum over replicas of the most that w x + (1 - w) y comes to

and a replica for prompts or outputs alone does no more than its partners can be handed or hand over.

By prices, of anything that is limited: u of a prompt and v of an output at each replica, m of a byte on each wire.

    rate <= sum over replicas of the most that u x + v y comes to + sum over wires of m x bytes/s
            + sum over pairs of what a request is worth beyond u, v and the wires it takes x the most that they do

holds for whatever prices there are: every request is either paid for or counted. The prices at which a judged draft
sells out make it tight there, and low for what is no better: so each judgement rules others out, and NICs count once,
whoever shares them. After Benders (1962), whose cuts these are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hexmesh.cluster import Role
from hexmesh.planner.every_layout import N_DIRECTIONS, PRICES, Choice
from hexmesh.planner.handoff_caps import HandoffCaps, toll
from hexmesh.planner.layouts import Layout
from hexmesh.planner.problem import Draft, Judged, Problem
from hexmesh.score.flow_program import Limit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]

MOST_KNOWN = 8
"""Latest prices that layouts are bounded by."""
MOST_PAIRS = 20_000
"""Of placements, whose tolls are compared."""


@dataclass(frozen=True, eq=False)
class Prices:
    """At which a draft's replicas and wires sell out."""

    prompts: Floats
    outputs: Floats
    """(n,), by replica."""
    ways: Floats
    """(hosts, hosts): of a layer's KV from one to another; infinite where there is no way."""
    wires: float
    """What all wires come to."""


@dataclass(frozen=True, eq=False)
class Known:
    """Teams whose layouts are chosen already, and the one whose layouts are compared."""

    chosen: Mapping[int, int]
    at: int


class Cell:
    """A partition with its roles: layouts are left to choose."""

    def __init__(
        self,
        problem: Problem,
        caps: HandoffCaps,
        choices: Sequence[Choice],
        roles: Sequence[Role],
        pair_caps: Mapping[tuple[int, int], Floats],
        prices: list[Prices],
    ) -> None:
        """`pair_caps`: (placements, placements) requests a second, of each two that may hand over."""
        self._problem, self._wires, self._roles = problem, caps, roles
        self.choices, self._caps = choices, pair_caps
        self.order = sorted(range(len(choices)), key=lambda at: len(choices[at].parts))
        self.prices = prices

    def bounds(self, chosen: Mapping[int, int], at: int) -> Floats:
        """Of each layout of team `at`, given some of the others'."""
        found: Floats = self._free(Known(chosen, at)).copy()
        return found

    def lowered(
        self, bounds: Floats, chosen: Mapping[int, int], at: int, *, enough: float, n_known: int = 0
    ) -> Floats:
        """The bounds, lower where prices say so that came after the first `n_known`; until all are low enough."""
        for prices in reversed(self.prices[n_known:][-MOST_KNOWN:]):
            if bounds.max() <= enough:
                break
            bounds = np.minimum(bounds, self.bounds_at(prices, chosen, at))
        return bounds

    def learn(self, judged: Judged) -> None:
        """The prices of a draft of this cell."""
        if judged.flow.requests_per_s > 0:
            self.prices.append(self._sold_out(judged))

    def bounds_at(self, prices: Prices, chosen: Mapping[int, int], at: int) -> Floats:
        """The same by prices."""
        known, total = Known(chosen, at), np.full(1, prices.wires)
        n = len(self.choices)
        for team in range(n):
            total = total + self._sales(prices, known, team)
        for team in range(n):
            if self._roles[team] == "mixed":
                beyond = max(0.0, 1 - prices.prompts[team] - prices.outputs[team])
                total = total + beyond * np.minimum(
                    self._most(known, team, "prefill"), self._most(known, team, "decode")
                )
        for pair in self._caps:
            total = total + self._beyond(prices, known, *pair)
        found: Floats = np.broadcast_to(total, (len(self.choices[at].parts),))
        return found

    def _sold_out(self, judged: Judged) -> Prices:
        n, total = len(judged.draft), judged.flow.requests_per_s
        prompts, outputs = np.zeros(n), np.zeros(n)
        wires, sold = 0.0, dict[Limit, float]()
        for limit, share in judged.flow.shares.items():
            if limit.kind in ("prefill", "decode", "mixed"):
                at = int(limit.name.partition("/")[0].removeprefix("r"))
                prompt, output = _used(judged.draft[at], limit)
                prompts[at] += share * total * prompt
                outputs[at] += share * total * output
            else:
                wires += share * total
                sold[limit] = share * total
        return Prices(prompts, outputs, self._wires.tolls(sold), wires)

    def _sales(self, prices: Prices, known: Known, team: int) -> Floats:
        """The most that a team's prompts and outputs come to."""
        u, v = float(prices.prompts[team]), float(prices.outputs[team])
        if self._roles[team] == "prefill":
            return u * self._most(known, team, "prefill")
        if self._roles[team] == "decode":
            return v * self._most(known, team, "decode")
        if u + v <= 0:
            return np.zeros(1)
        # Between two directions a convex figure is below its chord.
        place = u / (u + v) * (N_DIRECTIONS - 1)
        below = min(int(place), N_DIRECTIONS - 2)
        reach = self._reach(known, team)
        found: Floats = (u + v) * (
            (below + 1 - place) * reach[:, below] + (place - below) * reach[:, below + 1]
        )
        return found

    def _beyond(self, prices: Prices, known: Known, p: int, d: int) -> Floats:
        """What the requests that one hands to another are worth beyond all that they pay."""
        beyond = 1 - prices.prompts[p] - prices.outputs[d]
        if beyond <= 0:
            return np.zeros(1)
        most = np.minimum(self._most(known, p, "prefill"), self._most(known, d, "decode"))
        most = np.minimum(most, self._cap(known, p, d))
        found: Floats = np.maximum(0.0, beyond - self._toll(prices, known, p, d)) * most
        return found

    def _toll(self, prices: Prices, known: Known, p: int, d: int) -> Floats:
        """The least that a handoff pays to wires; by layouts of team `at` if it is one of the two."""
        sources, targets = self._placements(known, p), self._placements(known, d)
        if len(sources) * len(targets) > MOST_PAIRS:
            return np.zeros(1)
        tolls = toll(prices.ways, sources, targets)
        if known.at == p:
            found: Floats = tolls.min(axis=1)[self.choices[p].placements[1]]
        elif known.at == d:
            found = tolls.min(axis=0)[self.choices[d].placements[1]]
        else:
            found = tolls.min().reshape(1)
        return found

    def _placements(self, known: Known, team: int) -> Ints:
        choice = self.choices[team]
        if team in known.chosen:
            layout = known.chosen[team]
            return choice.hosts[layout : layout + 1]
        return choice.placements[0]

    def _most(self, known: Known, team: int, phase: Literal["prefill", "decode"]) -> Floats:
        choice = self.choices[team]
        rate = choice.prefill if phase == "prefill" else choice.decode
        if team == known.at:
            return rate
        return np.array([rate[known.chosen[team]] if team in known.chosen else rate.max()])

    def _free(self, known: Known) -> Floats:
        """Whatever wires are shared."""
        total: Floats = np.zeros((1, len(PRICES)))
        for team in range(len(self.choices)):
            if self._roles[team] == "mixed":
                total = total + self._reach(known, team)
                continue
            is_prefill = self._roles[team] == "prefill"
            most = self._most(known, team, "prefill" if is_prefill else "decode")
            handed: Floats | float = 0.0
            for p, d in self._caps:
                if team == (p if is_prefill else d):
                    handed = handed + self._cap(known, p, d)
            most = np.minimum(most, handed)
            total = total + most[:, None] * (PRICES if is_prefill else 1 - PRICES)
        found: Floats = np.broadcast_to(total.min(axis=1), (len(self.choices[known.at].parts),))
        return found

    def _reach(self, known: Known, team: int) -> Floats:
        choice = self.choices[team]
        if team == known.at:
            return choice.reach
        return (choice.reach[known.chosen[team]] if team in known.chosen else choice.furthest)[None, :]

    def _cap(self, known: Known, p: int, d: int) -> Floats:
        """Of each layout of team `at`, or the one number that holds for all."""
        caps = self._caps[p, d]
        for axis, team in ((0, p), (1, d)):
            placement_of = self.choices[team].placements[1]
            if team == known.at:
                caps = np.take(caps, placement_of, axis=axis)
            elif team in known.chosen:
                caps = np.take(caps, [placement_of[known.chosen[team]]], axis=axis)
            else:
                caps = caps.max(axis=axis, keepdims=True)
        return caps.reshape(-1)

    def draft(self, chosen: Mapping[int, int]) -> Draft | None:
        """None where the score does not agree that a layout does anything (at the last bit of a limit)."""
        found = [
            self._problem.layouts.rated(self.choices[at].parts[chosen[at]], self._roles[at])
            for at in range(len(self.choices))
        ]
        layouts = tuple(layout for layout in found if layout is not None)
        return layouts if len(layouts) == len(found) else None


def _used(layout: Layout, limit: Limit) -> tuple[float, float]:
    """What a prompt and an output take of a replica's limit."""
    match limit.kind:
        case "prefill":
            return 1 / layout.prefill, 0.0
        case "decode":
            return 0.0, 1 / layout.decode
        case _:
            return layout.uses[int(limit.name.partition("/")[2])]
