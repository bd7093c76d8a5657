"""How long a node's certificate is good: for a day, then for a week of grace, then not at all.

X.509's notAfter stands at the end of the grace, so that TLS and every other judge refuse a certificate exactly
when we do; the day that ends before it is our own rule. A node renews from the half of that day on.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

Standing = Literal["fresh", "due", "grace", "expired"]
"""fresh: nothing to do; due: renew now; grace: it should have been renewed; expired: nobody accepts it."""

NODE_VALIDITY = timedelta(hours=24)
GRACE = timedelta(days=7)

CLOCK_SLACK = timedelta(minutes=5)
"""Certificates are valid from this long before they are made: other hosts' clocks may be late."""


@dataclass(frozen=True, slots=True)
class Validity:
    """The moments in a certificate's life."""

    issued_at: datetime
    expires_at: datetime
    """From here on in grace."""
    refused_at: datetime

    @classmethod
    def between(cls, not_before: datetime, not_after: datetime) -> Validity:
        """By a certificate's own bounds."""
        issued_at = not_before + CLOCK_SLACK
        return cls(issued_at, max(issued_at, not_after - GRACE), not_after)

    @property
    def due_at(self) -> datetime:
        """When to renew: at half life."""
        return self.issued_at + (self.expires_at - self.issued_at) / 2

    def standing(self, now: datetime) -> Standing:
        if now > self.refused_at:
            return "expired"
        if now >= self.expires_at:
            return "grace"
        return "due" if now >= self.due_at else "fresh"
