"""The daemon with certificates that live for seconds: first two arguments are a certificate's day and its grace."""

from __future__ import annotations

import sys
from datetime import timedelta

from daemon.cli import main
from hexmesh.identity import validity

if __name__ == "__main__":
    day_s, grace_s, *args = sys.argv[1:]
    validity.NODE_VALIDITY = timedelta(seconds=float(day_s))
    validity.GRACE = timedelta(seconds=float(grace_s))
    main(args)
