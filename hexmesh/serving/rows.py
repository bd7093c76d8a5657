"""What stages are told of a sequence's part in a step."""

from __future__ import annotations

from hexmesh.serving.batcher import ScheduledRow
from hexmesh.wire.data import Row


def wire_row(row: ScheduledRow) -> Row:
    """The row as stages see it."""
    return Row(
        start=row.start,
        n_tokens=row.n_tokens,
        blocks=list(row.sequence.blocks),
        sample=row.sequence.sampling if row.reaches_end else None,
    )
