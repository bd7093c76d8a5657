"""File descriptors: a daemon holds one for each connection of a client or peer."""

from __future__ import annotations

import resource

N_WANTED = 8192


def raise_descriptor_limit() -> None:
    """As many as this process may take, up to what connections can need. Many systems start with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = N_WANTED if hard == resource.RLIM_INFINITY else min(N_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
