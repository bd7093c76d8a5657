"""All layouts of a team that some plan may want, in each role: what exhaustive search chooses from.

A layout is wanted if no other one of the same team and role, with the same layers on the same hosts, does at least as
much. For prompts or tokens alone that is one a placement: the fastest. A mixed replica may be wanted for any balance of
the two, so all of its polygons that reach furthest in some direction are kept.

Complete where a team has at most MOST_LAYOUTS layouts (every order of its groups, every cut): four like devices and
eight layers, or three like devices and 80. Of larger teams: the orders of the layouts that are best in each role, and
hosts in every order, with the borders between hosts moved anywhere on a grid, and single cuts by some layers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise, permutations, product
from math import comb, factorial, prod

import numpy as np
import numpy.typing as npt

from hexmesh.cluster import Role
from hexmesh.planner.layout_tables import Tables
from hexmesh.planner.layouts import INSIDE
from hexmesh.planner.pools import ROLES, Part, Team
from hexmesh.planner.problem import Problem
from hexmesh.planner.rates_of_many import Batch, Rates, RatesOfMany
from hexmesh.score.pipeline import NOWHERE, Hop, group_like

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]

MOST_LAYOUTS = 4000
"""Of one team, to have them all."""
N_DIRECTIONS = 65
PRICES = np.linspace(0.0, 1.0, N_DIRECTIONS)
"""Of a prompt a second; an output a second costs the rest of 1."""
_SHIFTS = (1, 2, 4, 8)
_BORDERS = 24
"""Places of a border between two hosts of a team with too many layouts."""
_MOST_HOSTS = 4

Group = tuple[int, int]
"""(pool, TP degree)"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """Wanted layouts of a team in a role, N of them; hosts are numbered as in the cluster."""

    role: Role
    parts: tuple[tuple[Part, ...], ...]
    prefill: Floats
    decode: Floats
    reach: Floats
    """(N, N_DIRECTIONS): the most that prompts and outputs a second come to at PRICES."""
    hosts: Ints
    """(N, n_layers): who holds each layer."""
    is_complete: bool

    @cached_property
    def furthest(self) -> Floats:
        """(N_DIRECTIONS,): of any of the layouts."""
        found: Floats = self.reach.max(axis=0)
        return found

    @cached_property
    def placements(self) -> tuple[Ints, Ints]:
        """Those that differ, (U, n_layers), and which of them each layout has, (N,)."""
        found, inverse = np.unique(self.hosts, axis=0, return_inverse=True)
        return found, inverse.reshape(-1)


@dataclass(frozen=True, eq=False)
class _Asked:
    """Layouts of one sequence."""

    sequence: tuple[Group, ...]
    cuts: Ints


@dataclass(frozen=True, eq=False)
class _Rated:
    """Layouts of as many stages, from several sequences, with every rate."""

    sequences: tuple[tuple[Group, ...], ...]
    sequence_of: Ints
    """(N,)"""
    cuts: Ints
    rates: Rates


class EveryLayout:
    """Choices of any team, kept for as long as this lives."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._nodes = {node.id: at for at, node in enumerate(problem.cluster.nodes)}
        groups = {
            (at, tp): group_like(pool.node, pool.device, tp)
            for at, pool in enumerate(problem.pools)
            for tp in pool.degrees
        }
        distinct = tuple(dict.fromkeys(groups.values()))
        at = {group: index for index, group in enumerate(distinct)}
        self._options = {key: at[group] for key, group in groups.items()}
        self._rates = RatesOfMany(Tables(problem.capacities, distinct))
        self._choices = dict[Team, dict[Role, Choice]]()

    def of(self, team: Team) -> dict[Role, Choice]:
        """By role; roles that the team cannot have are left out."""
        if team not in self._choices:
            self._choices[team] = self._find(team)
        return self._choices[team]

    def _find(self, team: Team) -> dict[Role, Choice]:
        roles = [role for role in ROLES if self._problem.may_be(team, role)]
        n_layers = self._problem.spec.n_layers
        is_complete = n_layouts(self._degrees(team), n_layers) <= MOST_LAYOUTS
        every = self._every(team) if is_complete else self._near_the_best(team, roles)
        rated = list(self._rated([asked for asked in every if len(asked.cuts)]))
        found = ((role, self._choice(role, rated, is_complete)) for role in roles)
        return {role: choice for role, choice in found if choice is not None}

    def _degrees(self, team: Team) -> list[tuple[int, int, tuple[int, ...]]]:
        return [(pool, count, self._problem.pools[pool].degrees) for pool, count in team]

    def _every(self, team: Team) -> Iterator[_Asked]:
        for sequence in sequences(self._degrees(team)):
            yield self._asked(sequence, every_cut(self._problem.spec.n_layers, len(sequence)))

    def _asked(self, sequence: tuple[Group, ...], cuts: Ints) -> _Asked:
        """Without what does not fit."""
        options = [self._options[group] for group in sequence]
        return _Asked(sequence, cuts[self._rates.fits(options, cuts)])

    def _rated(self, every: Sequence[_Asked]) -> Iterator[_Rated]:
        for n_stages in sorted({len(asked.sequence) for asked in every}):
            ways = [
                (asked, hops)
                for asked in every
                if len(asked.sequence) == n_stages and (hops := self._hops(asked.sequence)) is not None
            ]
            if not ways:
                continue
            sizes = [len(asked.cuts) for asked, _ in ways]
            cuts = np.concatenate([asked.cuts for asked, _ in ways])
            options = [[self._options[group] for group in asked.sequence] for asked, _ in ways]
            batch = Batch(
                options=np.repeat(np.array(options, np.intp), sizes, axis=0),
                cuts=cuts,
                send_s=np.repeat(
                    np.array([[hop.send_s(1.0) for hop in hops[:-1]] for _, hops in ways]), sizes, axis=0
                ).reshape(len(cuts), n_stages - 1),
                delay_s=np.repeat([sum(hop.delay_s for hop in hops[:-1]) for _, hops in ways], sizes),
                back_s=np.repeat([hops[-1].delay_s for _, hops in ways], sizes),
            )
            yield _Rated(
                tuple(asked.sequence for asked, _ in ways),
                np.repeat(np.arange(len(ways)), sizes),
                cuts,
                self._rates.rates(batch),
            )

    def _hops(self, sequence: tuple[Group, ...]) -> list[Hop] | None:
        """Between the stages, and back to the first; None where a way is missing."""
        if len(sequence) == 1:
            return [NOWHERE]
        found = [self._hop(a, b) for (a, _), (b, _) in pairwise((*sequence, sequence[0]))]
        return None if None in found else [hop for hop in found if hop is not None]

    def _hop(self, src: int, dst: int) -> Hop | None:
        a, b = self._problem.pools[src].node, self._problem.pools[dst].node
        if a.id == b.id:
            return INSIDE
        link = self._problem.links.get((a.id, b.id))
        return None if link is None else Hop(link.rtt_p50_s / 2, link.bytes_per_s)

    def _near_the_best(self, team: Team, roles: Sequence[Role]) -> Iterator[_Asked]:
        """Sequences of the best layouts in each role, with cuts around theirs."""
        found = dict[tuple[Group, ...], set[tuple[int, ...]]]()
        for role in roles:
            for layout in (
                self._problem.layouts.best(team, role),
                self._problem.layouts.quickest(team, role),
            ):
                if layout is not None:
                    sequence = tuple((part.pool, part.tp) for part in layout.parts)
                    cuts = (0, *(part.stop for part in layout.parts))
                    found.setdefault(sequence, set()).update(self._around(sequence, cuts))
        for sequence, cuts in self._spread(team):
            found.setdefault(sequence, set()).update(self._around(sequence, cuts))
        for sequence, every in found.items():
            yield self._asked(sequence, np.array(sorted(every), np.intp))

    def _spread(self, team: Team) -> Iterator[tuple[tuple[Group, ...], tuple[int, ...]]]:
        """All of the team's devices, hosts in every order, layers by memory: what slow links may ask for."""
        pools, n_layers = self._problem.pools, self._problem.spec.n_layers
        by_host = defaultdict[str, list[tuple[int, int]]](list)
        for pool, count in team:
            by_host[pools[pool].node.id].append((pool, count))
        for order in permutations(by_host.values()) if 1 < len(by_host) <= _MOST_HOSTS else ():
            for split in (_singles, _largest):
                sequence = tuple(
                    (pool, tp) for own in order for pool, n in own for tp in split(n, pools[pool].degrees)
                )
                room = np.cumsum([0, *(pools[pool].device.budget_bytes * tp for pool, tp in sequence)])
                cuts = tuple(int(cut) for cut in np.round(room * n_layers / room[-1]))
                if all(a < b for a, b in pairwise(cuts)):
                    yield sequence, cuts

    def _around(self, sequence: tuple[Group, ...], cuts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        hosts = [self._problem.pools[pool].node.id for pool, _ in sequence]
        borders = [at for at in range(1, len(cuts) - 1) if hosts[at - 1] != hosts[at]]
        yield from (cuts, *stretched(cuts, borders))
        for at in range(1, len(cuts) - 1):
            for shift in _SHIFTS:
                for by in (-shift, shift):
                    if cuts[at - 1] < cuts[at] + by < cuts[at + 1]:
                        yield (*cuts[:at], cuts[at] + by, *cuts[at + 1 :])

    def _choice(self, role: Role, rated: Sequence[_Rated], is_complete: bool) -> Choice | None:
        found = list[tuple[tuple[Group, ...], Ints]]()
        rates, reach, hosts = list[Floats](), list[Floats](), list[Ints]()
        for one in rated:
            own = _in_role(role, one.rates, hands_over=self._problem.hands_over)
            kept = np.flatnonzero(own[2])
            if not len(kept):
                continue
            held = self._hosts(one, kept)
            wanted = _undominated(own[1][kept], held)
            kept, held = kept[wanted], held[wanted]
            found += [(one.sequences[one.sequence_of[at]], one.cuts[at]) for at in kept]
            rates.append(own[0][kept])
            reach.append(own[1][kept])
            hosts.append(held)
        if not found:
            return None
        every_reach, every_host = np.concatenate(reach), np.concatenate(hosts)
        wanted = _undominated(every_reach, every_host)
        both = np.concatenate(rates)[wanted]
        return Choice(
            role=role,
            parts=tuple(_parts(*found[at]) for at in wanted),
            prefill=both[:, 0],
            decode=both[:, 1],
            reach=every_reach[wanted],
            hosts=every_host[wanted],
            is_complete=is_complete,
        )

    def _hosts(self, one: _Rated, kept: Ints) -> Ints:
        """(kept, n_layers)"""
        layers = np.arange(self._problem.spec.n_layers)
        stage = (one.cuts[kept][:, None, 1:-1] <= layers[None, :, None]).sum(axis=2)
        owners = np.array(
            [
                [self._nodes[self._problem.pools[pool].node.id] for pool, _ in sequence]
                for sequence in one.sequences
            ]
        )
        found: Ints = owners[one.sequence_of[kept][:, None], stage]
        return found


def _in_role(role: Role, rates: Rates, *, hands_over: bool) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """(prefill and decode rates, reach, whether it does anything)"""
    zeros = np.zeros_like(rates.prefill)
    if role == "prefill":
        return np.stack([rates.prefill, zeros], 1), rates.prefill[:, None] * PRICES, rates.prefill > 0
    if role == "decode":
        return np.stack([zeros, rates.decode], 1), rates.decode[:, None] * (1 - PRICES), rates.decode > 0
    both = np.stack([rates.prefill, rates.decode], 1)
    is_any = (rates.prefill > 0) & (rates.mixed > 0)
    reach = np.zeros((len(zeros), N_DIRECTIONS))
    if hands_over:
        reach[is_any] = polygon_reach(rates.prefill[is_any], rates.decode[is_any], rates.uses[is_any])
    else:  # As many prompts as outputs, whatever they are worth.
        reach[is_any] = rates.mixed[is_any, None]
    return both, reach, is_any


def polygon_reach(prefill: Floats, decode: Floats, uses: Floats) -> Floats:
    """(N, N_DIRECTIONS): how far x prompts and y outputs a second reach within all rows and both rates.

    The border is the least y over all rows at x, a concave line whose corners lie where two rows meet.
    """
    only_x = np.stack([1 / prefill, np.zeros_like(prefill)], axis=1)[:, None, :]
    only_y = np.stack([np.zeros_like(decode), 1 / decode], axis=1)[:, None, :]
    rows = np.concatenate([uses, only_x, only_y], axis=1)
    x_cost, y_cost = rows[:, :, 0], rows[:, :, 1]
    a, b = (np.array(ends) for ends in zip(*combinations(range(rows.shape[1]), 2), strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        det = x_cost[:, a] * y_cost[:, b] - x_cost[:, b] * y_cost[:, a]
        x = np.nan_to_num((y_cost[:, b] - y_cost[:, a]) / det, nan=0.0, posinf=0.0, neginf=0.0)
        most = (1 / x_cost).min(axis=1)
    x = np.concatenate([np.zeros((len(x), 1)), np.clip(x, 0.0, most[:, None]), most[:, None]], axis=1)
    reach = np.zeros((len(x), N_DIRECTIONS))
    for at in range(x.shape[1]):
        left = 1 - x[:, at, None] * x_cost
        with np.errstate(divide="ignore", invalid="ignore"):
            y = np.where(y_cost > 0, left / y_cost, np.inf).min(axis=1).clip(min=0.0)
        reach = np.maximum(reach, x[:, at, None] * PRICES + y[:, None] * (1 - PRICES))
    return reach


def _undominated(reach: Floats, hosts: Ints) -> Ints:
    """Layouts that reach furthest of their placement in some direction, rising."""
    placements, inverse = np.unique(hosts, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    order = np.argsort(inverse, kind="stable")
    sizes = np.bincount(inverse, minlength=len(placements))
    ends = np.cumsum(sizes)
    found = order[ends[sizes == 1] - 1].tolist()
    for at in np.flatnonzero(sizes > 1):
        left = order[ends[at] - sizes[at] : ends[at]]
        while len(left):
            best = left[reach[left].sum(axis=1).argmax()]
            found.append(int(best))
            left = left[(reach[left] > reach[best] * (1 + 1e-12)).any(axis=1)]
    return np.array(sorted(found), np.intp)


def _parts(sequence: tuple[Group, ...], cuts: Ints) -> tuple[Part, ...]:
    ends = pairwise(int(cut) for cut in cuts)
    return tuple(
        Part(pool=pool, tp=tp, start=start, stop=stop)
        for (pool, tp), (start, stop) in zip(sequence, ends, strict=True)
    )


def sequences(team: Sequence[tuple[int, int, tuple[int, ...]]]) -> Iterator[tuple[Group, ...]]:
    """Every order of groups that takes all devices of the team, given as (pool, devices, TP degrees)."""
    for split in product(*(tuple(_splits(count, degrees)) for _, count, degrees in team)):
        groups = Counter((pool, tp) for (pool, _, _), own in zip(team, split, strict=True) for tp in own)
        yield from _orders(groups, sum(groups.values()))


def n_layouts(team: Sequence[tuple[int, int, tuple[int, ...]]], n_layers: int) -> int:
    """How many layouts take all devices of the team."""
    total = 0
    for split in product(*(tuple(_splits(count, degrees)) for _, count, degrees in team)):
        n = sum(map(len, split))
        alike = prod(factorial(k) for own in split for k in Counter(own).values())
        total += factorial(n) // alike * comb(n_layers - 1, n - 1)
    return total


def _singles(count: int, degrees: Sequence[int]) -> tuple[int, ...]:
    return (1,) * count


def _largest(count: int, degrees: Sequence[int]) -> tuple[int, ...]:
    """The fewest groups, the largest first."""
    degree = max(degree for degree in degrees if degree <= count)
    rest = count - degree
    return (degree, *(_largest(rest, degrees) if rest else ()))


def _splits(count: int, degrees: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Multisets of degrees that sum to `count`, each falling."""
    if count == 0:
        yield ()
    for degree in degrees:
        if degree <= count:
            for rest in _splits(count - degree, [other for other in degrees if other <= degree]):
                yield (degree, *rest)


def _orders(groups: Counter[Group], n: int) -> Iterator[tuple[Group, ...]]:
    if n == 0:
        yield ()
    for group in sorted(groups):
        if groups[group]:
            groups[group] -= 1
            for rest in _orders(groups, n - 1):
                yield (group, *rest)
            groups[group] += 1


def every_cut(n_layers: int, n_stages: int) -> Ints:
    """(N, n_stages + 1)"""
    inner = list(combinations(range(1, n_layers), n_stages - 1))
    found = np.zeros((len(inner), n_stages + 1), np.intp)
    found[:, -1] = n_layers
    if n_stages > 1:
        found[:, 1:-1] = np.array(inner, np.intp).reshape(len(inner), n_stages - 1)
    return found


def stretched(cuts: tuple[int, ...], borders: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The cuts with their borders moved to every place of a grid, what lies between stretched along."""
    n_layers = cuts[-1]
    step = max(1, n_layers // max(2, round((_BORDERS * 8) ** (1 / max(1, len(borders))))))
    for places in combinations(range(step, n_layers, step), len(borders)) if borders else ():
        found = stretch(cuts, borders, places)
        if found is not None:
            yield found


def stretch(cuts: tuple[int, ...], borders: Sequence[int], places: Sequence[int]) -> tuple[int, ...] | None:
    """The cuts with those at indices `borders` at `places`, the others in proportion; None if a stage gets no layer."""
    old = [0, *(cuts[at] for at in borders), cuts[-1]]
    found = np.round(np.interp(cuts, old, [0, *places, cuts[-1]])).astype(int)
    return tuple(int(cut) for cut in found) if (np.diff(found) > 0).all() else None
