"""What one check found, and which of all findings to mend first. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["pass", "warn", "fail", "not-run"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of what is, and one of what to do about it (empty where there is nothing to do)."""

    check: str
    outcome: Outcome
    finding: str
    next_step: str = ""


def passed(check: str, finding: str) -> Finding:
    return Finding(check, "pass", finding)


def warned(check: str, finding: str, next_step: str) -> Finding:
    return Finding(check, "warn", finding, next_step)


def failed(check: str, finding: str, next_step: str) -> Finding:
    return Finding(check, "fail", finding, next_step)


def not_run(check: str, finding: str, next_step: str = "") -> Finding:
    return Finding(check, "not-run", finding, next_step)


def mend_first(findings: Sequence[Finding]) -> Finding | None:
    """The first failure: checks stand in the order in which one fault causes the next."""
    return next((finding for finding in findings if finding.outcome == "fail"), None)
