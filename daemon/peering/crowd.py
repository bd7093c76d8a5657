"""Who has to go when the waiting room of not yet known connections is full: the oldest of the greatest crowd.

So one address that opens connections without end pushes out its own, and somebody else can still get in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, TypeVar


class Waiting(Protocol):
    @property
    def source(self) -> str: ...


W = TypeVar("W", bound=Waiting)


def oldest_of_the_crowd(waiting: Sequence[W]) -> W | None:
    """The first of those that come from the most frequent source; None when nobody waits."""
    if not waiting:
        return None
    (source, _) = Counter(one.source for one in waiting).most_common(1)[0]
    return next(one for one in waiting if one.source == source)
