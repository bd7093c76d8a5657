"""Threads that give way: what moves weights must not slow down what serves requests."""

from __future__ import annotations

import contextlib
import os
import threading

_NICENESS = 5


def be_nice() -> None:
    """Give the calling thread less of a CPU that others want too; Linux counts niceness by thread."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
