"""Random changes to teams with roles: what annealing tries next. Partners are drawn near by, so that most fit together.

A change that cannot be (no partner, nothing to split) is None: the search draws again.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hexmesh.cluster import Role
from hexmesh.planner.moves import halved, handful, joined, pool_of_any, some_of, torn, without
from hexmesh.planner.pools import ROLES, Pool, Team

SPARE = -1
"""The devices that no team has, where an index of a team is asked for."""
SAME_HOST, SAME_SITE = 0.5, 0.8
"""Of the partners that are drawn, so many are on the same host, and so many at most at the same site."""
CHANGES_ROLE = 0.1
"""How often a team that gets devices changes its role, too."""

Grouped = tuple[Team, Role]


@dataclass(frozen=True, slots=True)
class Change:
    """Teams that go, by index, and teams that come. Devices of the first that are not in the second become spare, and
    those that are only in the second were."""

    gone: tuple[int, ...]
    come: tuple[Grouped, ...]


class Changes:
    """Draws changes to one state; `teams` and `spare` share out all devices of `pools`."""

    def __init__(
        self, pools: Sequence[Pool], roles: frozenset[Role], teams: Sequence[Grouped], spare: Team
    ) -> None:
        self._pools, self._teams, self._spare = pools, teams, spare
        self._roles = [role for role in ROLES if role in roles]
        self._owners = defaultdict[int, list[tuple[int, int]]](list)
        for at, (team, _) in enumerate(teams):
            for pool, n in team:
                self._owners[pool].append((at, n))
        for pool, n in spare:
            self._owners[pool].append((SPARE, n))

    def draw(self, nearby: Nearby, rng: random.Random) -> Change | None:
        """One of all kinds of moves."""
        if not self._teams:
            return self._taken_up(nearby, rng)
        (move,) = rng.choices(_MOVES, _WEIGHTS)
        return move(self, nearby, rng)

    def _moved(self, nearby: Nearby, rng: random.Random) -> Change | None:
        """A handful from one team to another."""
        pool, src = self._any(nearby, rng)
        dst = self._owner(nearby.of(pool, rng), rng)
        if src == dst:
            return None
        taken = some_of(pool, self._team(src), rng)
        return self._change(
            (src, dst), (without(self._team(src), taken), joined(self._team(dst), taken)), rng
        )

    def _swapped(self, nearby: Nearby, rng: random.Random) -> Change | None:
        """Handfuls of two teams change places."""
        pool, a = self._any(nearby, rng)
        other = nearby.of(pool, rng)
        b = self._owner(other, rng)
        if a == b or pool == other:
            return None
        here, there = some_of(pool, self._team(a), rng), some_of(other, self._team(b), rng)
        return self._change(
            (a, b),
            (
                joined(without(self._team(a), here), there),
                joined(without(self._team(b), there), here),
            ),
            rng,
        )

    def _merged(self, nearby: Nearby, rng: random.Random) -> Change | None:
        pool, a = self._any(nearby, rng)
        b = self._owner(nearby.of(pool, rng), rng)
        if a == b or SPARE in (a, b):
            return None
        role = self._role_near(self._teams[a][1], rng, 0.5)
        return Change((a, b), ((joined(self._team(a), self._team(b)), role),))

    def _split(self, nearby: Nearby, rng: random.Random) -> Change | None:
        _, at = self._any(nearby, rng)
        if at == SPARE:
            return None
        team, role = self._teams[at]
        match rng.randrange(3):
            case 0:
                parts = halved(team)
            case 1:
                parts = torn(team, rng)
            case _:
                first = handful(team, rng)
                parts = first, without(team, first)
        if not all(parts):
            return None
        return Change((at,), tuple((part, self._role_near(role, rng, 0.5)) for part in parts))

    def _founded(self, nearby: Nearby, rng: random.Random) -> Change | None:
        """A new team of handfuls from two owners."""
        pool, a = self._any(nearby, rng)
        other = nearby.of(pool, rng)
        b = self._owner(other, rng)
        if a == b:
            return None
        here, there = some_of(pool, self._team(a), rng), some_of(other, self._team(b), rng)
        left = self._change((a, b), (without(self._team(a), here), without(self._team(b), there)), rng)
        return Change(left.gone, (*left.come, (joined(here, there), rng.choice(self._roles))))

    def _scattered(self, nearby: Nearby, rng: random.Random) -> Change | None:
        """A team's pools go to neighbours, or become spare."""
        _, at = self._any(nearby, rng)
        if at == SPARE:
            return None
        given = defaultdict[int, list[Team]](list)
        for pool, n in self._team(at):
            given[self._owner(nearby.of(pool, rng), rng)].append(((pool, n),))
        given.pop(at, None)
        given.pop(SPARE, None)
        come = tuple((joined(self._team(to), *parts), self._teams[to][1]) for to, parts in given.items())
        return Change((at, *given), come)

    def _turned(self, nearby: Nearby, rng: random.Random) -> Change | None:
        """Another role for a team."""
        _, at = self._any(nearby, rng)
        if at == SPARE or len(self._roles) == 1:
            return None
        team, role = self._teams[at]
        return Change((at,), ((team, rng.choice([other for other in self._roles if other != role])),))

    def _dropped(self, nearby: Nearby, rng: random.Random) -> Change | None:
        """A handful of a team, or all of it, becomes spare."""
        pool, at = self._any(nearby, rng)
        if at == SPARE:
            return None
        if rng.random() < 0.5:
            return Change((at,), ())
        team = self._team(at)
        return self._change((at,), (without(team, some_of(pool, team, rng)),), rng)

    def _taken_up(self, nearby: Nearby, rng: random.Random) -> Change | None:
        """Spare devices join a team near by, or become one."""
        if not self._spare:
            return None
        taken = handful(self._spare, rng)
        at = self._owner(nearby.of(taken[0][0], rng), rng)
        if at == SPARE:
            team = taken if rng.random() < 0.5 else self._spare
            return Change((), ((team, rng.choice(self._roles)),))
        return self._change((at,), (joined(self._team(at), taken),), rng)

    def _replaced(self, nearby: Nearby, rng: random.Random) -> Change | None:
        """A team makes way for one of the spare devices of a host, a site or everywhere."""
        if not self._spare:
            return None
        around = nearby.around(pool_of_any(self._spare, rng), rng)
        team = tuple((pool, n) for pool, n in self._spare if pool in around)
        return Change((rng.randrange(len(self._teams)),), ((team, rng.choice(self._roles)),))

    def _emptied(self, nearby: Nearby, rng: random.Random) -> Change | None:
        """A host, or a site, is left by all teams."""
        left = nearby.around(pool_of_any(nearby.whole, rng), rng)
        gone = [at for at, (team, _) in enumerate(self._teams) if any(pool in left for pool, _ in team)]
        kept = [(tuple(own for own in self._team(at) if own[0] not in left), at) for at in gone]
        return Change(tuple(gone), tuple((team, self._teams[at][1]) for team, at in kept if team))

    def _change(self, at: tuple[int, ...], teams: tuple[Team, ...], rng: random.Random) -> Change:
        """Teams at `at` become `teams`; what is left of spare devices stays spare."""
        kept = [(n, team) for n, team in zip(at, teams, strict=True) if n != SPARE]
        return Change(
            tuple(n for n, _ in kept),
            tuple((team, self._role_near(self._teams[n][1], rng, CHANGES_ROLE)) for n, team in kept if team),
        )

    def _role_near(self, role: Role, rng: random.Random, often: float) -> Role:
        return rng.choice(self._roles) if rng.random() < often else role

    def _team(self, at: int) -> Team:
        return self._spare if at == SPARE else self._teams[at][0]

    def _any(self, nearby: Nearby, rng: random.Random) -> tuple[int, int]:
        """The pool and the owner of a device, all equally likely."""
        pool = pool_of_any(nearby.whole, rng)
        return pool, self._owner(pool, rng)

    def _owner(self, pool: int, rng: random.Random) -> int:
        """Of one of the pool's devices."""
        owners = self._owners[pool]
        if len(owners) == 1:
            return owners[0][0]
        return rng.choices([at for at, _ in owners], [n for _, n in owners])[0]


class Nearby:
    """Pools by how near they are."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.whole: Team = tuple((at, pool.size) for at, pool in enumerate(pools))
        hosts, sites = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
        for at, pool in enumerate(pools):
            hosts[pool.node.id].append(at)
            sites[pool.node.site].append(at)
        self._all = list(range(len(self.whole)))
        self._same_host = [hosts[pool.node.id] for pool in pools]
        self._same_site = [sites[pool.node.site] for pool in pools]

    def of(self, pool: int, rng: random.Random) -> int:
        """Another pool, or the same: other teams may have some of it."""
        return rng.choice(self.around(pool, rng))

    def around(self, pool: int, rng: random.Random) -> list[int]:
        """All pools of its host, its site or everywhere."""
        drawn = rng.random()
        if drawn < SAME_HOST:
            return self._same_host[pool]
        return self._same_site[pool] if drawn < SAME_SITE else self._all


_MOVES: tuple[Callable[[Changes, Nearby, random.Random], Change | None], ...] = (
    Changes._moved,
    Changes._swapped,
    Changes._turned,
    Changes._split,
    Changes._merged,
    Changes._founded,
    Changes._scattered,
    Changes._dropped,
    Changes._taken_up,
    Changes._replaced,
    Changes._emptied,
)
_WEIGHTS = (30, 20, 12, 10, 8, 6, 5, 4, 10, 4, 2)
