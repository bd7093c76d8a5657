"""Links as the read verbs show them, from the records of the nodes that measured them."""

from __future__ import annotations

import time
from collections.abc import Set

from daemon.views import LinkView
from hexmesh.membership.records import Directory


def link_views(directory: Directory, in_use: Set[tuple[str, str]]) -> list[LinkView]:
    """Every measured link; `in_use` are the pairs (from, to) that the present plan sends over."""
    now_unix_s = time.time()
    return [
        LinkView(
            src=facts.link.src,
            dst=facts.link.dst,
            rtt_p50_s=facts.link.rtt_p50_s,
            rtt_p95_s=facts.link.rtt_p95_s,
            bytes_per_s=facts.link.bytes_per_s,
            lower_bound=facts.link.lower_bound,
            age_s=max(0.0, now_unix_s - facts.measured_at_unix_s),
            relayed=facts.relayed,
            in_use=(facts.link.src, facts.link.dst) in in_use,
        )
        for record in directory.records()
        for facts in record.links
    ]
